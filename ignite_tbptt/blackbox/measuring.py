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

from ignite_tbptt.blackbox.along import Along
from ignite_tbptt.blackbox.block import rows_of
from ignite_tbptt.blackbox.measured_step import FoundStep, MeasuredStep, find_step, still_suits
from ignite_tbptt.blackbox.noise import noise_level
from ignite_tbptt.blackbox.point import Point
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
        line = _Line(point, k, before.column)
        if still_suits(line.at, stencil, before.step):
            return before
    dim = None if point.flat.in_dims is None else point.flat.in_dims[k]
    columns = rows_of(tuple(point.x[k].shape), dim).split(point.x[k].detach())
    order = torch.randperm(columns.shape[1], generator=torch.Generator().manual_seed(position)).tolist()
    for column in order[:_ELEMENTS]:
        line = _Line(point, k, column)
        around = float(columns[:, column].abs().max())
        noise = step.noise * line.spread if step.noise else noise_level(line.at, around or 1.0, point.eps, 0.5)
        # what rounding does to values of this size where it happens not to show
        noise = max(noise, point.eps * line.size / 8, 1e-300)
        found = Measurement(column, find_step(line.at, stencil, noise, max(1.0, around)), max(1.0, around))
        if found.step.accepted:
            break
    return found


class _Line(Along):
    """The outputs with random weights when one column of an input moves, in all rows."""

    def __init__(self, point: Point, k: int, column: int) -> None:
        dim = None if point.flat.in_dims is None else point.flat.in_dims[k]
        layout = rows_of(tuple(point.x[k].shape), dim)
        moves = layout.split(torch.zeros_like(point.x[k], dtype=torch.bool)).clone()
        moves[:, column] = True
        generator = torch.Generator().manual_seed(0)
        weights = [torch.rand(y.shape, generator=generator, dtype=torch.float64).add_(0.5) for y in point.values]

        def parts(outputs: Sequence[Tensor]) -> list[Tensor]:
            return [w * outputs[n].double().cpu() for w, n in zip(weights, point.floats, strict=True)]

        def weigh(outputs: Sequence[Tensor]) -> float:
            return sum(float(part.sum()) for part in parts(outputs))

        self.size = math.sqrt(sum(float(part.square().sum()) for part in parts(point.first.tensors)))
        self.spread = math.sqrt(sum(float(weight.square().sum()) for weight in weights))
        why = f"{point.flat.name(k)} moved, to measure a step"
        super().__init__(point, k, layout.join(moves).contiguous(), weigh, why)
