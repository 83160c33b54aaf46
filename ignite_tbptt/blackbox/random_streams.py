"""Common random numbers: the global random streams of torch, numpy and ``random``, held and replayed.

A difference of two noisy evaluations is dominated by the noise unless both draw the same numbers: with dropout the
gradient would be off by a factor of a thousand. Whoever evaluates a blackbox more than once replays the streams as they
stood before the first evaluation, and leaves them as they stood after it. Generators that a blackbox keeps to itself
(`numpy.random.default_rng`, a `torch.Generator`) are its own to rewind.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
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
        used = torch.cuda.is_available() and torch.cuda.is_initialized()
        cuda = torch.cuda.get_rng_state_all() if used else []
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
        old, new = self.numpy_legacy, _numpy_state()
        if old is not new and (old[0] != new[0] or old[2:] != new[2:] or old[1][0] != new[1][0]):
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


_WORDS = 625  # of a Mersenne twister in memory: its key and the position in it
_last_seen: tuple[bytes, Any] = (b"", None)


def _numpy_state() -> Any:
    """What `numpy.random.get_state` gives, which takes 25 us, or what it gave before where nothing has moved since.

    The twister is compared in memory. Besides it there is a normal number that was made in a pair and kept: it comes
    only by moving the twister, so where none was kept and the twister is the same, none is.
    """
    global _last_seen  # noqa: PLW0603 - a memory of one, of no consequence but for time
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return np.random.get_state()
    words = ctypes.string_at(generator.ctypes.state_address, 4 * _WORDS)
    seen, state = _last_seen
    if words == seen and not state[3]:
        return state
    state = np.random.get_state()
    _last_seen = (words, state)
    return state


@contextlib.contextmanager
def random_streams_kept() -> Iterator[None]:
    """Let the block draw as it likes; the streams are afterwards as they were before it."""
    before = RandomStreams.now()
    try:
        yield
    finally:
        before.restore()
