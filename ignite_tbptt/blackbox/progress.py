"""A bar of evaluations, for gradients that take long.

The idea: an executor around another one counts the results that pass, and is told when a gradient begins and ends. Most
gradients are done before anybody would look; only where one takes longer than two seconds there is a bar. Pairs with
every executor.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ignite_tbptt.blackbox.task import Executor, Result, Task

__all__ = ["Progress"]

_PATIENCE = 2.0


class Progress:
    """An executor that shows how many evaluations of a gradient are done, and how many a second.

    Args:
        executor: where they run.

    Raises:
        ModuleNotFoundError: tqdm is not installed; the extra ``progress`` brings it.
    """

    def __init__(self, executor: Executor) -> None:
        try:
            importlib.import_module("tqdm.auto")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "progress=True draws with tqdm, which is not installed: pip install 'ignite-tbptt[progress]'."
            ) from error
        self.executor = executor
        self._start: float | None = None
        self._count = 0
        self._bar: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_start": None, "_bar": None}

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterator[Result]:
        """See `Executor`."""
        label = ""

        def named() -> Iterator[Task]:
            nonlocal label
            for task in tasks:
                label = task.program.label
                yield task

        def counted(results: Iterable[Result]) -> Iterator[Result]:
            for result in results:
                self._advance(result.calls, label)
                yield result

        return counted(self.executor(function, named()))

    def _advance(self, calls: int, label: str) -> None:
        self._count += calls
        if self._bar is not None:
            self._bar.update(calls)
        elif self._start is not None and time.monotonic() - self._start > _PATIENCE:
            # Nothing is shown where the error stream is no terminal, as in a log file.
            self._bar = importlib.import_module("tqdm.auto").tqdm(
                desc=f"gradient of {label}", unit=" evaluations", initial=self._count, leave=False, disable=None
            )
            self._bar.start_t -= time.monotonic() - self._start

    def __enter__(self) -> None:
        """A gradient begins."""
        self._start, self._count = time.monotonic(), 0

    def __exit__(self, *error: object) -> None:
        """It ends, by an exception maybe."""
        self._start = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None
