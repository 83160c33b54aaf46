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
    def now(cls) -> RandomStreams:
        """Hold the present state of every stream."""
        return cls._with_numpy(np.random.get_state())

    @classmethod
    def latest(cls) -> RandomStreams:
        """The present state, taken from the last one that was asked for here as far as nothing has moved since.

        To ask numpy takes 40 us, and to see that nothing has moved a tenth of that.
        """
        found = _LATEST[0] if _LATEST else cls.now()
        if found.have_moved():
            seen = _numpy_marks()
            still = seen is not None and seen == found._marks[1]
            found = cls._with_numpy(found.numpy_legacy if still else np.random.get_state())
        _LATEST[:] = [found]  # that of another thread may come first; what is returned is this one's
        return found

    @classmethod
    def _with_numpy(cls, legacy: Any) -> RandomStreams:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda, legacy, random.getstate())

    @functools.cached_property
    def _marks(self) -> tuple[Any, Any, Any]:
        """What is seen in memory where the streams of torch, numpy and Python stand here, None where more counts.

        The position within a state and its second word, which is new where the position comes round, and where it is
        set; the first is 2^31 after every seed. Normal numbers are made in pairs: with it comes the one that is kept.
        """
        if _TORCH is None:
            return None, None, None
        position, word, kept, is_kept, single, is_single = struct.unpack(_TORCH_STATE, self.torch_cpu.numpy().tobytes())
        legacy, words = self.numpy_legacy, self.python[1]
        return (
            (position, word, kept if is_kept else None, single if is_single else None),
            (int(legacy[2]), int(legacy[1][1]), float(legacy[4]) if legacy[3] else None)
            if legacy[0] == "MT19937"
            else None,
            (words[-1], words[1], self.python[2]),
        )

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
    words, kept, single = _TORCH
    return (
        (words[0], words[2], kept.now, single.now),
        _numpy_marks(),
        (_PYTHON[0], _PYTHON[2], random._inst.gauss_next),  # type: ignore[attr-defined]
    )


def _numpy_marks() -> tuple[int, int, float | None] | None:
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if _NUMPY[0] is not generator:
        found = type(generator) is np.random.MT19937 and _NUMPY_KEPT is not None
        _NUMPY[:] = generator, _Twister.from_address(generator.ctypes.state_address) if found else None
    words = _NUMPY[1]
    return None if words is None or _NUMPY_KEPT is None else (words[624], words[1], _NUMPY_KEPT.now)


class _Kept:
    """A normal number that a generator in memory keeps for later."""

    def __init__(self, number: Any, flag: Any) -> None:
        self._number, self._flag = number, flag

    @property
    def now(self) -> float | None:
        return self._number.value if self._flag.value else None


def _torch_in_memory() -> Any:
    """The position and the words of torch's CPU generator in memory, and the normal numbers that it keeps.

    None where they do not lie as in torch 2.13.
    """
    with contextlib.suppress(Exception):  # whatever another torch makes of an address
        trial = torch.Generator()
        torch.rand(3, generator=trial)
        state = trial.get_state().numpy().tobytes()
        position, *words = struct.unpack_from("<Q8Q", state, 16)
        # Generator._cdata, where the C++ object lies, is not among torch's annotations
        at, shared = (int(one._cdata) for one in (trial, torch.default_generator))  # type: ignore[attr-defined]
        memory = (ctypes.c_uint32 * 64).from_address(at)
        start = next(k for k in range(1, 56) if [*memory[k - 1 : k + 8]] == [position, *words])
        torch.rand(1, generator=trial)
        if memory[start - 1] != position + 1:
            return None
        keeping = struct.pack("<ddd?7xf?3x", 0.0, 0.375, 0.0, True, 0.625, True)  # in the state from its byte 5016 on
        trial.set_state(torch.frombuffer(bytearray(state[:5016] + keeping), dtype=torch.uint8))
        behind = 4 * (start + 624)
        after = ctypes.string_at(at + behind, 32)
        kept, single = after.index(struct.pack("<d", 0.375)), after.index(struct.pack("<f", 0.625))
        flags = kept + 8, single + 4
        trial.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        without = ctypes.string_at(at + behind, 32)
        if any(after[flag] != 1 or without[flag] != 0 for flag in flags):
            return None
        tail = shared + behind
        return (
            (ctypes.c_uint32 * 3).from_address(shared + 4 * (start - 1)),
            _Kept(ctypes.c_double.from_address(tail + kept), ctypes.c_uint8.from_address(tail + flags[0])),
            _Kept(ctypes.c_float.from_address(tail + single), ctypes.c_uint8.from_address(tail + flags[1])),
        )
    return None


def _numpy_kept_in_memory() -> _Kept | None:
    """The normal number that numpy's global generator keeps; None where it does not lie as in numpy 2."""
    with contextlib.suppress(Exception):  # whatever another numpy makes of an address
        trial = np.random.RandomState(0)
        legacy: Any = trial.get_state()
        seen = []
        for flag in (1, 0):
            trial.set_state((*legacy[:3], flag, 0.375))
            seen.append(ctypes.string_at(id(trial), type(trial).__basicsize__))
        kept = seen[0].index(struct.pack("<d", 0.375))
        if [int.from_bytes(memory[kept - 8 : kept - 4], "little") for memory in seen] != [1, 0]:
            return None
        # the object behind np.random's functions, of which get_state is a method; numpy annotates it as a function
        shared = np.random.get_state.__self__  # type: ignore[attr-defined]
        if type(shared) is np.random.RandomState:
            address = id(shared) + kept
            return _Kept(ctypes.c_double.from_address(address), ctypes.c_int32.from_address(address - 8))
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
# the position, the second word, and the normal numbers that are kept, in the bytes of torch's state
_TORCH_STATE = "<16xQ8xQ4984xd8x?7xf?3x"
_TORCH = _torch_in_memory()
_NUMPY: list[Any] = [None, None]
_Twister = ctypes.c_uint32 * 625
_NUMPY_KEPT = _numpy_kept_in_memory() if sys.implementation.name == "cpython" else None
_PYTHON = _python_in_memory() if sys.implementation.name == "cpython" else None


@contextlib.contextmanager
def random_streams_kept() -> Iterator[None]:
    """Let the block draw as it likes; the streams are afterwards as they were before it."""
    before = RandomStreams.now()
    try:
        yield
    finally:
        before.restore()
