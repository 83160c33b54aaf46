"""Common random numbers: the global random streams of torch, numpy and ``random``, held and replayed.

A difference of two noisy evaluations is dominated by the noise unless both draw the same numbers: with dropout the
gradient would be off by a factor of a thousand. Whoever evaluates a blackbox more than once replays the streams as they
stood before the first evaluation, and leaves them as they stood after it. Generators that a blackbox keeps to itself
(`numpy.random.default_rng`, a `torch.Generator`) are its own to rewind.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import random
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomStreams", "random_streams_kept"]


@dataclass(frozen=True, eq=False)
class RandomStreams:
    """Where the global random streams stood at one moment.

    Example::

        >>> import torch
        >>> from ignite_tbptt.random_streams import RandomStreams
        >>> streams = RandomStreams.now()
        >>> first = torch.rand(3)
        >>> with streams.replayed():
        ...     again = torch.rand(3)
        >>> torch.equal(first, again)
        True

    CUDA streams are held where CUDA has been used in this process.
    """

    torch_cpu: Tensor
    torch_cuda: list[Tensor]
    numpy_legacy: Any
    python: Any

    @classmethod
    def now(cls, before: RandomStreams | None = None) -> RandomStreams:
        """Hold the present state of every stream.

        Args:
            before: streams held earlier. What numpy's were is taken from there if they have not been drawn from since,
                because to ask numpy takes 40 us. Only a state that was set by hand meanwhile, of the same words but
                with a normal number kept for later, is not told from it.
        """
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        known = before is not None and not _numpy_has_moved(before.numpy_legacy)
        legacy = before.numpy_legacy if before is not None and known else _from_numpy()
        return cls(torch.get_rng_state(), cuda, legacy, random.getstate())

    @functools.cached_property
    def _torch_bytes(self) -> bytes:
        return self.torch_cpu.numpy().tobytes()

    @classmethod
    def latest(cls) -> RandomStreams:
        """The present state, taken from the last one that was asked for here where nothing has moved since.

        A state of numpy's that was set by hand, of the same words but with a normal number kept for later, is not told
        from the last one: use `now` for whoever draws.
        """
        if not _LATEST or _LATEST[0].have_moved():
            _LATEST[:] = [cls.now()]
        return _LATEST[0]

    def have_moved(self) -> bool:
        """Whether any stream was drawn from, or set, since.

        Draws show in the position within a state, or, where it comes round, in the first word, which is new by then.
        """
        if _torch_has_moved(self._torch_bytes):
            return True
        if _python_has_moved(self.python):
            return True
        if _numpy_has_moved(self.numpy_legacy):
            return True
        if not self.torch_cuda and not torch.cuda.is_initialized():
            return False
        cuda = torch.cuda.get_rng_state_all()
        if len(cuda) != len(self.torch_cuda):
            return True
        return not all(torch.equal(was, now) for was, now in zip(self.torch_cuda, cuda, strict=True))

    def restore(self) -> None:
        """Set every stream to the state that is held here."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda:
            torch.cuda.set_rng_state_all(self.torch_cuda)
        np.random.set_state(self.numpy_legacy)
        random.setstate(self.python)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from these streams inside the block, and go on afterwards as if it had not been there."""
        with random_streams_kept():
            self.restore()
            yield


def _torch_has_moved(before: bytes) -> bool:
    if _TORCH is not None and not any(before[_NORMAL:]):  # to ask for all words takes 5 us, cold
        position, first = struct.unpack_from("<QQ", before, _POSITION)
        return bool(_TORCH[0] != position or _TORCH[1] != first)
    return before != torch.get_rng_state().numpy().tobytes()


def _torch_in_memory() -> Any:
    """The position and the words of torch's CPU generator in memory; None where they do not lie as in torch 2.13."""
    with contextlib.suppress(Exception):  # whatever another torch makes of an address
        trial = torch.Generator()
        torch.rand(3, generator=trial)
        state = trial.get_state().numpy().tobytes()
        position, *words = struct.unpack_from("<Q8Q", state, _POSITION)
        memory = (ctypes.c_uint32 * 64).from_address(trial._cdata)  # type: ignore[attr-defined]
        start = next(k for k in range(1, 56) if [*memory[k - 1 : k + 8]] == [position, *words])
        torch.rand(1, generator=trial)
        if memory[start - 1] != position + 1 or any(state[_NORMAL:]):
            return None
        torch.randn(1, generator=trial)  # one more normal number is kept
        if any(trial.get_state().numpy().tobytes()[_NORMAL:]):
            address = torch.default_generator._cdata + 4 * (start - 1)  # type: ignore[attr-defined]
            return (ctypes.c_uint32 * 2).from_address(address)
    return None


def _numpy_has_moved(before: Any) -> bool:
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is np.random.MT19937 and before[0] == "MT19937" and not before[3]:
        # The twister in memory is 624 words and the position; to ask for them takes 40 us. Of normal numbers, made in
        # pairs, the second is kept outside of it: but as none was kept, the twister has to move before one is drawn.
        words = _Twister.from_address(generator.ctypes.state_address)
        return bool(words[624] != before[2] or words[0] != before[1][0])
    now = _from_numpy()
    return bool(before[0] != now[0] or before[2:] != now[2:] or before[1][0] != now[1][0])


def _python_has_moved(before: Any) -> bool:
    words = before[1]
    if _PYTHON is not None:  # to ask for all words takes 8 us
        return bool(_PYTHON[0] != words[-1] or _PYTHON[1] != words[0] or random._inst.gauss_next != before[2])  # type: ignore[attr-defined]
    now = random.getstate()
    return (words[-1], words[0], before[2]) != (now[1][-1], now[1][0], now[2])


def _python_in_memory() -> Any:
    """The position and the 624 words of Python's generator in memory; None where they do not lie as in CPython's."""
    with contextlib.suppress(Exception):  # whatever another Python makes of an address
        words = _Twister.from_address(id(random._inst) + object.__basicsize__)
        state = random.getstate()[1]
        if tuple(words) == (state[-1], *state[:-1]):
            return words
    return None


_LATEST: list[RandomStreams] = []
# where in the bytes of torch's state the position in the words, and normal numbers that are kept, begin
_POSITION, _NORMAL = 16, 5040
_TORCH = _torch_in_memory()
_Twister = ctypes.c_uint32 * 625
_PYTHON = _python_in_memory() if sys.implementation.name == "cpython" else None


def _from_numpy() -> Any:
    return np.random.get_state()


@contextlib.contextmanager
def random_streams_kept() -> Iterator[None]:
    """Let the block draw as it likes; the streams are afterwards as they were before it."""
    before = RandomStreams.now()
    try:
        yield
    finally:
        before.restore()
