"""One evaluation of a blackbox, where evaluations run, and what they cost.

The idea: an evaluation is a `Task`, a function and a point, which `run` turns into a `Result`; both can be pickled and
neither depends on anything else. An executor is anything that is called as the builtin ``map`` is, the ``map`` of a
pool of threads or processes say. How many points go into one call is apart from where calls run: `StackedEvaluation`
and `SerialEvaluation` say the one, and take an executor for the other. Pairs with every estimator.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Executor as Pool
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ignite_tbptt.blackbox.errors import BlackboxError, LostEvaluationError
from ignite_tbptt.blackbox.flat import FlatCall, Outputs, same_bits, same_kind
from ignite_tbptt.blackbox.travel import Packed, as_arrays, as_tensors, packed, unpacked
from ignite_tbptt.random_streams import RandomStreams

__all__ = [
    "ALONE",
    "EvaluationCount",
    "Executor",
    "Result",
    "SerialEvaluation",
    "StackedEvaluation",
    "Task",
    "is_on_stack",
    "require_executor",
    "run",
    "size_of",
]


class _Level(threading.local):
    """How many evaluations the code of a thread is inside of, those that other threads have asked it for included."""

    now = 0


_LEVEL = _Level()


class _Alone:
    """Held by whoever evaluates, since random streams belong to the process and not to a thread.

    There is a lock for each level: a blackbox inside of an evaluation on a worker must not wait for the round that
    waits for it.
    """

    def __init__(self) -> None:
        self._locks: dict[int, Any] = {0: threading.RLock()}
        # what holds a lock from one hook to the next, by level: the thread, and the frame that calls both
        self._calls: dict[int, list[tuple[int, FrameType]]] = {}
        self._looking = threading.Lock()

    def __enter__(self) -> None:
        level = _LEVEL.now
        lock = self._locks.get(level) or self._locks.setdefault(level, threading.RLock())
        if not lock.acquire(False):  # a time-out is looked at by the lock even where it is free
            while not lock.acquire(timeout=_PATIENCE):
                lock = self._instead_of(lock, level)

    def __exit__(self, *error: object) -> None:
        self._locks[_LEVEL.now].release()

    def _instead_of(self, lock: Any, level: int) -> Any:
        """The lock, or a new one where whoever holds it has left without a word."""
        with self._looking:
            calls = self._calls.get(level, ())
            if self._locks[level] is lock and calls and not any(_is_running(*call) for call in calls):
                self._locks[level], self._calls[level] = threading.RLock(), []
            return self._locks[level]

    def begin(self, frame: FrameType) -> None:
        """Hold it until `end`, or until the frame is left without one: torch calls no hook after Ctrl-C."""
        self.__enter__()
        calls, thread = self._calls.setdefault(_LEVEL.now, []), threading.get_ident()
        while calls and calls[-1][0] == thread and not is_on_stack(calls[-1][1], sys._getframe()):
            self.end()
        calls.append((thread, frame))

    def end(self) -> None:
        """Hold it no more."""
        calls = self._calls[_LEVEL.now]
        if calls and calls[-1][0] == threading.get_ident():
            calls.pop()
            self.__exit__()


# So many seconds somebody waits before looking whether the one who is waited for is still there.
_PATIENCE = 1.0


def _is_running(thread: int, call: FrameType) -> bool:
    """Whether a thread is inside of a call, or of a blackbox."""
    stack = sys._current_frames().get(thread)
    return is_on_stack(call, stack) or is_on_stack(None, stack)


def is_on_stack(call: FrameType | None, stack: FrameType | None) -> bool:
    """Whether a call, or one of this package where None is given, is among those that a stack consists of."""
    while stack is not None:
        if stack is call or (call is None and stack.f_code.co_filename.startswith(_HERE)):
            return True
        stack = stack.f_back
    return False


_HERE = os.path.dirname(__file__) + os.sep


ALONE = _Alone()


@dataclass(eq=False)  # frozen ones take four times as long to make
class Task:
    """One evaluation.

    Attributes:
        program: the function of a flat list of tensors.
        points: these tensors, which it may keep and change.
        streams: the random streams to draw from, None where it draws no numbers.
        first: whether it is the call itself, in which modules are the caller's own.
        elsewhere: whether it was sent to another process, whose own random streams nobody watches.
        level: how many evaluations it is inside of, itself included.
    """

    program: FlatCall
    points: list[Tensor]
    streams: RandomStreams | None = None
    first: bool = False
    elsewhere: bool = False
    level: int = field(default_factory=lambda: _LEVEL.now + 1)

    def __reduce__(self) -> Any:
        return _arrived, (packed(self.program), pickle.dumps((as_arrays(self.points), self.streams, self.first)))


def _arrived(program: Packed, rest: bytes) -> Task:
    points, streams, first = pickle.loads(rest)
    return Task(unpacked(program), as_tensors(points), streams, first, elsewhere=True)


@dataclass(eq=False)
class Result:
    """What came out of a task.

    Attributes:
        outputs: the numbers, None where the function raised.
        error: what it raised.
        seconds: how long it took.
        drew: whether it drew random numbers in another process; None in this one, where the streams tell.
        lost: whether it is given up, and counts as NaN in every output instead of raising; where there are outputs,
            some rows of them are.
        calls: of the function, several where its rows were evaluated one by one.
        part: what of the task raised, for a message.
    """

    outputs: Outputs | None
    error: Exception | None
    seconds: float
    drew: bool | None = None
    lost: bool = False
    calls: int = 1
    part: str = ""

    def __reduce__(self) -> Any:
        outputs, tensors = None, None
        if self.outputs is not None:
            outputs, tensors = replace(self.outputs, tensors=[]), as_arrays(self.outputs.tensors)
        rest = (self.seconds, self.drew, self.lost, self.calls, self.part)
        try:
            data = pickle.dumps((tensors, outputs, self.error, *rest))
            if self.error is not None:
                pickle.loads(data)  # where this fails in the process of a pool, the pool breaks
        except Exception as error:  # whatever the __reduce__ of an object of the user's raises
            if self.error is not None:
                told: Exception = RuntimeError(f"{type(self.error).__name__}: {self.error}")
            else:
                told = TypeError(f"its outputs cannot be sent back ({error}): return tensors, arrays and numbers")
            data = pickle.dumps((None, None, told, *rest))
        return _came_back, (data,)

    def drew_since(self, streams: RandomStreams) -> bool:
        """Whether it drew from streams that were asked for before.

        What moves those of this process meanwhile, the client of a cluster say, does not count for another process.
        """
        return streams.have_moved() if self.drew is None else self.drew


def _came_back(data: bytes) -> Result:
    tensors, outputs, *rest = pickle.loads(data)
    return Result(None if outputs is None else replace(outputs, tensors=as_tensors(tensors)), *rest)


def run(task: Task) -> Result:
    """Evaluate; an exception is part of the result."""
    if task.elsewhere and task.streams is None:
        return _watched(replace(task, elsewhere=False))
    start = time.perf_counter()
    outside, _LEVEL.now = _LEVEL.now, task.level
    try:
        with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
            if task.streams is None:
                value = _evaluated(task)
            else:
                with ALONE:
                    task.streams.restore()
                    value = _evaluated(task)
    except Exception as error:
        return Result(None, error, time.perf_counter() - start)
    finally:
        _LEVEL.now = outside
    seconds = time.perf_counter() - start
    try:
        return Result(Outputs.of(value, task.program.label), None, seconds)
    except TypeError as error:
        return Result(None, error, seconds)


def _watched(task: Task) -> Result:
    """Evaluate in the process of a pool, and see whether random numbers are drawn."""
    points = [point.clone() for point in task.points]
    streams = RandomStreams.latest()
    result = run(task)
    if not streams.have_moved():
        return replace(result, drew=False)
    if replace(streams, python=random.getstate()).have_moved():
        return replace(result, drew=True)
    # Python's alone: by another thread maybe, as Dask has in its workers
    times = _INNOCENT.get(task.program, 0) + 1
    drew = not times & (times - 1) and _draws(replace(task, points=points), result)
    _INNOCENT[task.program] = 0 if drew else times
    return replace(result, drew=drew)


# How often numbers were drawn during an evaluation of a program that draws none itself.
_INNOCENT: weakref.WeakKeyDictionary[FlatCall, int] = weakref.WeakKeyDictionary()


def _draws(task: Task, first: Result) -> bool:
    """Whether it draws again when evaluated again, and gives other outputs."""
    for _ in range(4):
        streams = RandomStreams.latest()
        again = run(replace(task, points=[point.clone() for point in task.points]))
        if not streams.have_moved():
            return False
        if first.outputs is None or again.outputs is None or same_kind(first.outputs, again.outputs):
            return True
        if not all(map(same_bits, first.outputs.tensors, again.outputs.tensors)):
            return True
    return False


def _evaluated(task: Task) -> Any:
    program = task.program.first_time if task.first else task.program
    try:
        return program(*task.points)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    # it differentiates something inside, with respect to what it was given
    if task.streams is not None:
        task.streams.restore()
    with torch.enable_grad():
        return program(*[p.requires_grad_() if p.is_floating_point() else p for p in task.points])


class Executor(Protocol):
    """Runs tasks; called as the builtin ``map`` is."""

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterable[Result]:
        """Return ``function(task)`` for each task, in the order of the tasks."""
        ...


@dataclass(frozen=True)
class SerialEvaluation:
    """One point a call.

    Args:
        chunk_bytes: points are made together up to this size, which should fit into the cache.
        executor: where the calls run; one after the other in the caller's thread by default.

    Raises:
        TypeError: an executor that is none.
        ValueError: a size below 1.
    """

    chunk_bytes: int = 2**20
    executor: Executor | Pool = map

    def __post_init__(self) -> None:
        _check_bytes("chunk_bytes", self.chunk_bytes)
        require_executor(self.executor)

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterable[Result]:
        """See `Executor`."""
        return self.executor(function, tasks)  # type: ignore[operator]  # options make one of a pool


@dataclass(frozen=True)
class StackedEvaluation:
    """Several points in one call, along the batch axis: for functions of independent rows, declared with in_dims.

    Evaluated one after the other are points that move an argument shared by all rows, points so large that fewer than 4
    make a stack, and a blackbox that draws random numbers, because stacked rows could not share them.

    Args:
        stack_bytes: a stack is no larger than this in inputs or in outputs. Past the size of the cache stacking loses
            more than it gains.
        executor: where the calls run; one after the other in the caller's thread by default.
        required: refuse a function that cannot be stacked; False evaluates one point a call then.

    Raises:
        TypeError: an executor that is none.
        ValueError: a size below 1; when used, that no in_dims were declared.
    """

    stack_bytes: int = 2**19
    executor: Executor | Pool = map
    required: bool = True

    def __post_init__(self) -> None:
        _check_bytes("stack_bytes", self.stack_bytes)
        require_executor(self.executor)

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterable[Result]:
        """See `Executor`."""
        return self.executor(function, tasks)  # type: ignore[operator]  # options make one of a pool


@dataclass
class EvaluationCount:
    """What a blackbox has cost so far.

    Attributes:
        nfev: points evaluated for gradients; the forward call is not one of them.
        calls: calls of the function for these: fewer than `nfev` where points are stacked, more where rows are
            evaluated one by one.
        probes: evaluations that verified something, or looked for a better step.
        seconds: time spent inside the function in all of these.
        wall_seconds: time that gradients have cost in all.
        gradients: gradients estimated.
        hint: how the same gradients could cost less, found at the first one; empty where nothing is known.
    """

    nfev: int = 0
    calls: int = 0
    probes: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0
    gradients: int = 0
    hint: str = ""
    _here: int = field(default=0, repr=False, compare=False)  # evaluations in this process
    _drew: int = field(default=0, repr=False, compare=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def drawn(self) -> tuple[int, int]:
        """How many evaluations were made in this process, and how many drew random numbers in another one."""
        return self._here, self._drew

    def drew_since(self, drawn: tuple[int, int], streams: RandomStreams) -> bool:
        """Whether evaluations drew random numbers since; see `Result.drew_since`."""
        return self._drew > drawn[1] or (self._here > drawn[0] and streams.have_moved())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def taken(self, result: Result, label: str, where: Callable[[], str], copies: int, probe: bool) -> Outputs:
        """Count a result and give what came out.

        Raises:
            LostEvaluationError: it is given up.
            BlackboxError: the function raised.
        """
        with self._lock:
            if result.drew is None:
                self._here += 1
            elif result.drew:
                self._drew += 1
            self.seconds += result.seconds
            if probe:
                self.probes += 1
            else:
                self.nfev += copies
                self.calls += result.calls
        if result.outputs is not None and not (probe and result.lost):
            return result.outputs
        error = result.error
        kind = LostEvaluationError if result.lost else BlackboxError
        raise kind(
            f"{label} raised {type(error).__name__}: {error}\n"
            f"in evaluation {self.nfev + self.probes}, {result.part}{where()}. If it cannot bear such a move, choose a "
            "smaller step, or BoundedStep to keep x inside its domain"
        ) from error


def runs_elsewhere(executor: Any) -> bool:
    """Whether an executor may run calls at the same time, and not in the caller's thread alone."""
    return _innermost(executor) is not map


def alike_on_all_ranks(executor: Any) -> bool:
    """Whether all ranks have to ask an executor for the same evaluations."""
    return getattr(_innermost(executor), "alike_on_all_ranks", False)


def begins_ahead(executor: Any) -> Literal["", "here", "elsewhere"]:
    """Whether evaluations are to begin when a call is made, and whether in this process."""
    asked = False
    while executor is not None:
        pool, asked = executor, asked or getattr(executor, "ahead", False)
        executor = getattr(executor, "executor", None)
    return ("here" if isinstance(pool, ThreadPoolExecutor) else "elsewhere") if asked else ""


def _innermost(executor: Any) -> Any:
    """Where calls run, below what packs, counts or takes rows apart."""
    while (inside := getattr(executor, "executor", None)) is not None:
        executor = inside
    return executor


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def require_executor(executor: Any) -> None:
    """Refuse what runs no tasks.

    Raises:
        TypeError: it is neither a pool nor called as ``map`` is.
    """
    runs = callable(executor) or hasattr(executor, "submit")
    if not runs or (isinstance(executor, type) and executor is not map):
        raise TypeError(
            f"executor must be called as map(function, tasks) is, got {executor!r}: give a pool, "
            "ThreadPoolExecutor(4) say, or make one by calling it, SerialEvaluation() say"
        )


def _check_bytes(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}: a portion holds at least one point")
