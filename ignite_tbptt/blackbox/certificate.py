"""Certificates: how far off a gradient is, from slopes along directions that it was not made of.

For a random direction u of identity covariance the mean of ``(D_u f - <g, u>)^2`` is ``|g - grad f|^2``: two numbers
that do not know each other are compared, so that noise, truncation and directions that were never looked at are all in
it, at a cost that does not grow with the number of elements. With normal directions the sum over m of them, over its
mean, is chi-square with m degrees of freedom, whatever the gradient, which gives the interval. Pairs with every
estimator of slopes of f itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ignite_tbptt.blackbox.coordinates import Coordinates
from ignite_tbptt.blackbox.errors import BlackboxError, UntrustedGradientWarning
from ignite_tbptt.blackbox.point import Point, evaluate_all
from ignite_tbptt.blackbox.random_directions import generator_of
from ignite_tbptt.warn import warn

__all__ = ["Certificate", "certify"]

# The slope along a held-out direction is taken by a formula of higher order than most gradients, and further out, where
# noise counts less: a vector so many steps long; one-sided steps are shorter than two-sided ones.
_OFFSETS = (-2, -1, 1, 2)
_LENGTH, _ONE_SIDED_LENGTH = 3.0, 6.0
# Noise is what no polynomial of degree 4 explains at -1, -1/2, -1/4, 0, 1/4, 1/2 and 1 of the first of them: two sums
# that are orthogonal to all of these.
_INNER: tuple[float, ...] = (-0.5, -0.25, 0.25, 0.5)
_WIGGLES = ((1, -20, 64, -90, 64, -20, 1), (-1, 10, -16, 0, 16, -10, 1))
# Directions are held out up to a tenth of all evaluations: so many at the least, and at most.
_FEWEST, _MOST, _SHARE = 2, 16, 0.1


@dataclass(frozen=True)
class Certificate:
    """How far off one gradient is, over its own size, each element in units of its step.

    Attributes:
        gradient: which gradient of the blackbox it is, counted from 1.
        relative: the estimate, a root mean square.
        low: 95 % of such intervals hold the true error...
        high: ...between low and high.
        probes: how many directions were held out.
        noise: what the noise of the function alone would make of the error, as it was seen along these directions or
            in earlier certificates; None for random directions, which are off by what they leave out.
    """

    gradient: int
    relative: float
    low: float
    high: float
    probes: int
    noise: float | None = None

    @property
    def truncation(self) -> float | None:
        """What noise leaves of the error; a smaller step makes it less, and a larger one makes less of the noise."""
        return None if self.noise is None else math.sqrt(max(0.0, self.relative**2 - self.noise**2))

    def __str__(self) -> str:
        parts = "" if self.noise is None else f"; noise makes {self.noise:.2g} of it"
        return (
            f"gradient {self.gradient} is off by {self.relative:.2g} of its size (95 %: {self.low:.2g} to "
            f"{self.high:.2g}), by {self.probes} directions held out{parts}"
        )


def certify(point: Point, cotangents: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> None:
    """Estimate the error of a gradient and leave it with the facts of the blackbox; warn above the tolerance.

    Args:
        point: x of the call.
        cotangents: v for each output.
        found: the gradient for each tensor that needs one.
    """
    record = point.record
    asked, facts = record.options.certify, record.facts
    used = [(k, v.double()) for k in point.floats if (v := cotangents[k]) is not None]
    moved = [k for k, need in enumerate(record.needed) if need and point.x[k].numel()]
    if asked is None or not used or not moved or not all(bool(v.isfinite().all()) for _, v in used):
        return
    count = record.count
    room = _SHARE * asked.every * count.nfev / max(1, count.gradients)
    gain, number, inner = _noise_gain(point), len(facts.certificates) + 1, _INNER[:0]
    # the noise is looked at with the first certificate, and with 2, 4, 8, ... where there is room
    fits = room >= _FEWEST * len(_OFFSETS) + len(_INNER)
    if gain is not None and (number == 1 or (fits and not number & (number - 1))):
        inner, room = _INNER, room - len(_INNER)
    probes = min(_MOST, max(_FEWEST, int(room / len(_OFFSETS))))
    try:
        errors, own, noises, size = _residuals(point, used, moved, found, probes, inner)
    except (BlackboxError, ValueError) as error:  # outside of the domain, or no room inside the bounds
        if "certificate" not in facts.told:
            facts.told.add("certificate")
            warn(f"a gradient of {record.flat.label} could not be certified: {error}", UntrustedGradientWarning)
        return
    total = sum(error * error for error in errors)
    # what the held-out slopes are off by themselves may be all that was seen
    squares = total / probes, max(0.0, total / quantile(0.975, probes) - own), total / quantile(0.025, probes)
    relative, low, high = (math.sqrt(value) / size if size else math.inf if value else 0.0 for value in squares)
    weight = sum(float(v.square().sum()) for _, v in used)
    if noises and weight:
        facts.noises.append(sum(each * each for each in noises) / len(noises) / weight)
    noise = None
    if gain is not None and facts.noises and size:
        noise = math.sqrt(gain * weight * sum(facts.noises) / len(facts.noises)) / size
    made = Certificate(facts.certified, relative, low, high, probes, noise)
    facts.certificates.append(made)
    if asked.tolerance is not None and not relative <= asked.tolerance:
        warn(
            f"{record.flat.label}: {made}, and the tolerance is {asked.tolerance:.2g}; step_sweep({record.flat.label}, "
            "...) shows noise and truncation against the step, MeasuredStep() balances them, and random directions "
            "need more of them, or GuidedDirections",
            UntrustedGradientWarning,
        )


def _residuals(
    point: Point,
    used: Sequence[tuple[int, Tensor]],
    moved: Sequence[int],
    found: Sequence[Tensor | None],
    probes: int,
    inner: Sequence[float],
) -> tuple[list[float], float, list[float], float]:
    """Residuals along each direction, the mean square of their own noise, and the size of the gradient; in steps.

    Third come samples of the noise of the weighted outputs, from the inner places of the first direction.
    """
    record = point.record
    seed = (record.draw ^ 0x5DEECE66D) % 2**63

    def direction(probe: int) -> dict[int, Tensor]:
        stream = generator_of(seed, probe)
        return {k: torch.randn(x.shape, generator=stream, dtype=torch.float64).to(x) for k, x in inputs.items()}

    inputs = {k: point.x[k] for k in moved}
    length = _LENGTH if record.estimator.stencil.is_two_sided else _ONE_SIDED_LENGTH
    length /= math.sqrt(sum(x.numel() for x in inputs.values()))
    largest = max(float(u.abs().max()) for probe in range(probes) for u in direction(probe).values())
    sizes = {k: point.sizes(k, largest * length * _OFFSETS[-1] / record.estimator.stencil.reach) for k in moved}
    # elements that are NaN or infinite stay where they are: outputs that count do not depend on them
    sizes = {k: torch.where(inputs[k].isfinite(), size, 0.0) for k, size in sizes.items()}
    gradient = {k: g.to(point.x[k].device).double() for k in moved if (g := found[k]) is not None}
    foretold: list[float] = []

    def places() -> Iterator[list[Tensor]]:
        for probe in range(probes):
            along = direction(probe)
            for offset in (*_OFFSETS, *inner) if probe == 0 else _OFFSETS:
                where = [x.clone() for x in point.x]
                for k in inputs:
                    where[k].addcmul_(sizes[k], along[k], value=offset * length)
                # what the gradient foretells is taken off at the points as they came out of rounding
                shifts = ((g, (where[k].double() - inputs[k].double()).nan_to_num_(0.0)) for k, g in gradient.items())
                foretold.append(sum(float((g * shift).sum()) for g, shift in shifts))
                yield where

    outputs = evaluate_all(point, places(), "along a direction that is held out, for a certificate")
    start = _weighted(used, point.first.tensors)
    left = [_weighted(used, out.tensors) - start - told for out, told in zip(outputs, foretold, strict=True)]
    if not all(map(math.isfinite, left)):
        raise BlackboxError("it is NaN or infinite a few steps away")
    first, last = len(_OFFSETS), len(_OFFSETS) + len(inner)
    around, left = left[first:last], left[:first] + left[last:]
    errors, own = [], 0.0
    for probe in range(probes):
        far_left, near_left, near_right, far_right = left[4 * probe : 4 * probe + 4]
        near, far = (near_right - near_left) / (2 * length), (far_right - far_left) / (4 * length)
        # Richardson's formula of order 4; noise of variance s^2 in f gives it 65/72 s^2, and the difference 5/8 s^2
        errors.append((4 * near - far) / 3)
        own += (near - far) ** 2 * (65 / 72) / (5 / 8) / probes
    size = math.sqrt(sum(float((g * sizes[k].double()).square().sum()) for k, g in gradient.items()))
    seven = [left[1], *around[:2], 0.0, *around[2:], left[2]]
    noises = [
        sum(factor * value for factor, value in zip(wiggle, seven, strict=True)) / math.hypot(*wiggle)
        for wiggle in (_WIGGLES if inner else ())
    ]
    return errors, own, noises, size


def _noise_gain(point: Point) -> float | None:
    """The mean square that noise of variance 1 gives a gradient, in units of the steps."""
    if not isinstance(point.record.estimator.directions, Coordinates):
        return None
    moves = (moves for group in point.groups for moves in point.moves(group))
    return sum(some.count * sum(weight**2 for weight in some.stencil.weights) for some in moves)


def _weighted(used: Sequence[tuple[int, Tensor]], outputs: Sequence[Tensor]) -> float:
    """<v, f>, where outputs that do not count may be anything."""
    total = 0.0
    for k, v in used:
        y = outputs[k].double()
        total += float(torch.where(v == 0, 0.0, v.to(y.device) * y).sum())
    return total


@functools.cache
def quantile(p: float, degrees: int) -> float:
    """Of chi-square: where its distribution function is p."""
    low, high = 0.0, 100.0 + 10.0 * degrees
    shape = torch.tensor(degrees / 2, dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        below = float(torch.special.gammainc(shape, torch.tensor(middle / 2, dtype=torch.float64))) < p
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2
