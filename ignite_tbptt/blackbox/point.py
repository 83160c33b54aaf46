"""Evaluations of a blackbox at the points of some moves.

The idea: a `Point` is where moves start from, x of one forward call, or of several calls that are one function, with
their rows under one another. The points of its moves become tasks, one after the other or several stacked along the
rows, and what an executor makes of these comes back in the order of the moves. Pairs with every executor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ignite_tbptt.blackbox.block import Block, Group, groups_of
from ignite_tbptt.blackbox.errors import BlackboxError, LostEvaluationError
from ignite_tbptt.blackbox.flat import FlatCall, Outputs, same_kind
from ignite_tbptt.blackbox.moves import Moves
from ignite_tbptt.blackbox.record import Record
from ignite_tbptt.blackbox.step_size import steps_around
from ignite_tbptt.blackbox.task import SerialEvaluation, StackedEvaluation, Task, run, size_of

__all__ = ["Evaluations", "Job", "Point", "checked", "evaluate_all", "evaluate_at", "jobs_of", "key_of"]

# Slopes are taken of so many evaluations at a time as leave outputs of this size, or of fewer.
_PORTION_BYTES, _MOST_AT_A_TIME = 2**20, 4096

# Of fewer points in one call little is gained, and what a function keeps between its own steps leaves the cache.
_WORTH_STACKING = 4


class Point:
    """x of one record, or of several whose rows are independent.

    Attributes:
        x: all tensors in the precision of the evaluations.
        first: what came out there.
        floats: which outputs can be differentiated.
        values: these outputs at x.
        eps: relative precision, the coarser of x and f(x).
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records, self.record = records, records[0]
        record = self.record
        self.flat: FlatCall = record.flat
        tensors = record.tensors
        if len(records) > 1:
            tensors = [
                x if dim is None else torch.cat([each.tensors[k] for each in records], dim)
                for k, (x, dim) in enumerate(zip(tensors, self.flat.in_dims or (), strict=True))
            ]
        self.x = record.points(tensors)
        for each in records:
            if each.first is None:
                each.first = self._at_x(each, each.points(each.tensors))
        assert record.first is not None
        self.first: Outputs = record.first
        self.floats = [k for k, t in enumerate(self.first.tensors) if t.is_floating_point() and t.numel()]
        self.values = [self.first.tensors[k] for k in self.floats]
        self.out_dims = [record.out_dims[k] for k in self.floats] if record.out_dims is not None else None
        if len(records) > 1:
            firsts = [each.first.tensors for each in records if each.first is not None]
            self.values = [
                torch.cat([first[k] for first in firsts], dim)
                for k, dim in zip(self.floats, self.out_dims or (), strict=True)
            ]
        x_types = {point.dtype for point in self.x if point.is_floating_point()}
        self.eps = max(torch.finfo(dtype).eps for dtype in x_types | {value.dtype for value in self.values})
        self.size = size_of(self.x)

    def sizes(self, k: int, scale: float = 1.0) -> Tensor:
        """The step of every element of an input; bounds hold for directions with entries up to the scale."""
        estimator, position = self.record.estimator, sum(self.record.needed[:k])
        return steps_around(estimator.step_size, self.x[k], estimator.stencil, self.eps, scale, position)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The tensors that need a gradient, those together that move together."""
        in_dims = self.flat.in_dims or [None] * len(self.x)
        kinds = tuple(
            (x.dtype, dim, x.numel() > 0) if need else None
            for x, dim, need in zip(self.x, in_dims, self.record.needed, strict=True)
        )
        return groups_of(kinds) if self.floats else ()

    def moves(self, group: Group) -> Iterator[Moves]:
        """The moves of a group, as many at a time as leave outputs of a bounded size."""
        record = self.record
        block = Block.of(
            [self.x[k] for k in group.members],
            group.dims,
            group.members,
            group.positions,
            _Names(self.flat.name),
            record.facts.memory(group.positions),
        )
        portion = max(1, min(_MOST_AT_A_TIME, _PORTION_BYTES // max(1, size_of(self.values))))
        return record.estimator.plan(block, self.eps, portion, record.draw)

    def _at_x(self, record: Record, x: list[Tensor]) -> Outputs:
        return evaluate_at(record, x, "at x itself")

    @property
    def stacks(self) -> bool:
        """Whether rows of several points may share a call."""
        record = self.record
        return record.facts.stackable.get(key_of(record), False) and not record.draws


class _Names(Sequence[str]):
    """Names of tensors, worked out when a message needs them."""

    def __init__(self, name: Callable[[int], str]) -> None:
        self._name = name

    def __getitem__(self, index: Any) -> Any:
        return self._name(index)

    def __len__(self) -> int:
        return 0


def key_of(record: Record) -> Any:
    """What facts about rows depend on."""
    return (record.flat.in_dims, record.flat.flags)


@dataclass(frozen=True, eq=False)
class Job:
    """Moves of a block of a point."""

    point: Point
    moves: Moves
    rows_move: bool

    def calls(self) -> Iterator[tuple[list[Tensor], Callable[[], str], int]]:
        """The arguments of every call, what it is called in messages, and how many points are in it."""
        point, moves = self.point, self.moves
        offsets = len(moves.stencil.evaluated)
        fitting = self._fitting(moves.count * offsets)
        chunk = fitting or max(1, getattr(point.record.options.executor, "chunk_bytes", 2**20) // max(1, point.size))
        if chunk < offsets:
            yield from self._one_by_one()
            return
        step = chunk // offsets
        for start in range(0, moves.count, step):
            stop = min(moves.count, start + step)
            moved = dict(
                zip(moves.block.members, moves.block.apart(moves.points(start, stop).flatten(0, 1)), strict=True)
            )
            if fitting:
                count = (stop - start) * offsets
                yield self._stack(moved, count), self._where(start * offsets, count), count
                continue
            for index in range((stop - start) * offsets):
                tensors = [
                    _own(moved[k][index], x.stride()) if k in moved else x.clone() for k, x in enumerate(point.x)
                ]
                yield tensors, self._where(start * offsets + index, 1), 1

    def _one_by_one(self) -> Iterator[tuple[list[Tensor], Callable[[], str], int]]:
        """Calls whose points are so large that they are made one at a time."""
        block, offsets = self.moves.block, len(self.moves.stencil.evaluated)
        for index in range(self.moves.count * offsets):
            moved = dict(zip(block.members, block.apart(self.moves.point(*divmod(index, offsets))), strict=True))
            tensors = [_own(moved.pop(k), x.stride()) if k in moved else x.clone() for k, x in enumerate(self.point.x)]
            yield tensors, self._where(index, 1), 1

    def _fitting(self, count: int) -> int:
        """How many points go into one call, 0 where they are evaluated one by one."""
        point = self.point
        executor = point.record.options.executor
        if isinstance(executor, SerialEvaluation) or not (self.rows_move and point.stacks):
            return 0
        stack_bytes = getattr(executor, "stack_bytes", StackedEvaluation.stack_bytes)
        size = max(point.size, size_of(point.values))
        fitting = int(min(count, stack_bytes // max(1, size)))
        return fitting if fitting >= min(count, _WORTH_STACKING) else 0

    def _stack(self, moved: dict[int, Tensor], count: int) -> list[Tensor]:
        return [
            x.clone() if dim is None else _stacked(moved[k] if k in moved else x.expand(count, *x.shape), dim)
            for k, (x, dim) in enumerate(zip(self.point.x, self.point.flat.in_dims or (), strict=True))
        ]

    def _where(self, index: int, count: int) -> Callable[[], str]:
        offsets = self.moves.stencil.evaluated

        def text() -> str:
            which = self.moves.describe(index // len(offsets), offsets[index % len(offsets)])
            return which if count == 1 else f"{count} points stacked, the first {which}"

        return text


class _Call(NamedTuple):
    """What a task is for.

    Attributes:
        job: it is one of this.
        where: gives what it is called in messages.
        copies: how many points are in it.
    """

    job: Job
    where: Callable[[], str]
    copies: int


def jobs_of(point: Point, group: Group) -> Iterator[Job]:
    """All that is to be evaluated for the slopes of a group."""
    return (Job(point, moves, group.rows_move) for moves in point.moves(group))


class Evaluations:
    """The calls of some jobs, in the hands of the executor; a pool has begun with them.

    Args:
        jobs: of one blackbox.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self._calls: list[_Call] = []
        self._results = jobs[0].point.record.options.executor(run, _tasks(jobs, self._calls)) if jobs else ()

    def values(self) -> list[list[Tensor]]:
        """Each differentiable output at all points of each job, (points, *shape); to be asked for once."""
        found: dict[Job, list[list[Tensor]]] = {job: [] for job in self.jobs}
        # held by the loop alone, so that an error ends the round here
        for number, result in enumerate(vars(self).pop("_results")):
            job, where, copies = self._calls[number]
            record, point = job.point.record, job.point
            try:
                outputs = record.count.taken(result, point.flat.label, where, copies * len(point.records), False)
            except LostEvaluationError:
                found[job].append([value.new_full((copies, *value.shape), torch.nan) for value in point.values])
                continue
            _check_kind(point, outputs, where, copies)
            tensors = [outputs.tensors[k] for k in point.floats]
            if copies > 1 and point.out_dims is not None:
                tensors = [_unstacked(tensor, dim, copies) for tensor, dim in zip(tensors, point.out_dims, strict=True)]
            else:
                tensors = [tensor.unsqueeze(0) for tensor in tensors]
            found[job].append(tensors)
        each = found.values()
        return [own[0] if len(own) == 1 else [torch.cat(same) for same in zip(*own, strict=True)] for own in each]


def _tasks(jobs: Sequence[Job], calls: list[_Call]) -> Iterator[Task]:
    for job in jobs:
        record = job.point.record
        streams = record.streams if record.draws else None
        for points, where, copies in job.calls():
            calls.append(_Call(job, where, copies))
            yield Task(record.flat, points, streams)


def evaluate_at(
    record: Record, points: list[Tensor], where: str, copies: int = 1, point: Point | None = None, probe: bool = True
) -> Outputs:
    """Evaluate one point, a probe say, in the place where all evaluations run."""
    streams = record.streams if record.draws else None
    (result,) = record.options.executor(run, [Task(record.flat, points, streams)])
    outputs = record.count.taken(result, record.flat.label, lambda: where, copies, probe)
    if point is not None:
        _check_kind(point, outputs, lambda: where, copies)
    return outputs


def evaluate_all(point: Point, places: Iterable[list[Tensor]], where: str) -> list[Outputs]:
    """Evaluate several points, which verify something, at the same time where that can be."""
    record = point.record
    streams = record.streams if record.draws else None
    results = record.options.executor(run, (Task(record.flat, tensors, streams) for tensors in places))
    found = [record.count.taken(result, record.flat.label, lambda: where, 1, True) for result in results]
    return [checked(point, outputs, where) for outputs in found]


def checked(point: Point, outputs: Outputs, where: str) -> Outputs:
    """Outputs that are of the kind of those at x.

    Raises:
        BlackboxError: they are not.
    """
    _check_kind(point, outputs, lambda: where, 1)
    return outputs


def _check_kind(point: Point, outputs: Outputs, where: Callable[[], str], copies: int) -> None:
    first = point.first
    if first.is_leaf and outputs.is_leaf and copies == 1:
        now, was = outputs.tensors[0], point.values[0]
        if now.shape == was.shape and now.dtype == was.dtype:
            return
    if len(point.records) > 1 or copies > 1:
        rows = Outputs(list(first.tensors), first.foreign, first.template, [])
        for k, value in zip(point.floats, point.values, strict=True):
            rows.tensors[k] = value
        first = rows
    difference = same_kind(first, outputs, copies, point.record.out_dims)
    if difference is None:
        return
    remedy = "return the same structure for every input"
    if copies > 1:
        remedy = f"it got {copies} batches in one; if it needs the size it was written for, use SerialEvaluation()"
    raise BlackboxError(
        f"{point.flat.label} returned {difference} when evaluated again ({where()}): differences of such outputs mean "
        f"nothing; {remedy}"
    )


def _own(moved: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A point in memory of its own, with the strides of x."""
    if moved.stride() == stride and moved.untyped_storage().nbytes() == moved.nbytes:
        return moved
    if moved.stride() == stride:
        return moved.clone()
    return torch.empty_strided(moved.shape, stride, dtype=moved.dtype, device=moved.device).copy_(moved)


def _stacked(tensor: Tensor, dim: int) -> Tensor:
    """(count, ..., B, ...) -> (..., count * B, ...), point after point, in memory of its own."""
    shape = list(tensor.shape[1:])
    shape[dim] *= len(tensor)
    stacked = tensor.movedim(0, dim).reshape(shape)
    whole = stacked.untyped_storage().nbytes() == stacked.nbytes
    return stacked if whole and stacked.data_ptr() != tensor.data_ptr() else stacked.clone()


def _unstacked(tensor: Tensor, dim: int, count: int) -> Tensor:
    """(..., count * B, ...) -> (count, ..., B, ...)."""
    apart: Tensor = tensor.unflatten(dim, (count, tensor.shape[dim] // count))
    return apart.movedim(dim, 0)
