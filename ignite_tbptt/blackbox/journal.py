"""Finished evaluations on disk, so that a run that was killed does not pay for them again.

A journal is one file to which records are added: the key of an evaluation, made of its point and of the random numbers
that it started from, and what came out. A record that was torn by a crash ends the file for the reader, and is written
over. Pairs with any executor, `Workers` around a pool say; evaluations that raised are not kept.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor as Pool
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from ignite_tbptt.blackbox.executors import Workers
from ignite_tbptt.blackbox.flat import FlatCall
from ignite_tbptt.blackbox.task import Executor, Result, Task, require_executor
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["Journaled"]

_MAGIC = b"ignite_tbptt journal 1\n"
_HEAD = struct.Struct("<32sQ32s")  # key, length of what follows, its digest


class Journaled:
    """An executor that looks evaluations up in a file before it runs them, and adds those that it ran.

    Example:
        >>> import tempfile, torch
        >>> from ignite_tbptt.blackbox import CentralDifference, blackbox
        >>> path = tempfile.mkdtemp() + "/sine.journal"
        >>> for _ in range(2):
        ...     calls = []
        ...     def slow(x):
        ...         calls.append(1)
        ...         return x.sin()
        ...     f = blackbox(slow, executor=Journaled(path), estimator=CentralDifference())
        ...     x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        ...     f(x).sum().backward()
        ...     print(len(calls) > 1)
        True
        False

    Points that are asked for twice, in one run or in several, are evaluated once. The forward call itself is not looked
    up. The function is known by its name, its module, its code, and what it closes over or holds, but for lists, dicts
    and sets that it closes over, in which it may count: a journal of another one is refused. What the code reads
    besides, a file or a global, is not seen: use a new journal where that changes.

    One process writes at a time. The file is read with pickle, as Python's own: open only journals that you trust.

    Args:
        path: the file, made where there is none.
        executor: where evaluations run that are not there; a pool, or one after the other by default.

    Raises:
        TypeError: path is none, or executor runs no tasks.
        ValueError: when used: the file is no journal, or one of another function; the blackbox is a module.
    """

    def __init__(self, path: str | os.PathLike[str], executor: Executor | Pool = map) -> None:
        require_executor(executor)
        try:
            self.path = Path(path)
        except TypeError as error:
            raise TypeError(
                f"path must be that of a file, got {path!r}; executor comes after it: Journaled(path, executor)"
            ) from error
        self.executor = Workers(cast("Pool", executor)) if hasattr(executor, "submit") else executor
        self._places: dict[bytes, tuple[int, int]] = {}
        self._program = b""
        self._end = 0
        self._lock = threading.RLock()

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterator[Result]:
        """See `Executor`."""
        order: deque[bytes] = deque()
        running: deque[tuple[bytes, bool]] = deque()
        unkept: dict[bytes, Result] = {}
        streams = RandomStreams.latest()

        def missing() -> Iterator[Task]:
            asked: set[bytes] = set()
            for task in tasks:
                self._open(task.program)
                key = _key(task)
                order.append(key)
                if key not in self._places and key not in asked:
                    asked.add(key)
                    running.append((key, task.streams is None))
                    yield task

        def found(results: Iterable[Result]) -> Iterator[Result]:
            for result in results:
                key, unwatched = running.popleft()
                if result.error is None and not (unwatched and result.drew_since(streams)):
                    self._add(key, result)
                else:  # it raised, or drew random numbers that are not in its key
                    unkept[key] = result
                while order and (order[0] in self._places or order[0] in unkept):
                    yield self._found(order.popleft(), unkept)
            while order:
                yield self._found(order.popleft(), unkept)

        return found(self.executor(function, missing()))

    def _found(self, key: bytes, unkept: dict[bytes, Result]) -> Result:
        return unkept[key] if key in unkept else self._read(key)

    def _open(self, program: FlatCall) -> None:
        """Read which evaluations are there, the first time."""
        name, _ = _known(program)
        with self._lock:
            if self._program:
                if name != self._program:
                    raise ValueError(
                        f"{self.path} is in use for another function than {program.label}: give it its own"
                    )
                return
            header = _MAGIC + name
            if self.path.exists() and self.path.stat().st_size:
                with self.path.open("rb") as file:
                    if file.read(len(_MAGIC)) != _MAGIC:
                        raise ValueError(f"{self.path} is no journal of evaluations: give another path")
                    if file.read(len(name)) != name:
                        raise ValueError(
                            f"{self.path} is a journal of another function than {program.label}, or of an earlier "
                            "version of it: give another path, or remove the file"
                        )
                    self._end = len(header)
                    while (place := self._record(file)) is not None:
                        self._end = place[1] + place[2]
                        self._places[place[0]] = place[1:]
            else:
                self.path.write_bytes(header)
                self._end = len(header)
            self._program = name

    @staticmethod
    def _record(file: BinaryIO) -> tuple[bytes, int, int] | None:
        """Key, start and length of the next record; None at the end, or where one is torn."""
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        key, length, digest = _HEAD.unpack(head)
        start = file.tell()
        body = file.read(length)
        if len(body) < length or hashlib.sha256(body).digest() != digest:
            return None
        return key, start, length

    def _add(self, key: bytes, result: Result) -> None:
        body = pickle.dumps(result.outputs)
        with self._lock, self.path.open("r+b") as file:
            file.seek(self._end)
            file.write(_HEAD.pack(key, len(body), hashlib.sha256(body).digest()) + body)
            file.flush()
            file.truncate()
            self._places[key] = self._end + _HEAD.size, len(body)
            self._end = file.tell()

    def _read(self, key: bytes) -> Result:
        start, length = self._places[key]
        with self._lock, self.path.open("rb") as file:
            file.seek(start)
            return Result(pickle.loads(file.read(length)), None, 0.0)


class _Fingerprint(pickle.Pickler):
    """Pickles that are equal where values are: functions by their code and what they close over."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple, ((str(value.dtype), tuple(value.shape), bytes_of(value)),)
        if isinstance(value, types.FunctionType):
            inside = [cell.cell_contents for cell in value.__closure__ or ()]
            cells = [None if isinstance(held, (list, dict, set)) else held for held in inside]  # it may count in these
            held = (value.__module__, value.__qualname__, value.__defaults__, value.__kwdefaults__, cells)
            return tuple, ((*held, value.__code__),)
        if isinstance(value, types.CodeType):
            return tuple, ((value.co_code, value.co_names, value.co_varnames, value.co_consts),)
        if isinstance(value, frozenset):
            return tuple, (sorted(value, key=repr),)
        return NotImplemented


_KNOWN: weakref.WeakKeyDictionary[FlatCall, tuple[bytes, bytes]] = weakref.WeakKeyDictionary()


def _known(program: FlatCall) -> tuple[bytes, bytes]:
    """What a function is known by, and what it is given besides tensors, worked out at the first of its evaluations."""
    found = _KNOWN.get(program)
    if found is None:
        if program.states:
            raise ValueError(
                f"{program.label} is a module, whose buffers and attributes no key would hold: a journal is for "
                "functions; pass the module's numbers to one as arguments"
            )
        found = _KNOWN[program] = _identity(program), pickle.dumps(program.constants)
    return found


def _identity(program: FlatCall) -> bytes:
    """What a function is known by in every run: its code, and all that it holds."""
    file = io.BytesIO()
    pickler = _Fingerprint(file, 5)
    pickler.fast = True  # what is equal and not the same is pickled alike
    try:
        pickler.dump((program.fn, program.label))
    except Exception:
        # what it holds cannot be read, a lock or a list of itself: its code is left
        kept = getattr(program.fn, "__code__", None) or type(program.fn).__call__.__code__
        file = io.BytesIO(pickle.dumps((program.label, kept.co_code, kept.co_names)))
    return hashlib.sha256(file.getvalue()).digest()


def _key(task: Task) -> bytes:
    """What an evaluation is known by: its point, what else it is given, and the random numbers that it draws."""
    digest = hashlib.sha256()
    for tensor in task.points:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    digest.update(_known(task.program)[1])
    if task.streams is not None:
        digest.update(bytes_of(task.streams.torch_cpu))
        digest.update(pickle.dumps((task.streams.python, task.streams.numpy_legacy)))
    return digest.digest()


def bytes_of(tensor: Tensor) -> bytes:
    """The numbers of a tensor."""
    data: bytes = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return data
