"""Jumps, printed digits and solver tolerances, told by the slope at a wider step.

A central difference over a jump gives ``jump / 2h``, one of a program that prints few digits gives noise, and one of a
solver with a loose tolerance the slope of its step control: none of them an error. The slope of a smooth function, in
contrast, settles as the step shrinks. So a few elements are tried, at the first gradient and at gradients 2, 4, 8, ...:
the slope at the step that is taken, and those at steps 64 and 4096 times as wide. Only where these differ is a ladder
climbed, with a factor of 8 from step to step; shorter steps tell whether the one that is taken is too long. Pairs with
every stencil; kinks are told from jumps by one-sided slopes.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ignite_tbptt.blackbox.along import Along
from ignite_tbptt.blackbox.errors import UntrustedGradientWarning
from ignite_tbptt.blackbox.measuring import measure_steps
from ignite_tbptt.blackbox.point import Point, key_of
from ignite_tbptt.blackbox.random_directions import Gaussian
from ignite_tbptt.blackbox.stencil import Stencil
from ignite_tbptt.blackbox.step_size import RelativeStep, unbounded
from ignite_tbptt.random_streams import RandomStreams
from ignite_tbptt.warn import warn

__all__ = ["compare_steps"]

# How many elements are tried at the first gradient; later one each time, another than before. One that changes nothing
# tells nothing: at the first gradient others take its place, up to so many times the sample.
_SAMPLE, _TURNS = 2, 4
_FLAT = ""
_FACTOR = 8
# Neighbours to each side that are looked at for jumps.
_AROUND, _HALVED = 16, 12
# Slopes agree that differ by less than this share of the larger; one-sided formulas round off more. A step that was
# chosen, or measured, is a compromise already.
_TOLERANCE, _ONE_SIDED_TOLERANCE, _CHOSEN_TOLERANCE = 0.003, 0.02, 0.05


@dataclass(frozen=True, eq=False)
class _Line:
    """The weighted outputs as a function of one element."""

    phi: Along
    stencil: Stencil
    h: float
    noise: float
    tolerance: float

    def agree(self, one: float, other: float) -> bool:
        """Whether two slopes do, up to truncation and rounding."""
        return abs(one - other) <= max(self.tolerance * max(abs(one), abs(other)), self.noise)

    def slope(self, level: int) -> float:
        """By the stencil that is used, at ``h * 8 ** level``; NaN where the function is not defined."""
        return self.slopes([level])[0]

    def slopes(self, levels: Sequence[int]) -> list[float]:
        """Several of them, evaluated together."""
        steps, offsets = [self.h * float(_FACTOR) ** level for level in levels], self.stencil.offsets
        values = iter(self.phi.at([offset * h for h in steps for offset in offsets]))
        return [sum(weight * next(values) for weight in self.stencil.weights) / h for h in steps]

    def sides(self, level: int) -> tuple[float, float]:
        """The slopes to the right and to the left of x."""
        h = self.h * float(_FACTOR) ** level
        ahead, behind = self.phi.at([h, -h])
        return (ahead - self.phi(0.0)) / h, (self.phi(0.0) - behind) / h


def compare_steps(point: Point, cotangents: Sequence[Tensor | None], first: bool) -> None:
    """Warn of elements whose slope is another at a wider step, beyond what a smooth function allows.

    Args:
        point: where the function is differentiated.
        cotangents: weights of the outputs.
        first: whether this is the first gradient.
    """
    record = point.record
    if isinstance(record.estimator.directions, Gaussian):
        return  # they are for functions that jump
    needed = [k for k, need in enumerate(record.needed) if need and point.x[k].numel()]
    used = [(k, v.double()) for k in point.floats if (v := cotangents[k]) is not None and bool(torch.isfinite(v).all())]
    if not needed or not used:
        return
    before, drawn = RandomStreams.latest(), record.count.drawn
    elements = sum(point.x[k].numel() for k in needed)
    wanted, turns = (_SAMPLE, min(_SAMPLE * _TURNS, elements)) if first else (1, 1)
    for turn in range(record.number, record.number + turns):
        k = needed[turn % len(needed)]
        position = sum(record.needed[:k])
        if ("coarse", k) in record.facts.told:
            continue
        element = (turn // len(needed) * 0x9E3779B1) % point.x[k].numel()
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(element), point.x[k].shape))
        message = _compared(point, k, position, index, used)
        wanted -= message != _FLAT
        if message:
            if not record.draws and record.count.drew_since(drawn, before):
                # Away from x it draws random numbers, which were not common here: again, when they are.
                record.facts.forget(key_of(record))
                return
            record.facts.told.add(("coarse", k))
            if record.options.is_default and not record.facts.measures:
                record.facts.measures = True
                measure_steps(record, True)
                message = _compared(point, k, position, index, used) or _told_of_measuring(point, k, position, index)
            elif record.facts.jump and record.facts.measurements.pop(record.inputs_key, None):
                measure_steps(record, True)
                message = _compared(point, k, position, index, used) or _told_of_jumps(point, k, position, index)
            warn(message, UntrustedGradientWarning)
        if not wanted:
            break


def _step(point: Point, k: int, position: int, index: tuple[int, ...]) -> float:
    estimator = point.record.estimator
    return float(estimator.step_size.each(point.x[k], estimator.stencil, point.eps, position).sizes[index].abs())


def _told_of_jumps(point: Point, k: int, position: int, index: tuple[int, ...]) -> str:
    return (
        f"{point.flat.label} jumps, as a solver does that chooses its own steps, by {point.record.facts.jump:.2g} of "
        f"an output. The steps were measured with that as the noise: {_step(point, k, position, index):.2g} for "
        f"element {index} of {point.flat.name(k)}. A tighter tolerance gives a better gradient"
    )


def _told_of_measuring(point: Point, k: int, position: int, index: tuple[int, ...]) -> str:
    h = _step(point, k, position, index)
    return (
        f"{point.flat.label} jumps, is steep, ripples, rounds its inputs or outputs, or solves to a tolerance. So its "
        f"steps were measured instead of chosen by the precision: {h:.2g} for element {index} of {point.flat.name(k)}. "
        "Give estimator=CentralDifference(step_size=MeasuredStep()) to have them measured without this word"
    )


def _compared(
    point: Point,
    k: int,
    position: int,
    index: tuple[int, ...],
    used: Sequence[tuple[int, Tensor]],
) -> str | None:
    estimator = point.record.estimator
    x = float(point.x[k][index])
    if not math.isfinite(x):
        return None
    sizes, one_sided = estimator.step_size.each(point.x[k], estimator.stencil, point.eps, position)
    stencil = estimator.stencil
    if one_sided is not None and bool(one_sided[index]):
        stencil = stencil.one_sided()
    h = float(sizes[index].abs())
    if float(sizes[index]) < 0:
        stencil = stencil.mirrored()
    reach = max(0.3 * abs(x), min(0.3, 0.3 * h / point.eps ** (1 / (stencil.order + 1))))
    top = int(math.log(max(reach / h, 1.0), _FACTOR))
    if top < 1:
        return None
    noise = 4 * point.eps * stencil.amplification / h
    noise *= sum(float((v.abs() * point.first.tensors[n].abs().nan_to_num(0, 0, 0)).sum()) for n, v in used)
    noise = max(noise, 4 * _measured_noise(point, position, used) * stencil.amplification / h)
    step_size = unbounded(estimator.step_size, position)
    tolerance = _TOLERANCE if stencil.is_two_sided else _ONE_SIDED_TOLERANCE
    if not isinstance(step_size, RelativeStep) or step_size.factor is not None:
        tolerance = _CHOSEN_TOLERANCE
    line = _Line(_along(point, k, index, used), stencil, h, noise, tolerance)
    quick = line.slopes(sorted({0, min(2, top), min(4, top)}))
    element = f"element {index} of {point.flat.name(k)}"
    if not any(slope for slope in quick if math.isfinite(slope)):
        return _if_zero(line, point, k, element, max(1.0, abs(x))) or _FLAT
    if all(line.agree(quick[0], slope) for slope in quick[1:] if math.isfinite(slope)):
        return None
    slopes = line.slopes(range(top + 1))
    while slopes and not math.isfinite(slopes[-1]):
        slopes.pop()  # out of bounds, or outside the domain
    if len(slopes) < 2 or not all(map(math.isfinite, slopes)):
        return None
    jump = _jump(line, slopes)
    if not jump:
        too_long = _if_too_long(line, slopes, point, element)
        if too_long is not None or not _is_coarse(line, slopes):
            return too_long
    point.record.facts.jump = max(point.record.facts.jump, jump / math.sqrt(sum(float((v * v).sum()) for _, v in used)))
    gaps = [abs(a - b) / max(abs(a), abs(b)) if a or b else math.inf for a, b in itertools.pairwise(slopes)]
    # of those that agree nearly best the widest, since two may agree by chance
    best = max(level for level, gap in enumerate(gaps) if gap <= max(2 * min(gaps), 0.02))
    wide = h * float(_FACTOR) ** (best + 1)
    told = (
        f"{point.flat.label} is not smooth on the scale of the step: with respect to {element} its slope is "
        f"{slopes[0]:.3g} at the step that is taken, {h:.2g}, and {slopes[best + 1]:.3g} at {wide:.2g}. It jumps, "
        "ripples, rounds its inputs or outputs, or solves to a tolerance; tighten that, or "
    )
    if gaps[best] < 0.1:
        told += f"choose a step of several quanta, AbsoluteStep({wide / 2:.2g}) say"
    else:
        told += f"average over the jumps, with GaussianSmoothing(n, sigma={h * float(_FACTOR) ** top:.2g}) say"
    return f"{told}; step_sweep({point.flat.label}, ...) shows the error against the step"


def _measured_noise(point: Point, position: int, used: Sequence[tuple[int, Tensor]]) -> float:
    """Of the weighted outputs, as it was seen when a step was measured; 0 where none was."""
    found = point.record.facts.measurements.get(point.record.inputs_key, {}).get(position)
    numbers = sum(value.numel() for value in point.values)
    return found[0].step.noise * math.sqrt(sum(float((v * v).sum()) for _, v in used) / numbers) if found else 0.0


def _if_zero(line: _Line, point: Point, k: int, element: str, reach: float) -> str | None:
    """A message where a wider step changes the outputs, to both sides alike.

    Where no step changes them, or those to one side only, the zero is right: saturated functions, and kinks.
    """
    top = math.ceil(math.log(2 * reach / line.h, _FACTOR))
    level = next((level for level in range(top + 1) if line.slope(level)), None)
    rounding = line.noise / float(_FACTOR) ** (level or 0)
    if level is None or not rounding < abs(line.slope(level)) < math.inf:
        return None
    settled = level < top and abs(line.slope(level + 1)) < 4 * abs(line.slope(level))
    if _has_plateaus(line, level):
        settled = True
    alike = (
        _has_plateaus(line, level)
        or _same_to_both_sides(line, level)
        or (settled and _same_to_both_sides(line, level + 1))
    )
    if not (settled or level == top) or not alike:
        return None
    wide = line.h * float(_FACTOR) ** level
    return (
        f"the gradient of {point.flat.label} with respect to {point.flat.name(k)} is zero at {element}: no step that "
        f"was taken changed the outputs. They do change when it moves by {wide:.2g}: if they come in quanta, choose a "
        f"step of several of these, AbsoluteStep({_FACTOR * wide:.2g}) say, or average over the jumps, with "
        f"GaussianSmoothing(n, sigma={wide:.2g}) say"
    )


def _if_too_long(line: _Line, slopes: Sequence[float], point: Point, element: str) -> str | None:
    """A message where shorter steps agree on another slope than the one that is taken.

    Beside the slopes nearby, that is: where the gradient is next to 0 truncation is larger.
    """
    taken, finer, finest = line.slopes([0, -1, -2])
    gap = abs(taken - finer)
    if not abs(finer - finest) < 0.25 * min(gap, abs(finest)):
        return None
    if gap <= 10 * max(line.tolerance * max(map(abs, [*slopes, finer])), line.noise):
        return None
    return (
        f"the step is too long for {point.flat.label}: with respect to {element} its slope is {taken:.3g} at the step "
        f"that is taken, {line.h:.2g}, and {finer:.3g} at {line.h / _FACTOR:.2g}. Choose a shorter one, "
        f"AbsoluteStep({line.h / _FACTOR**2:.2g}) say, or MeasuredStep(), which finds one; "
        f"step_sweep({point.flat.label}, ...) shows the error against the step"
    )


def _is_coarse(line: _Line, slopes: Sequence[float]) -> bool:
    """Whether no smooth function has these slopes at steps that grow by a factor of 8."""
    finer, taken, top = line.slope(-1), slopes[0], len(slopes) - 1
    if taken == 0 == finer:
        # Constant nearby. Quanta give a slope that settles and is the same to both sides; a flat or a kinked function
        # gives one that grows, or that is of one side only.
        found = next((level for level, slope in enumerate(slopes) if slope), top)
        if _has_plateaus(line, found) or (found < top and _has_plateaus(line, found + 1)):
            return True
        if found == top or abs(slopes[found + 1]) >= 4 * abs(slopes[found]):
            return False
        return _same_to_both_sides(line, found + 1)
    # of a step that was chosen, or measured, quanta are no news
    by_precision = line.tolerance < _CHOSEN_TOLERANCE
    if by_precision and finer == 0 and not line.agree(taken, 0.0):
        return True  # a plateau within the step, however well wider ones agree by chance
    gap = abs(taken - slopes[1])
    if not line.agree(taken, slopes[1]):
        # What a smooth function lacks is more at wider steps, and nearly nothing at a finer one.
        after = abs(slopes[1] - slopes[2]) if top > 1 else 0.0
        if after < gap:
            if abs(finer - taken) > 0.5 * gap:
                return True
            # quanta may agree by chance at one finer step, and hardly at two
            if by_precision and abs(line.slope(-2) - taken) > 0.5 * gap + _FACTOR**2 * line.noise:
                return True
    # A jump a few steps away: a slope that neither the nearest nor the widest step shows. Saturation has one, too.
    far = slopes[top]
    bound = 2 * max(abs(taken), abs(far))
    peaks = [k for k in range(1, top) if min(abs(slopes[k] - taken), abs(slopes[k] - far)) > bound]
    if any(_jump_within(line, level) for level in peaks):
        return True
    # A solver whose own steps change: the slope of one piece nearby, another one over many of them.
    if top < 3 or not line.agree(finer, taken) or line.agree(taken, far) or abs(far) < 0.2 * abs(taken):
        return False
    gap = abs(taken - far)
    settled = abs(far - slopes[top - 1]) < 0.25 * gap
    return settled and all(abs(side - far) < 0.5 * gap for side in line.sides(top - 1))


def _jump(line: _Line, slopes: Sequence[float]) -> float:
    """The largest jump nearby, where the slope first changes; 0 where there is none.

    A solver that chooses its own steps is smooth as long as it chooses the same ones, and jumps where it does not. Of a
    smooth function, and of one with kinks, each difference of neighbours lies between those beside it, or hardly
    outside; that over a jump stands out.
    """
    first = next((k for k, slope in enumerate(slopes) if not line.agree(slope, slopes[0])), len(slopes))
    # neighbours are close enough here that those of a smooth function differ little
    found = (_jump_within(line, level) for level in range(first, min(first + 3, len(slopes))))
    return next((jump for jump in found if jump), 0.0)


def _jump_within(line: _Line, level: int) -> float:
    spacing = line.h * float(_FACTOR) ** level / _AROUND
    values = line.phi.at([k * spacing for k in range(-_AROUND, _AROUND + 1)])
    steps = [after - before for before, after in itertools.pairwise(values)]
    if not all(map(math.isfinite, steps)):
        return 0.0
    outside = [
        max(step - max(before, after), min(before, after) - step, 0.0)
        for before, step, after in zip(steps, steps[1:], steps[2:], strict=False)
    ]
    usual, rounding = statistics.median(map(abs, steps)), line.noise * line.h
    jump = max(outside)
    if not jump > max(usual / 2, 20 * statistics.median(outside), rounding):
        return 0.0
    # what is only steep comes apart as it is halved
    place = outside.index(jump) + 1 - _AROUND
    left, right = place * spacing, (place + 1) * spacing
    for _ in range(_HALVED):
        middle = (left + right) / 2
        before, after = line.phi(middle) - line.phi(left), line.phi(right) - line.phi(middle)
        left, right = (left, middle) if abs(before) > abs(after) else (middle, right)
    return jump if jump / 16 < abs(line.phi(right) - line.phi(left)) < math.inf else 0.0


def _has_plateaus(line: _Line, level: int) -> bool:
    """Whether values other than that at x come exactly again, to both sides: the function comes in quanta."""
    h = line.h * float(_FACTOR) ** level
    here = line.phi(0.0)
    for side in (h, -h):
        values = [value for value in line.phi.at([side * i / 8 for i in range(1, 9)]) if value != here]
        if len(set(values)) == len(values):
            return False
    return True


def _same_to_both_sides(line: _Line, level: int) -> bool:
    ahead, behind = line.sides(level)
    if not line.stencil.is_two_sided and not (math.isfinite(ahead) and math.isfinite(behind)):
        return True  # one side is all that there may be
    return ahead * behind > 0 and 0.2 < ahead / behind < 5


def _along(point: Point, k: int, index: tuple[int, ...], used: Sequence[tuple[int, Tensor]]) -> Along:
    moves = torch.zeros_like(point.x[k], dtype=torch.bool)
    moves[index] = True

    def weigh(outputs: Sequence[Tensor]) -> float:
        # an output that does not count may be NaN
        return sum(float((v * outputs[n].double())[v != 0].sum()) for n, v in used)

    return Along(point, k, moves, weigh, "moved further, to compare steps")
