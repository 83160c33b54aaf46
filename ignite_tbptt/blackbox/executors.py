"""Evaluations on the workers of a pool: threads, processes, or whatever has the protocol of ``concurrent.futures``.

The pool is borrowed: it is never shut down here. Results come in the order of the tasks, and are bit for bit those of
the caller's thread. What a pool may do besides returning a result, taking too long, losing a worker or refusing a task,
becomes the error of the evaluation that it happened to. Pairs with `task`, whose tasks may be run twice without harm.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from typing import Any

from ignite_tbptt.blackbox.task import Result, Task
from ignite_tbptt.blackbox.travel import as_bytes, received, run_elsewhere

__all__ = ["Pool", "Workers"]

Pool = Executor
"""``concurrent.futures.Executor``, which is no `Executor` of this package by itself."""

# Tasks that are handed over ahead of the one whose result is awaited: enough for any pool, and little memory.
_AHEAD = 256


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
    top level of a module. The forward call itself is made where the model runs.

    Args:
        executor: a ThreadPoolExecutor, a ProcessPoolExecutor, or another with ``submit(function, task)``.
        timeout: seconds that an evaluation may take. A thread that takes longer cannot be stopped: its worker is lost
            to the pool until it returns.
        retries: how often an evaluation that raised, or took too long, is tried again. Random numbers from the global
            streams are the same then.

    Raises:
        TypeError: executor has no ``submit``.
        ValueError: a time-out that is not positive, or retries below 0.
    """

    executor: Executor
    timeout: float | None = None
    retries: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.executor, type) or not hasattr(self.executor, "submit"):
            raise TypeError(
                f"executor must be a pool with a method submit, such as ThreadPoolExecutor(16), got {self.executor!r}"
            )
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout!r}: None waits for ever")
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise ValueError(f"retries must be a whole number, 0 or more, got {self.retries!r}")

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterator[Result]:
        """See `Executor`."""
        waiting: deque[tuple[Task, Future[Any]]] = deque()
        try:
            for task in tasks:
                waiting.append((task, self._submitted(function, task)))
                if len(waiting) >= _AHEAD:
                    yield self._next(function, waiting)
            while waiting:
                yield self._next(function, waiting)
        finally:  # an error ends the round: what has not begun is not to be paid for
            for _, future in waiting:
                future.cancel()

    def _submitted(self, function: Callable[[Task], Result], task: Task) -> Future[Any]:
        try:
            if isinstance(self.executor, ThreadPoolExecutor):
                if self.retries:  # the function may change its points
                    task = replace(task, points=[point.clone() for point in task.points])
                return self.executor.submit(function, task)
            return self.executor.submit(run_elsewhere, *as_bytes(function, task))
        except Exception as error:  # a pool that was shut down or is broken, and whatever pickling raises
            refused: Future[Any] = Future()
            refused.set_exception(error)
            return refused

    def _next(self, function: Callable[[Task], Result], waiting: deque[tuple[Task, Future[Any]]]) -> Result:
        task, future = waiting.popleft()
        for attempt in range(self.retries + 1):
            result = self._result(future, [other for _, other in waiting])
            if result.error is None or attempt == self.retries or isinstance(result.error, BrokenExecutor):
                return result
            future = self._submitted(function, task)
        raise AssertionError("the loop returns")

    def _result(self, future: Future[Any], others: list[Future[Any]]) -> Result:
        start = time.perf_counter()
        try:
            if self.timeout is not None:
                self._wait(future, others, self.timeout)
            result = future.result()
            return result if isinstance(result, Result) else received(result)
        except Exception as error:
            return Result(None, _explained(error), time.perf_counter() - start)

    def _wait(self, future: Future[Any], others: list[Future[Any]], timeout: float) -> None:
        """Wait until an evaluation is done; its time runs from when it, or another in its stead, last made progress."""
        done, since = sum(other.done() for other in others), time.monotonic()
        while not future.done():
            wait_for([future], timeout=min(0.05, timeout / 4))
            if not future.running() and (now := sum(other.done() for other in others)) != done:
                done, since = now, time.monotonic()
            if not future.done() and time.monotonic() - since > timeout:
                future.cancel()
                where = "was not done" if future.running() else "was not begun, since all workers were busy,"
                raise TimeoutError(f"it {where} after {timeout:g} s; give a longer timeout, or more workers")


def _explained(error: Exception) -> Exception:
    """The same error, in words that say what to do where the pool's own do not."""
    text = str(error)
    if isinstance(error, BrokenExecutor):
        return type(error)(
            f"a worker of the pool died ({text}): it was killed, or ran out of memory. The pool cannot be used again; "
            "make a new one"
        )
    if isinstance(error, pickle.PicklingError) or "pickle" in text:
        return TypeError(
            f"it cannot be sent to another process ({text}): define the function, and the classes of its arguments, at "
            "the top level of a module, or use threads"
        )
    if "after shutdown" in text:
        return RuntimeError(f"{text}: the pool was shut down; keep it open as long as gradients are taken")
    return error
