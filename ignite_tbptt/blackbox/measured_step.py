"""A step that is measured instead of guessed: from the noise of f, where truncation is as large as noise.

For a function with noise of standard deviation e and a difference formula D, the ratio ``|D(h) - D(a h)| h / e``, over
the sum of the sizes of its weights, compares truncation with noise. The search of Shi, Xie, Xuan and Nocedal (2022,
Adaptive finite-difference interval estimation for noisy derivative-free optimization, arXiv 2110.06380, algorithm 2.1)
narrows h down until the ratio is a little above 1; from a step that is too long the right one is guessed by the order
of truncation. Pairs with `noise`, which finds e, and with any stencil.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ignite_tbptt.blackbox.stencil import Stencil
from ignite_tbptt.blackbox.step_size import RelativeStep, Steps, require_positive

__all__ = ["FoundStep", "MeasuredStep", "Values", "find_step", "in_few_bits", "ratio_weights", "still_suits"]

Values = Callable[[Sequence[float]], list[float]]
"""A function of one number, asked for several values at a time."""

# A step at which only noise shows grows by this factor, and by more where nothing does: from one that is too long the
# right one is guessed.
_GROWTH, _MOST_GROWTH = 16, 2**32

# So often a step is guessed from a ratio that is too large; of a jump the guesses are wrong.
_GUESSES = 4

# Twice as far away, the difference that a kink makes is more than so many times as large; that of a jump is not.
_BENDS = 4

_MOST = 60  # ratios that a search may take; 4 to 15 are usual


@dataclass(frozen=True)
class MeasuredStep:
    """A step for each input, measured at the first gradient from the noise of the function, and kept.

    Example:
        >>> import torch
        >>> from ignite_tbptt.blackbox import CentralDifference, blackbox
        >>> @blackbox(estimator=CentralDifference(step_size=MeasuredStep()))
        ... def printed(x):  # prints four decimals
        ...     return torch.tensor([float(f"{value ** 3:.4f}") for value in x.tolist()])
        >>> x = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
        >>> printed(x).sum().backward()
        >>> (x.grad - 3 * x ** 2).abs().max() < 0.05
        tensor(True)

    It is measured along one element of each input, with some 10 to 30 evaluations, more where it jumps, which are spent
    once. At gradients 2, 4, 8, ... the ratio of truncation to noise is looked at again, and the step is measured anew
    where it no longer suits. Elements of other sizes than that one get a step in proportion to ``max(1, |x|)``. A long
    step is taken only where the slope of all elements together is the same at a short one; where the function is flat,
    the step of before is kept, or one that suits the noise.

    Args:
        noise: standard deviation of what an output is off by, in its units; measured by default.
        per_element: measure along every element of each input, or every column of independent rows, at so many times
            the evaluations: where the elements of one tensor have scales of their own.

    Raises:
        ValueError: noise that is not positive and finite, or per_element that is not True or False.
    """

    noise: float | None = None
    per_element: bool = False

    def __post_init__(self) -> None:
        if self.noise is not None:
            require_positive("noise", self.noise, "leave it out, and it is measured")
        if not isinstance(self.per_element, bool):
            raise ValueError(
                f"per_element must be True, to measure along every element, or False, got {self.per_element!r}"
            )

    def each(self, x: Tensor, stencil: Stencil, eps: float, position: int = 0) -> Steps:
        """See `StepSize.each`: the relative step, as long as nothing has been measured."""
        return RelativeStep().each(x, stencil, eps, position)

    def inside(self, x: Tensor, position: int) -> Tensor:
        """See `StepSize.inside`."""
        return x


class FoundStep(NamedTuple):
    """What a search found.

    Attributes:
        h: the step.
        noise: the noise that it balances, larger than what was given where the function has a jump.
        accepted: whether the ratio is inside of the interval; else no step balances both, as for a polynomial of low
            degree, whose truncation is 0 at every step.
    """

    h: float
    noise: float
    accepted: bool


def ratio_weights(stencil: Stencil) -> dict[int, float]:
    """Weights of the values of f in ``D(h) - D(a h)``, over the sum of their sizes; a is 2, 3 or 4."""
    stretch = _stretch(stencil)
    weights: dict[int, float] = {}
    for offset, weight in zip(stencil.offsets, stencil.weights, strict=True):
        weights[offset] = weights.get(offset, 0.0) + stretch * weight
        weights[offset * stretch] = weights.get(offset * stretch, 0.0) - weight
    if not any(offset == 0 for offset in weights):
        weights = {offset: weight for offset, weight in weights.items() if weight}
    size = sum(map(abs, weights.values()))
    return {offset: weight / size for offset, weight in weights.items()}


def _stretch(stencil: Stencil) -> int:
    return {1: 4, 2: 3 if stencil.is_two_sided else 4}.get(stencil.order, 2)


def _interval(stencil: Stencil) -> tuple[float, float]:
    return (1.5, 6.0) if stencil.order == 1 else (1.5, 4.5)


def find_step(values: Values, stencil: Stencil, noise: float, largest: float, smallest: float = 0.0) -> FoundStep:
    """Find the step at which truncation is about as large as noise.

    Args:
        values: f along a line, at several distances from x.
        stencil: the formula.
        noise: standard deviation of f.
        largest: the longest step to be tried.
        smallest: the shortest step that moves x by many roundings. Where truncation shows even there, it is noise that
            was not seen.
    """
    weights = ratio_weights(stencil)
    low, high = _interval(stencil)
    smallest, largest = in_few_bits(smallest), in_few_bits(largest)
    first = h = min(largest, max(2.0 * noise ** (1 / (stencil.order + 1)), smallest))
    lower, upper, jump, guesses, growth = 0.0, math.inf, 0.0, _GUESSES, _GROWTH
    for _ in range(_MOST):
        h = in_few_bits(h)
        difference = abs(_weighted(values, weights, h))
        ratio = difference / noise
        if low <= ratio <= high:
            return FoundStep(h, noise, True)
        if ratio < low:
            lower = h
            if h >= largest:
                return FoundStep(h, noise, False)
        else:  # or not finite: outside of the domain
            upper = h
            jump = difference if math.isfinite(difference) else jump
        if 0 < lower < upper < 1.2 * lower or upper <= smallest:
            if not jump or (lower and abs(_weighted(values, weights, in_few_bits(2 * upper))) > _BENDS * jump):
                return FoundStep(lower or h, noise, False)  # a kink, beyond which truncation goes on growing
            # from nothing to a lot within a few per cent: a jump, which is the noise that counts
            noise, h = 2 * max(noise, jump), first
            lower, upper, jump, guesses, growth = 0.0, math.inf, 0.0, _GUESSES, _GROWTH
            continue
        # where truncation is all that is seen, it goes with this power of h
        guess = h * (math.sqrt(low * high) / ratio) ** (1 / (stencil.order + 1)) if high < ratio < math.inf else 0.0
        if upper == math.inf:
            h = min(largest, h * growth)
            growth = growth**2 if difference == 0 and growth < _MOST_GROWTH else _GROWTH
        elif 1.1 * lower < guess < upper / 1.1 and guesses:
            h, guesses = max(guess, smallest), guesses - 1
        elif lower == 0:
            h = max(h / 2, smallest)
        else:
            h = math.sqrt(lower * upper)
    return FoundStep(lower or first, noise, False)


def in_few_bits(h: float) -> float:
    """A distance near this one by which numbers are moved without rounding, unless they are very large."""
    mantissa, exponent = math.frexp(h)
    return math.ldexp(round(mantissa * 32) / 32, exponent)


def still_suits(values: Values, stencil: Stencil, found: FoundStep) -> bool:
    """Whether the ratio at a step that was found is still about what the search accepts, within a factor of 4."""
    ratio = abs(_weighted(values, ratio_weights(stencil), found.h)) / found.noise
    low, high = _interval(stencil)
    return (low / 4 <= ratio or not found.accepted) and ratio <= 4 * high


def _weighted(values: Values, weights: dict[int, float], h: float) -> float:
    found = values([offset * h for offset in weights])
    return sum(weight * value for weight, value in zip(weights.values(), found, strict=True))
