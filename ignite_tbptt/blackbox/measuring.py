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
from ignite_tbptt.blackbox.stencil import Stencil
from ignite_tbptt.blackbox.step_size import BoundedStep, PerInputStep, RelativeStep, StepSize

__all__ = ["Measurement", "measure_steps"]

# Of an input so many elements are tried, until one changes the outputs. A step moves x by so many roundings at least.
_ELEMENTS, _ROUNDINGS = 3, 64

# Of what changes by less than so many times the noise, at the longest step, nothing is seen.
_UNSEEN = 8

# Slopes that noise explains are no more than so many times as far apart, and truncation adds no more than a share.
_STRAIGHT, _BENT = 16, 0.05


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
        estimator = replace(estimator, step_size=MeasuredStep())
    if not asks_for_measuring(estimator.step_size) or (key in facts.step_sizes and not again and _fit(record)):
        return
    point = Point([record])
    if not point.floats:
        return
    before = facts.measurements.get(key, {})
    found: dict[int, list[Measurement]] = {}
    positions = [k for k, need in enumerate(record.needed) if need]
    for position, k in enumerate(positions):
        step = _of_input(estimator.step_size, position)
        if isinstance(step, MeasuredStep) and point.x[k].numel():
            measure = _every_column if step.per_element else _one_column
            found[position] = measure(point, k, position, step, before.get(position, []))
    steps = tuple(
        _resolved(estimator.step_size, position, _factor(point, k, found.get(position)))
        for position, k in enumerate(positions)
    )
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


def _resolved(step_size: StepSize, position: int, factor: float | Tensor | None) -> StepSize:
    """A step size with what was found in the place of what was to be measured."""
    if isinstance(step_size, PerInputStep):
        return _resolved(step_size.of(position), position, factor)
    if isinstance(step_size, BoundedStep):
        return replace(step_size, step_size=_resolved(step_size.step_size, position, factor))
    return RelativeStep(factor=factor) if isinstance(step_size, MeasuredStep) else step_size


def _factor(point: Point, k: int, found: list[Measurement] | None) -> float | Tensor | None:
    """The steps over the sizes of x; those of columns broadcast against any number of rows."""
    factors = [one.step.h / one.size for one in found or ()]
    if len(factors) < 2:
        return factors[0] if factors else None
    dim, shape = _dim(point.record, k), list(point.x[k].shape)
    if dim is not None:
        shape[dim] = 1
    return rows_of(tuple(shape), dim).join(torch.tensor([factors], dtype=torch.float64))


def _dim(record: Record, k: int) -> int | None:
    return None if record.flat.in_dims is None else record.flat.in_dims[k]


def _width(record: Record, k: int) -> int:
    return rows_of(tuple(record.tensors[k].shape), _dim(record, k)).width


def _fit(record: Record) -> bool:
    """Whether inputs have as many columns as steps were measured for."""
    found = record.facts.measurements.get(record.inputs_key, {})
    needed = [k for k, need in enumerate(record.needed) if need]
    return all(len(some) == 1 or len(some) == _width(record, needed[position]) for position, some in found.items())


def _one_column(
    point: Point, k: int, position: int, step: MeasuredStep, before: Sequence[Measurement]
) -> list[Measurement]:
    """Of a few columns the first that changes the outputs; that of before, if its step still suits or none does."""
    if len(before) == 1 and _suits(point, k, before[0]):
        return list(before)
    order = torch.randperm(_width(point.record, k), generator=torch.Generator().manual_seed(position)).tolist()
    tried = (_measured(point, k, step, column) for column in order[:_ELEMENTS])
    found = next(tried)
    while not found.step.accepted and (other := next(tried, None)) is not None:
        found = other
    return list(before) if len(before) == 1 and not found.step.accepted else [found]


def _every_column(
    point: Point, k: int, position: int, step: MeasuredStep, before: Sequence[Measurement]
) -> list[Measurement]:
    width = _width(point.record, k)
    old = {one.column: one for one in before} if len(before) == width else {}
    kept = {column: one for column, one in old.items() if _suits(point, k, one)}
    found = [kept.get(column) or _measured(point, k, step, column) for column in range(width)]
    return [one if one.step.accepted else old.get(one.column, one) for one in found]


def _suits(point: Point, k: int, found: Measurement) -> bool:
    return still_suits(_Line(point, k, found.column).at, point.record.asked.stencil, found.step)


def _measured(point: Point, k: int, step: MeasuredStep, column: int) -> Measurement:
    columns = rows_of(tuple(point.x[k].shape), _dim(point.record, k)).split(point.x[k].detach())
    line, around = _Line(point, k, column), float(columns[:, column].nan_to_num(0.0, 0.0, 0.0).abs().max())
    noise = (step.noise or point.record.facts.jump) * line.spread
    noise = noise or noise_level(line.at, around or 1.0, point.eps, 0.5)
    # what rounding does to values of this size where it happens not to show; of those nearby where f(x) is 0
    nearby = 0.0 if noise or line.size else abs(line(point.eps ** (1 / 3) * (around or 1.0)))
    noise = max(noise, point.eps * max(line.size, nearby if math.isfinite(nearby) else 0.0) / 8, 1e-300)
    size = max(1.0, around)
    stencil = point.record.asked.stencil
    found = find_step(line.at, stencil, noise, size, _ROUNDINGS * point.eps * around)
    change = line(found.h) - line(-found.h if stencil.is_two_sided else 0.0)
    unseen = found.h > size / 2 and abs(change) <= _UNSEEN * found.noise
    noise = noise if unseen else found.noise
    # what suits such noise of a function whose scale is that of x
    eps = min(1.0, max(point.eps, noise / (line.size or 1.0)))
    h = float(RelativeStep().each(columns.new_tensor([size]), stencil, eps).sizes)
    longest = found.h / size * max(1.0, float(columns.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    # one that was accepted shows some truncation along one element, and more along all together
    share = _BENT if found.accepted else 0.0
    if found.h > 2 * h and (unseen or not _is_straight(_Line(point, k, None), stencil, longest, h, noise, share)):
        # Nothing is seen of the function here, as where all rows are padding, or elsewhere that step is too long.
        found = found._replace(h=h, accepted=False)
    return Measurement(column, found, size)


def _is_straight(line: _Line, stencil: Stencil, long: float, short: float, noise: float, share: float) -> bool:
    """Whether the slope of all elements together is the same at both steps, up to noise and a share of it."""
    slopes = [
        sum(w * value for w, value in zip(stencil.weights, line.at([o * h for o in stencil.offsets]), strict=True)) / h
        for h in (long, short)
    ]
    tolerance = _STRAIGHT * noise * stencil.amplification / short + share * max(map(abs, slopes))
    return abs(slopes[0] - slopes[1]) <= tolerance


class _Line(Along):
    """The outputs that are finite at x, with random weights, when one column of an input, or all, move in all rows."""

    def __init__(self, point: Point, k: int, column: int | None) -> None:
        layout = rows_of(tuple(point.x[k].shape), _dim(point.record, k))
        moves = layout.split(torch.zeros_like(point.x[k], dtype=torch.bool)).clone()
        moves[:, slice(None) if column is None else column] = True
        generator = torch.Generator().manual_seed(0)
        weights = [torch.rand(y.shape, generator=generator, dtype=torch.float64).add_(0.5) for y in point.values]
        finite = [y.isfinite().cpu() for y in point.values]

        def parts(outputs: Sequence[Tensor]) -> list[Tensor]:
            weighed = (w * outputs[n].double().cpu() for w, n in zip(weights, point.floats, strict=True))
            return [torch.where(here, part, 0.0) for here, part in zip(finite, weighed, strict=True)]

        def weigh(outputs: Sequence[Tensor]) -> float:
            return sum(float(part.sum()) for part in parts(outputs))

        self.size = math.sqrt(sum(float(part.square().sum()) for part in parts(point.first.tensors)))
        self.spread = math.sqrt(sum(float(weight.square().sum()) for weight in weights))
        why = f"{point.flat.name(k)} moved, to measure a step"
        super().__init__(point, k, layout.join(moves).contiguous(), weigh, why)
