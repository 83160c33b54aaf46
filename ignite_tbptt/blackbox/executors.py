"""Evaluations on the workers of a pool: threads, processes, or whatever has the protocol of ``concurrent.futures``.

The pool is borrowed: it is never shut down here. Results come in the order of the tasks, and are bit for bit those of
the caller's thread. Evaluations that are short go out several at a time. What a pool may do besides returning a result,
taking too long, losing a worker or refusing a task, becomes the error of the evaluation that it happened to. Pairs with
`task`, whose tasks may be run twice without harm.
"""

from __future__ import annotations

import functools
import itertools
import math
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from ignite_tbptt.blackbox.errors import UntrustedGradientWarning
from ignite_tbptt.blackbox.task import Result, Task, size_of
from ignite_tbptt.blackbox.travel import AbsentProgramError, packed
from ignite_tbptt.warn import warn

__all__ = ["Pool", "Workers"]

Pool = Executor
"""``concurrent.futures.Executor``, which is no `Executor` of this package by itself."""

# A group of evaluations is to last so many seconds: the cost of sending one is less than a tenth of it. It has no more
# of them than this.
_GROUP_SECONDS, _LARGEST_GROUP = 0.01, 1024

# To send one to a cluster takes milliseconds on both ends: a group lasts up to so long there, as long as
# a round makes so many groups.
_CLUSTER_SECONDS, _CLUSTER_GROUPS = 0.1, 8

# So many measured evaluations count in the next round; the first group of it has at most twice as many.
_KEPT_PACE = 32

# What is handed over ahead of the result that is awaited: enough for any pool, and little memory. An evaluation counts
# as one more for each MiB of its point.
_EVALUATIONS_AHEAD, _GROUPS_AHEAD, _MIB = 256, 16, 2**20

# A program of more bytes is sent to a worker that has it by its name alone.
_LARGE_PROGRAM = 2**14


@dataclass(frozen=True, eq=False)
class Workers:
    """A pool of ``concurrent.futures`` as an executor of evaluations.

    Example:
        >>> import torch
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from ignite_tbptt.blackbox import blackbox
        >>> with ThreadPoolExecutor(4) as pool:
        ...     f = blackbox(torch.sin, executor=Workers(pool, timeout=60, retries=1))
        ...     x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        ...     f(x).sum().backward()
        >>> torch.allclose(x.grad, torch.ones(3, dtype=torch.float64))
        True

    ``executor=pool`` alone is ``Workers(pool)``. To processes the function has to be sent: it must be defined at the
    top level of a module, or cloudpickle be installed. The forward call itself is made where the model runs.

    Evaluations that take less than 10 ms, as measured on those before, are handed to a worker several at a time; less
    than 100 ms on a pool that is none of Python's own, a cluster say, where a round has enough of them for 8 groups.
    A worker reads the function once.

    With ``ahead=True`` the first gradient of a blackbox is taken as without, since it verifies what the later ones rely
    on; so is every gradient along random directions, which may depend on the one before. Where random numbers are drawn
    between a call and its backward, by dropout say, threads gain nothing: whether it was the function that drew them
    cannot be told, so its evaluations are made again, and a warning says so. Processes and clusters do not mind. Under
    torch.func and torch.vmap evaluations begin at the backward.

    Args:
        executor: a ThreadPoolExecutor, a ProcessPoolExecutor, Dask's ``client.get_executor()``, or another whose
            ``submit(function, *arguments)`` returns a ``concurrent.futures.Future``.
        timeout: seconds that an evaluation may take. A thread that takes longer cannot be stopped: its worker is lost
            to the pool until it returns.
        retries: how often an evaluation that raised, took too long or lost its worker is tried again. Random numbers
            from the global streams are the same then.
        failed: what becomes of an evaluation that fails for good: ``"raise"`` ends the gradient with its error;
            ``"nan"`` counts it as NaN in every output, with a warning, so that the slope is taken by the best formula
            on the points that are left.
        ahead: begin with the evaluations of a call as soon as the call is made, while the forward pass goes on, instead
            of at its backward. Calls whose gradient is never asked for cost what was begun by then.

    Raises:
        TypeError: executor has no ``submit``.
        ValueError: a time-out that is not positive, retries below 0, or something else for failed or ahead.
    """

    executor: Executor
    timeout: float | None = None
    retries: int = 0
    failed: Literal["raise", "nan"] = "raise"
    ahead: bool = False
    _left: dict[bytes, int] = field(default_factory=dict, init=False, repr=False)
    """How many workers are still to be sent a large program, by its name."""
    _pace: dict[str, _Pace] = field(default_factory=dict, init=False, repr=False)
    """What was measured in earlier rounds, by the name of the function."""

    def __post_init__(self) -> None:
        if isinstance(self.executor, type) or not hasattr(self.executor, "submit"):
            raise TypeError(
                f"executor must be a pool with a method submit, such as ThreadPoolExecutor(16), got {self.executor!r}"
            )
        if self.timeout is not None and not (isinstance(self.timeout, (int, float)) and self.timeout > 0):
            raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout!r}: None waits for ever")
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise ValueError(f"retries must be a whole number, 0 or more, got {self.retries!r}")
        if not isinstance(self.ahead, bool):
            raise ValueError(
                f"ahead must be True, so that evaluations begin while the forward pass goes on, or False, got "
                f"{self.ahead!r}"
            )
        if self.failed not in ("raise", "nan"):
            raise ValueError(
                f"failed must be 'raise', which ends the gradient, or 'nan', which goes on without the evaluation, got "
                f"{self.failed!r}"
            )

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterator[Result]:
        """See `Executor`."""
        tasks = iter(tasks)
        first = list(itertools.islice(tasks, 1))
        if not first:
            return iter(())
        results = _Round(self, function, first[0].program.label).results(itertools.chain(first, tasks))
        next(results)  # until the first evaluations are handed over
        return results

    @property
    def _is_cluster(self) -> bool:
        """Whether the pool may be one, and is none of Python's own, whose workers are on this machine."""
        return not isinstance(self.executor, (ThreadPoolExecutor, ProcessPoolExecutor))


class _Pace(NamedTuple):
    """What is known of the evaluations of a function.

    Attributes:
        measured: how many were measured.
        seconds: how long these took together.
        total: how many there are in a round: small ones, which verify something, count little.
    """

    measured: int = 0
    seconds: float = 0.0
    total: int = 0


@dataclass(frozen=True, eq=False)
class _Group:
    """Evaluations that a worker is given at once."""

    tasks: list[Task]
    future: Future[Any]
    refused: bool = False

    @functools.cached_property
    def weight(self) -> int:
        """What it counts as of all that is handed over ahead."""
        return sum(1 + size_of(task.points) // _MIB for task in self.tasks)


class _Round:
    """One call of `Workers`."""

    def __init__(self, workers: Workers, function: Callable[[Task], Result], label: str) -> None:
        self._workers, self._function, self._label = workers, function, label
        self._waiting: deque[_Group] = deque()
        self._count, self._seconds, self._before = workers._pace.get(label, _Pace())
        self._submissions = itertools.count()

    def results(self, tasks: Iterator[Task]) -> Iterator[Any]:
        """The results in order, after a first nothing, by which time work has begun."""
        total, lost = 0, []
        try:
            self._hand_over(tasks)
            yield None
            while self._waiting:
                for result in self._finished(self._waiting.popleft()):
                    total += 1
                    if result.lost:
                        lost.append(result.error)
                    yield result
                self._hand_over(tasks)
        finally:  # an error ends the round: what has not begun is not to be paid for
            for group in self._waiting:
                group.future.cancel()
            kept = min(self._count, _KEPT_PACE)
            if kept:
                usual = max(total, self._before - self._before // 8)
                self._workers._pace[self._label] = _Pace(kept, self._seconds * kept / self._count, usual)
        if lost:
            warn(
                f"{len(lost)} of {total} evaluations were lost and count as NaN, the last by "
                f"{type(lost[-1]).__name__}: {lost[-1]}",
                UntrustedGradientWarning,
            )

    def _hand_over(self, tasks: Iterator[Task]) -> None:
        ahead = sum(group.weight for group in self._waiting)
        while ahead < _EVALUATIONS_AHEAD or len(self._waiting) < _GROUPS_AHEAD:
            group = list(itertools.islice(tasks, self._size()))
            if not group:
                return
            self._waiting.append(self._submitted(group))
            ahead += self._waiting[-1].weight

    def _size(self) -> int:
        """How many evaluations are worth a worker's while, as far as is known; at first one."""
        if not self._count:
            return 1
        size = self._lasting(_GROUP_SECONDS)
        if self._workers._is_cluster:
            size = max(size, min(self._lasting(_CLUSTER_SECONDS), self._before // _CLUSTER_GROUPS))
        return max(1, min(size, 2 * self._count, _LARGEST_GROUP))

    def _lasting(self, seconds: float) -> int:
        if self._workers.timeout is not None:
            seconds = min(seconds, self._workers.timeout / 4)
        return math.ceil(seconds * self._count / max(self._seconds, 1e-9))

    def _measure(self, future: Future[Any]) -> None:
        """Called by the pool when a group is done."""
        if not future.cancelled() and future.exception() is None:
            for result in future.result():
                if result.error is None:
                    self._seconds += result.seconds
                    self._count += 1

    def _submitted(self, tasks: list[Task], whole: bool = False) -> _Group:
        """Hand evaluations over, with the whole program even where the workers should have it."""
        workers = self._workers
        try:
            if isinstance(workers.executor, ThreadPoolExecutor):
                given = tasks
                if workers.retries or workers.timeout is not None:  # the function may change its points
                    given = [replace(task, points=[point.clone() for point in task.points]) for task in tasks]
                future = workers.executor.submit(_run_here, self._function, given)
            else:
                future = workers.executor.submit(_run_elsewhere, self._as_bytes(tasks, whole))
            if not isinstance(future, Future):
                raise TypeError(
                    f"submit of {type(workers.executor).__name__} returned no concurrent.futures.Future but "
                    f"{future!r}; of a Dask client give client.get_executor()"
                )
        except Exception as error:  # a pool that was shut down or is broken, and whatever pickling raises
            future = Future()
            future.set_exception(error)
            return _Group(tasks, future, refused=True)
        future.add_done_callback(self._measure)
        return _Group(tasks, future)

    def _as_bytes(self, tasks: list[Task], whole: bool) -> bytes:
        # The number keeps a pool that remembers results, as Dask does, from giving that of an earlier try.
        carried: set[bytes] = set()
        light = [self._light(task, carried, whole) for task in tasks]
        return pickle.dumps((next(self._submissions), id(self), self._function, light))

    def _light(self, task: Task, carried: set[bytes], whole: bool) -> Task:
        """A task with the name of its program alone where the worker should have it."""
        program, left = packed(task.program), self._workers._left
        if len(program.data or b"") <= _LARGE_PROGRAM:
            return task
        if program.name not in left:
            while len(left) >= 64:
                del left[next(iter(left))]
            left[program.name] = getattr(self._workers.executor, "_max_workers", 1)
        if program.name in carried or not (whole or left[program.name] > 0):
            return replace(task, program=program._replace(data=None))  # type: ignore[arg-type]  # it is only sent
        left[program.name] -= 1
        carried.add(program.name)
        return task

    def _finished(self, group: _Group, attempt: int = 0) -> list[Result]:
        """The results of a group; what failed in it is tried again, each evaluation by itself."""
        workers, size = self._workers, len(group.tasks)
        start = time.perf_counter()
        as_a_whole = None
        try:
            if workers.timeout is not None:
                self._wait(group.future, workers.timeout)
            results: list[Result] = list(group.future.result())
        except Exception as error:  # whatever a pool raises
            as_a_whole = _explained(error)
            results = [Result(None, as_a_whole, time.perf_counter() - start)] * size
        if any(isinstance(result.error, AbsentProgramError) for result in results):
            return self._finished(self._submitted(group.tasks, whole=True), attempt)
        # which of the evaluations it was that took too long, or killed the worker, is not known
        by_itself = as_a_whole is not None and size > 1
        failed = [k for k, result in enumerate(results) if result.error is not None]
        if by_itself or attempt < workers.retries:
            again = [self._submitted([group.tasks[k]]) for k in failed]
            for k, one in zip(failed, again, strict=True):
                (results[k],) = self._finished(one, attempt if by_itself else attempt + 1)
        elif workers.failed == "nan" and not group.refused:
            for k in failed:
                results[k] = replace(results[k], lost=True)
        return results

    def _wait(self, future: Future[Any], timeout: float) -> None:
        """Wait until a group is done; its time runs from when it, or another in its stead, last made progress."""
        others = [group.future for group in self._waiting]
        done, since = sum(other.done() for other in others), time.monotonic()
        while not future.done():
            wait_for([future], timeout=min(0.05, timeout / 4))
            if not future.running() and (now := sum(other.done() for other in others)) != done:
                done, since = now, time.monotonic()
            if not future.done() and time.monotonic() - since > timeout:
                future.cancel()
                where = "was not done" if future.running() else "was not begun, since all workers were busy,"
                raise TimeoutError(f"it {where} after {timeout:g} s; give a longer timeout, or more workers")


def _run_here(function: Callable[[Task], Result], tasks: list[Task]) -> list[Result]:
    return [function(task) for task in tasks]


def _run_elsewhere(data: bytes) -> list[Result]:
    _, _, function, tasks = pickle.loads(data)
    return [function(task) for task in tasks]


def _explained(error: Exception) -> Exception:
    """The same error of a pool, in words that say what to do where the pool's own do not."""
    text = str(error)
    if isinstance(error, BrokenExecutor):
        return type(error)(
            f"a worker of the pool died ({text}): it was killed, or ran out of memory. The pool cannot be used again; "
            "make a new one"
        )
    if isinstance(error, (pickle.PicklingError, AttributeError, ImportError)) or "pickle" in text:
        return TypeError(
            f"it cannot be sent to another process ({text}): define the function, and the classes of its arguments, at "
            "the top level of a module, or use threads"
        )
    if "after shutdown" in text:
        return RuntimeError(f"{text}: the pool was shut down; keep it open as long as gradients are taken")
    return error
