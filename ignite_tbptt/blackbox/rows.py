"""Functions of one row: a batch is taken apart, each row is an evaluation, and what comes out is put together.

The idea: an external program or a simulator knows no batches. As an executor around another one, `Rows` makes of every
task one for each row, so that all that is built on batches stays as it is: a column that is moved in every row costs
one evaluation a row. Pairs with every executor that does not stack.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ignite_tbptt import nest
from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.flat import Outputs, same_kind
from ignite_tbptt.blackbox.task import Executor, Result, Task

__all__ = ["Rows"]


@dataclass(frozen=True, eq=False)
class Rows:
    """An executor that evaluates each row of a task by itself.

    Args:
        executor: where the rows are evaluated.
        out_dims: where they are in the outputs, as in `blackbox`.
    """

    executor: Executor
    out_dims: int | Sequence[int | None] | None

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterator[Result]:
        """See `Executor`."""
        batches: deque[tuple[Task, int]] = deque()

        def rows() -> Iterator[Task]:
            for task in tasks:
                count = _count(task)
                batches.append((task, count))
                for row in range(count):
                    # Several rows at a time on the caller's own modules would see one another's attributes.
                    yield replace(task, points=_row(task, row), first=task.first and self.executor is map)

        return self._batches(batches, iter(self.executor(function, rows())))

    def _batches(self, batches: deque[tuple[Task, int]], results: Iterator[Result]) -> Iterator[Result]:
        for first in results:
            task, count = batches.popleft()
            yield self._joined(task, [first, *(next(results) for _ in range(count - 1))])

    def _joined(self, task: Task, results: list[Result]) -> Result:
        seconds = sum(result.seconds for result in results)
        drew = any(result.drew for result in results) or (None if any(r.drew is None for r in results) else False)
        whole = Result(None, None, seconds, drew, calls=len(results))
        label = task.program.label
        if task.streams is not None:
            return replace(
                whole,
                error=ValueError(
                    "it draws random numbers, and rows that are evaluated one by one would all draw the same; pass the "
                    "numbers as an argument, or give a function of whole batches"
                ),
            )
        lost = False
        for row, result in enumerate(results):
            if result.error is not None:
                lost = result.lost and not task.first
                if not lost or all(other.lost for other in results):
                    return replace(whole, error=result.error, lost=lost, part=f"at row {row}, ")
        there = {row: result.outputs for row, result in enumerate(results) if result.outputs is not None}
        (first, kind), *others = there.items()
        for row, outputs in others:
            difference = same_kind(kind, outputs)
            if difference is None and not _same_besides(kind, outputs):
                difference = "other values beside its numbers"
            if difference is not None:
                error = BlackboxError(f"row {row} gave {difference}, compared with row {first}: return the same kind")
                return replace(whole, error=error)
        try:
            tensors = [
                torch.stack([there[r].tensors[k] if r in there else _nan_like(t) for r in range(len(results))], dim)
                for k, (t, dim) in enumerate(zip(kind.tensors, self._dims(kind, label), strict=True))
            ]
        except (ValueError, BlackboxError) as error:
            return replace(whole, error=error)
        return replace(whole, outputs=Outputs(tensors, kind.foreign, kind.template, kind.passed), lost=lost)

    def _dims(self, kind: Outputs, label: str) -> list[int]:
        given, count = self.out_dims, len(kind.tensors)
        dims = [given] * count if given is None or isinstance(given, int) else list(given)
        if len(dims) != count:
            raise ValueError(
                f"out_dims has {len(dims)} entries for {count} outputs of {label}; give an int, or one entry for each"
            )
        for k, (dim, tensor) in enumerate(zip(dims, kind.tensors, strict=True)):
            if dim is not None and not -tensor.dim() - 1 <= dim <= tensor.dim():
                raise ValueError(
                    f"out_dims puts the rows of {label} at axis {dim}, but output {k} of one row has the shape "
                    f"{tuple(tensor.shape)}; give an axis between 0 and {tensor.dim()}"
                )
        return [0 if dim is None else dim for dim in dims]


def _count(task: Task) -> int:
    dims = task.program.in_dims or ()
    rows = next(tensor.shape[dim] for tensor, dim in zip(task.points, dims, strict=True) if dim is not None)
    if not rows:
        raise ValueError(
            f"{task.program.label} was given a batch of no rows, and vectorized=False: what a row looks like is not "
            "known; leave such a batch out"
        )
    return rows


def _row(task: Task, row: int) -> list[Tensor]:
    dims = task.program.in_dims or ()
    return [
        (tensor if dim is None else tensor.select(dim, row)).clone()
        for tensor, dim in zip(task.points, dims, strict=True)
    ]


def _nan_like(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else torch.zeros_like(tensor)


def _same_besides(one: Outputs, other: Outputs) -> bool:
    """Whether what is no number is the same in both."""
    pairs = zip(nest.leaves(one.template), nest.leaves(other.template), strict=True)
    return all(type(a) is type(b) and (a is b or repr(a) == repr(b)) for (_, a), (_, b) in pairs)
