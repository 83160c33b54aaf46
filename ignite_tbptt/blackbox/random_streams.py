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
        >>> from ignite_tbptt.blackbox.random_streams import RandomStreams
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
    def now(cls) -> RandomStreams:
        """Hold the present state of every stream."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda, _numpy_state(), random.getstate())

    def have_moved(self) -> bool:
        """Whether any stream was drawn from, or set, since.

        Draws show in the position within a state, or, where it comes round, in the first word, which is new by then.
        """
        if not torch.equal(self.torch_cpu, torch.get_rng_state()):
            return True
        was, now = self.python, random.getstate()
        if (was[1][-1], was[1][0], was[2]) != (now[1][-1], now[1][0], now[2]):
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
        _known.clear()
        np.random.set_state(self.numpy_legacy)
        random.setstate(self.python)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from these streams inside the block, and go on afterwards as if it had not been there."""
        with random_streams_kept():
            self.restore()
            yield


# What numpy was last asked for, by the words of its generator at that time. To ask takes 40 us, to look at them 1.
_known: dict[bytes, Any] = {}


def _numpy_state() -> Any:
    """What `numpy.random.get_state` returns."""
    words = _twister()
    state = None if words is None else _known.get(words)
    if state is None:
        state = _from_numpy()
        _known.clear()
        if words is not None and _is_twister(state, words):  # and has not been moved by another thread meanwhile
            _known[words] = state
    return state


def _numpy_has_moved(before: Any) -> bool:
    words = _twister()
    if words is not None:
        return _known.get(words) is not before and not _is_twister(before, words)
    now = _from_numpy()
    return bool(before[0] != now[0] or before[2:] != now[2:] or before[1][0] != now[1][0])


def _from_numpy() -> Any:
    return np.random.get_state()


def _is_twister(state: Any, words: bytes) -> bool:
    name, key, position, keeps_a_number, _ = state
    twister: bytes = key.tobytes() + int(position).to_bytes(4, sys.byteorder)
    return name == "MT19937" and not keeps_a_number and words == twister


def _twister() -> bytes | None:
    """The 624 words and the position of numpy's global generator, where they are all there is to its state.

    None where it has to be asked: it is another generator than MT19937; it keeps a normal number for later, of which
    two are made at a time; or there is no seeing whether it does.
    """
    generator, flag = np.random.get_bit_generator(), _place_of_flag()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937 or flag is None or ctypes.string_at(id(_owner()) + flag, 1) != b"\0":
        return None
    return ctypes.string_at(generator.ctypes.state_address, 625 * 4)


@functools.lru_cache(maxsize=1)
def _place_of_flag() -> int | None:
    """Where in its memory a RandomState says that it keeps a normal number; None where that is not to be found.

    The words of the twister do not tell, and `set_state` goes back to the same words with a number or without. It is
    the byte that is 0, 1 and 0 as a number comes and goes, if only one is.
    """
    if sys.implementation.name != "cpython" or not isinstance(_owner(), np.random.RandomState):
        return None
    probe, seen = np.random.RandomState(0), []
    for _ in range(3):
        seen.append(ctypes.string_at(id(probe), type(probe).__basicsize__))
        probe.standard_normal()
    places = [place for place, values in enumerate(zip(*seen, strict=True)) if values == (0, 1, 0)]
    return places[0] if len(places) == 1 else None


def _owner() -> Any:
    """Whose methods the functions of `numpy.random` are."""
    return getattr(np.random.get_state, "__self__", None)


@contextlib.contextmanager
def random_streams_kept() -> Iterator[None]:
    """Let the block draw as it likes; the streams are afterwards as they were before it."""
    before = RandomStreams.now()
    try:
        yield
    finally:
        before.restore()
