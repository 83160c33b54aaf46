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
        known = before is not None and before._marks[1] is not None and before._marks[1] == _numpy_marks()
        legacy = before.numpy_legacy if before is not None and known else np.random.get_state()
        return cls(torch.get_rng_state(), cuda, legacy, random.getstate())

    @functools.cached_property
    def _marks(self) -> tuple[Any, Any, Any]:
        """What is seen in memory where the streams of torch, numpy and Python stand here, None where more counts.

        The position within a state and its second word, which is new where the position comes round, and where it is
        set; the first is 2^31 after every seed. Normal numbers are made in pairs, of which the second is kept outside
        of the words: but where none was kept, these have to move before one is drawn.
        """
        state = self.torch_cpu.numpy().tobytes()
        legacy, words = self.numpy_legacy, self.python[1]
        return (
            None if any(state[_NORMAL:]) else struct.unpack_from("<QxxxxxxxxQ", state, _POSITION),
            None if legacy[0] != "MT19937" or legacy[3] else (int(legacy[2]), int(legacy[1][1])),
            (words[-1], words[1], self.python[2]),
        )

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
        """Whether any stream was drawn from, or set, since."""
        seen = _marks_in_memory()
        if None in self._marks or None in seen:
            if not self._equal_in_full():
                return True
        elif seen != self._marks:
            return True
        if not self.torch_cuda and not torch.cuda.is_initialized():
            return False
        cuda = torch.cuda.get_rng_state_all()
        if len(cuda) != len(self.torch_cuda):
            return True
        return not all(torch.equal(was, now) for was, now in zip(self.torch_cuda, cuda, strict=True))

    def _equal_in_full(self) -> bool:
        legacy: Any = self.numpy_legacy
        now: Any = np.random.get_state()
        return (
            torch.equal(self.torch_cpu, torch.get_rng_state())
            and self.python == random.getstate()
            and bool(legacy[0] == now[0] and legacy[2:] == now[2:] and (legacy[1] == now[1]).all())
        )

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


def _marks_in_memory() -> tuple[Any, Any, Any]:
    """See `RandomStreams._marks`; to ask for all states takes 50 us."""
    if _TORCH is None or _PYTHON is None:
        return None, None, None
    return (
        (_TORCH[0], _TORCH[2]),
        _numpy_marks(),
        (_PYTHON[0], _PYTHON[2], random._inst.gauss_next),  # type: ignore[attr-defined]
    )


def _numpy_marks() -> tuple[int, int] | None:
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if _NUMPY[0] is not generator:
        found = type(generator) is np.random.MT19937
        _NUMPY[:] = generator, _Twister.from_address(generator.ctypes.state_address) if found else None
    words = _NUMPY[1]
    return None if words is None else (words[624], words[1])


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
            return (ctypes.c_uint32 * 3).from_address(address)
    return None


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
_NUMPY: list[Any] = [None, None]
_Twister = ctypes.c_uint32 * 625
_PYTHON = _python_in_memory() if sys.implementation.name == "cpython" else None


@contextlib.contextmanager
def random_streams_kept() -> Iterator[None]:
    """Let the block draw as it likes; the streams are afterwards as they were before it."""
    before = RandomStreams.now()
    try:
        yield
    finally:
        before.restore()
