"""Finished evaluations on disk, so that a run that was killed does not pay for them again.

The idea: an evaluation is a pure task, so that its function, its point and its random numbers say what comes out. A
record is appended to the file as soon as its result arrives, with a checksum: what a crash has cut short is not found.
Pairs with every executor, which runs what is not in the journal.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import threading
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor as Pool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ignite_tbptt.blackbox.task import Executor, Result, Task

__all__ = ["Journaled"]

_MAGIC = b"evaluation 1\n"
_HEAD = len(_MAGIC) + 32 + 8 + 4  # the key, the size, a checksum of all that follows the magic


class Journaled:
    """An executor that keeps finished evaluations in a file and looks there first.

    Example:
        >>> import tempfile, torch
        >>> from ignite_tbptt.blackbox import blackbox
        >>> calls = []
        >>> def simulator(x):
        ...     calls.append(x)
        ...     return x.detach() ** 2
        >>> path = tempfile.mkdtemp() + "/journal"
        >>> for run in range(2):
        ...     f = blackbox(simulator, executor=Journaled(map, path))
        ...     x = torch.ones(8, requires_grad=True)
        ...     y = f(x)
        ...     calls.clear()
        ...     y.sum().backward()
        >>> len(calls)  # the second run, beside its forward call
        0

    An evaluation is known by the bytes of its point, by the random streams where it draws from them, and by its
    function: its name, its code, its defaults, what it closes over, and the arguments and modules that it is given
    beside tensors. Functions that it calls, and files or programs that it reads, are not looked at: begin another file
    when these change. Identical points of one gradient are evaluated once. Errors are not kept. Results are written by
    the process that takes the gradient, in the order of the tasks; the forward call is not among them.

    Args:
        executor: where evaluations run that are not in the file: ``map``, `Workers`, a pool.
        path: the file, of one function and one process at a time; made if it is not there.

    Attributes:
        found: evaluations that were taken from the file so far.

    Raises:
        ValueError: in the first gradient: the file is of another function, or no journal.
        TypeError: in the first gradient: the function holds what cannot be pickled.
    """

    def __init__(self, executor: Executor | Pool, path: str | os.PathLike[str]) -> None:
        self.executor, self.path, self.found = executor, Path(path), 0
        self._places: dict[bytes, tuple[int, int]] | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Journaled:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"executor": self.executor, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Journaled({self.executor!r}, {str(self.path)!r})"

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterator[Result]:
        """See `Executor`."""
        order: deque[tuple[bytes, Result | None]] = deque()
        results: dict[bytes, Result] = {}
        programs: dict[int, tuple[Any, bytes]] = {}
        sent: deque[bytes] = deque()
        asked: set[bytes] = set()

        def missing() -> Iterator[Task]:
            for task in tasks:
                program = task.program
                if id(program) not in programs:
                    programs[id(program)] = (program, _digest(program, program.label))
                    self._open(_digest(program.identity, program.label), program.label)
                key = _digest((programs[id(program)][1], [_bits(p) for p in task.points], task.streams), program.label)
                known = None if key in asked else self._read(key)
                order.append((key, known))
                if known is None and key not in asked:
                    asked.add(key)
                    sent.append(key)
                    yield task

        for result in self.executor(function, missing()):  # type: ignore[operator]  # options make one of a pool
            key = sent.popleft()
            results[key] = result
            if result.error is None:
                self._append(key, pickle.dumps(result.outputs))
            while order and (order[0][1] is not None or order[0][0] in results):
                yield _next(order, results)
        while order:
            yield _next(order, results)

    def _open(self, function: bytes, label: str) -> None:
        """Look through the file, once."""
        with self._lock:
            if self._places is None:
                self._places, self._function, self._label = {}, b"", ""
                data = self.path.read_bytes() if self.path.exists() else b""
                at = data.find(_MAGIC)
                if data and at != 0 and not _MAGIC.startswith(data):
                    self._places = None
                    raise ValueError(f"{self.path} is no journal of evaluations; give another path")
                while at >= 0:
                    head, start = data[at : at + _HEAD], at + _HEAD
                    key, size = head[len(_MAGIC) : -12], int.from_bytes(head[-12:-4], "big")
                    whole = len(head) == _HEAD and start + size <= len(data)
                    if whole and zlib.crc32(head[len(_MAGIC) : -4] + data[start : start + size]) == int.from_bytes(
                        head[-4:], "big"
                    ):
                        if key == bytes(32):
                            self._function, self._label = pickle.loads(data[start : start + size])
                        else:
                            self._places[key] = (start, size)
                        at = data.find(_MAGIC, start + size)
                    else:  # torn: go on after it
                        at = data.find(_MAGIC, at + 1)
            if not self._function:
                self._function, self._label = function, label
                self._write(bytes(32), pickle.dumps((function, label)))
        if self._function != function:
            raise ValueError(
                f"{self.path} is the journal of another function, {self._label}, or of {label} before its code was "
                "changed; give each function a file of its own"
            )

    def _read(self, key: bytes) -> Result | None:
        place = (self._places or {}).get(key)
        if place is None:
            return None
        with open(self.path, "rb") as file:
            file.seek(place[0])
            outputs = pickle.loads(file.read(place[1]))
        self.found += 1
        return Result(outputs, None, 0.0)

    def _append(self, key: bytes, value: bytes) -> None:
        with self._lock:
            place = self._write(key, value)
            if self._places is not None:
                self._places[key] = place

    def _write(self, key: bytes, value: bytes) -> tuple[int, int]:
        head = key + len(value).to_bytes(8, "big")
        record = _MAGIC + head + zlib.crc32(head + value).to_bytes(4, "big") + value
        with open(self.path, "ab", buffering=0) as file:
            file.write(record)
            return file.tell() - len(value), len(value)


def _next(order: deque[tuple[bytes, Result | None]], results: dict[bytes, Result]) -> Result:
    key, known = order.popleft()
    return results[key] if known is None else known


class _Fingerprint(pickle.Pickler):
    """Pickles that are equal where values are: functions by their code, tensors by their bytes."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple, ((_bits(value),),)
        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            held = (value.__module__, value.__qualname__, value.__defaults__, value.__kwdefaults__, cells)
            return tuple, ((*held, value.__code__),)
        if isinstance(value, types.CodeType):
            return tuple, ((value.co_code, value.co_names, value.co_varnames, value.co_consts),)
        if isinstance(value, frozenset):
            return tuple, (sorted(value, key=repr),)
        return NotImplemented


def _bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().clone()
    data = plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return str(tensor.dtype), tuple(tensor.shape), data


def _digest(value: Any, label: str) -> bytes:
    file = io.BytesIO()
    pickler = _Fingerprint(file, 5)
    pickler.fast = True  # what is equal and not the same is pickled alike
    try:
        pickler.dump(value)
    except Exception as error:  # whatever its own __reduce__ raises
        raise TypeError(
            f"{label} holds what a journal cannot know it by ({type(error).__name__}: {error}); open files, locks "
            "and the like inside the function"
        ) from error
    return hashlib.blake2b(file.getvalue(), digest_size=32).digest()
