"""One evaluation of a blackbox, where evaluations run, and what they cost.

The idea: an evaluation is a `Task`, a function and a point, which `run` turns into a `Result`; both can be pickled and
neither depends on anything else. An executor is anything that is called as the builtin ``map`` is, the ``map`` of a
pool of threads or processes say. How many points go into one call is apart from where calls run: `StackedEvaluation`
and `SerialEvaluation` say the one, and take an executor for the other. Pairs with every estimator.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor as Pool
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.flat import FlatCall, Outputs
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["EvaluationCount", "Executor", "Result", "SerialEvaluation", "StackedEvaluation", "Task", "run", "size_of"]

# The global random streams belong to one evaluation at a time.
_STREAMS = threading.RLock()


@dataclass(frozen=True, eq=False)
class Task:
    """One evaluation.

    Attributes:
        program: the function of a flat list of tensors.
        points: these tensors, which it may keep and change.
        streams: the random streams to draw from, None where it draws no numbers.
        first: whether it is the call itself, in which modules are the caller's own.
    """

    program: FlatCall
    points: list[Tensor]
    streams: RandomStreams | None = None
    first: bool = False


@dataclass(frozen=True, eq=False)
class Result:
    """What came out of a task.

    Attributes:
        outputs: the numbers, None where the function raised.
        error: what it raised.
        seconds: how long it took.
    """

    outputs: Outputs | None
    error: Exception | None
    seconds: float


def run(task: Task) -> Result:
    """Evaluate; an exception is part of the result."""
    start = time.perf_counter()
    try:
        with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
            if task.streams is None:
                value = _evaluated(task)
            else:
                with _STREAMS:
                    task.streams.restore()
                    value = _evaluated(task)
    except Exception as error:
        return Result(None, error, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    try:
        return Result(Outputs.of(value, task.program.label), None, seconds)
    except TypeError as error:
        return Result(None, error, seconds)


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
        ValueError: a size below 1.
    """

    chunk_bytes: int = 2**20
    executor: Executor | Pool = map

    def __post_init__(self) -> None:
        _check_bytes("chunk_bytes", self.chunk_bytes)

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
        ValueError: a size below 1; when used, that no in_dims were declared.
    """

    stack_bytes: int = 2**19
    executor: Executor | Pool = map
    required: bool = True

    def __post_init__(self) -> None:
        _check_bytes("stack_bytes", self.stack_bytes)

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterable[Result]:
        """See `Executor`."""
        return self.executor(function, tasks)  # type: ignore[operator]  # options make one of a pool


@dataclass
class EvaluationCount:
    """What a blackbox has cost so far.

    Attributes:
        nfev: points evaluated for gradients; the forward call is not one of them.
        calls: calls of the function for these: fewer than `nfev` where points are stacked.
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
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def taken(self, result: Result, label: str, where: Callable[[], str], copies: int, probe: bool) -> Outputs:
        """Count a result and give what came out.

        Raises:
            BlackboxError: the function raised.
        """
        with self._lock:
            self.seconds += result.seconds
            if probe:
                self.probes += 1
            else:
                self.nfev += copies
                self.calls += 1
        if result.outputs is not None:
            return result.outputs
        error = result.error
        raise BlackboxError(
            f"{label} raised {type(error).__name__}: {error}\n"
            f"in evaluation {self.nfev + self.probes}, {where()}. If it cannot bear such a move, choose a smaller "
            "step, or BoundedStep to keep x inside its domain"
        ) from error


def runs_elsewhere(executor: Any) -> bool:
    """Whether an executor may run calls at the same time, and not in the caller's thread alone."""
    if isinstance(executor, (SerialEvaluation, StackedEvaluation)):
        executor = executor.executor
    return executor is not map


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_bytes(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}: a portion holds at least one point")
