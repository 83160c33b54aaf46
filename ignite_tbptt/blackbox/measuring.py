"""Steps of a blackbox measured with evaluations of its own, one element of each input at a time.

The idea: an element is moved alone, in all rows where these are independent, and the outputs are added up with random
weights; that is a function of one number, of which `noise` finds the noise and `measured_step` the step. What was found
is a fact of the blackbox, for the inputs that need a gradient. Pairs with `round`, which asks before it evaluates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ignite_tbptt.blackbox.block import rows_of
from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.measured_step import FoundStep, MeasuredStep, find_step, still_suits
from ignite_tbptt.blackbox.noise import noise_level
from ignite_tbptt.blackbox.point import Point, evaluate_at
from ignite_tbptt.blackbox.record import Record
from ignite_tbptt.blackbox.step_size import BoundedStep, PerInputStep, RelativeStep, StepSize

__all__ = ["Measurement", "measure_steps"]

# Of an input so many elements are tried, until one changes the outputs.
_ELEMENTS = 3


class Measurement(NamedTuple):
    """What was measured of an input.

    Attributes:
        column: which of its elements was moved, alone or in all rows.
        step: what was found.
        size: of x there, at least 1; the steps of other elements are in proportion to theirs.
    """

    column: int
    step: FoundStep
    size: float


def measure_steps(record: Record, again: bool) -> None:
    """Measure the steps of a record's inputs where its estimator has a `MeasuredStep`, and hold them as a fact.

    Args:
        record: the call.
        again: whether steps that are known are to be looked at again.
    """
    estimator, facts, key = record.asked, record.facts, record.inputs_key
    if facts.measures:
        estimator = replace(estimator, step_size=MeasuredStep(noise=facts.jump or None))
    if not asks_for_measuring(estimator.step_size) or (key in facts.step_sizes and not again):
        return
    point = Point([record])
    if not point.floats:
        return
    before = facts.measurements.get(key, {})
    found = {}
    positions = [k for k, need in enumerate(record.needed) if need]
    for position, k in enumerate(positions):
        step = _of_input(estimator.step_size, position)
        if isinstance(step, MeasuredStep) and point.x[k].numel():
            found[position] = _measured(point, k, position, step, before.get(position))
    steps = tuple(_resolved(estimator.step_size, position, found) for position in range(len(positions)))
    facts.step_sizes[key] = PerInputStep(steps)
    facts.measurements[key] = found


def asks_for_measuring(step_size: StepSize) -> bool:
    """Whether there is a `MeasuredStep` in a step size."""
    if isinstance(step_size, PerInputStep):
        return any(map(asks_for_measuring, step_size.step_sizes))
    return isinstance(step_size, MeasuredStep) or (
        isinstance(step_size, BoundedStep) and asks_for_measuring(step_size.step_size)
    )


def _of_input(step_size: StepSize, position: int) -> StepSize:
    while isinstance(step_size, (BoundedStep, PerInputStep)):
        step_size = step_size.step_size if isinstance(step_size, BoundedStep) else step_size.of(position)
    return step_size


def _resolved(step_size: StepSize, position: int, found: dict[int, Measurement]) -> StepSize:
    """A step size with what was found in the place of what was to be measured."""
    if isinstance(step_size, PerInputStep):
        return _resolved(step_size.of(position), position, found)
    if isinstance(step_size, BoundedStep):
        return replace(step_size, step_size=_resolved(step_size.step_size, position, found))
    if not isinstance(step_size, MeasuredStep):
        return step_size
    if position not in found:
        return RelativeStep()
    return RelativeStep(factor=found[position].step.h / found[position].size)


def _measured(point: Point, k: int, position: int, step: MeasuredStep, before: Measurement | None) -> Measurement:
    stencil = point.record.asked.stencil
    if before is not None:
        line = _Line(point, k, position, before.column)
        if still_suits(line, stencil, before.step):
            return before
    dim = None if point.flat.in_dims is None else point.flat.in_dims[k]
    columns = rows_of(tuple(point.x[k].shape), dim).split(point.x[k].detach())
    order = torch.randperm(columns.shape[1], generator=torch.Generator().manual_seed(position)).tolist()
    for column in order[:_ELEMENTS]:
        line = _Line(point, k, position, column)
        around = float(columns[:, column].abs().max())
        noise = step.noise * line.spread if step.noise else noise_level(line, around or 1.0, point.eps, 0.5)
        # what rounding does to values of this size where it happens not to show
        noise = max(noise, point.eps * line.size / 8, 1e-300)
        found = Measurement(column, find_step(line, stencil, noise, max(1.0, around)), max(1.0, around))
        if found.step.accepted:
            break
    return found


class _Line:
    """The weighted sum of the outputs when one column of an input moves; values are kept."""

    def __init__(self, point: Point, k: int, position: int, column: int) -> None:
        self._point, self._k, self._position, self._column = point, k, position, column
        self._layout = rows_of(tuple(point.x[k].shape), None if point.flat.in_dims is None else point.flat.in_dims[k])
        generator = torch.Generator().manual_seed(0)
        self._weights = [
            torch.rand(value.shape, generator=generator, dtype=torch.float64).add_(0.5) for value in point.values
        ]
        self.size = math.sqrt(sum(float(part.square().sum()) for part in self._parts(point.values)))
        self.spread = math.sqrt(sum(float(weight.square().sum()) for weight in self._weights))
        self._values: dict[float, float] = {0.0: self._sum(point.values)}

    def __call__(self, distance: float) -> float:
        if distance not in self._values:
            self._values[distance] = self._at(distance)
        return self._values[distance]

    def _at(self, distance: float) -> float:
        point, k = self._point, self._k
        points = [x.clone() for x in point.x]
        rows = self._layout.split(points[k]).clone()
        rows[:, self._column] += distance
        points[k] = self._layout.join(rows).contiguous()
        if not torch.equal(point.record.asked.step_size.inside(points[k], self._position), points[k]):
            return math.nan  # out of bounds
        try:
            found = evaluate_at(point.record, points, f"{point.flat.name(k)} moved, to measure a step", 1, point)
        except BlackboxError:
            return math.nan  # outside of the domain, as long steps may be
        return self._sum([found.tensors[n] for n in point.floats])

    def _parts(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [weight * value.double().cpu() for weight, value in zip(self._weights, values, strict=True)]

    def _sum(self, values: Sequence[Tensor]) -> float:
        return sum(float(part.sum()) for part in self._parts(values))
