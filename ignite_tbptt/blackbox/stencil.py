"""Difference formulas: at which offsets a function is evaluated, and with which weights a derivative comes of it.

A stencil is its offsets: weights, order and error constants follow from them by exact rational arithmetic. It pairs
with any directions and any step size. What is left of it when an evaluation is lost, or when a bound is in the way, is
a stencil again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Stencil", "backward", "central", "forward"]

_CENTRAL: dict[int, tuple[int, ...]] = {2: (-1, 1), 4: (-2, -1, 1, 2)}


@dataclass(frozen=True)
class Stencil:
    """A formula for a first derivative: ``f'(x) = sum_j weights[j] f(x + offsets[j] h) / h + O(h ** order)``.

    Example:
        >>> from ignite_tbptt.blackbox.stencil import Stencil
        >>> three_points = Stencil((0, 1, 2))
        >>> three_points.weights, three_points.order
        ((-1.5, 2.0, -0.5), 2)

    Args:
        offsets: a tuple of at least two whole numbers, in units of the step. An offset 0 costs nothing, the value at x
            is known.

    Raises:
        TypeError: offsets that are not a tuple of whole numbers.
        ValueError: fewer than two offsets, or one that comes twice.

    The weights are the derivatives at 0 of the Lagrange polynomials on the offsets (Fornberg 1988, Generation of finite
    difference formulas on arbitrarily spaced grids, eq. 1.3).
    """

    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (isinstance(self.offsets, tuple) and all(type(offset) is int for offset in self.offsets)):
            raise TypeError(
                f"offsets must be a tuple of whole numbers in units of the step, got {self.offsets!r}: write "
                "Stencil((-1, 1)) for a difference over both sides; step_size says how far a unit is"
            )
        if len(self.offsets) < 2 or len(set(self.offsets)) != len(self.offsets):
            raise ValueError(
                f"offsets must be at least two different whole numbers, got {self.offsets}: a slope needs two points; "
                "forward(), backward() and central() have them ready"
            )

    @functools.cached_property
    def weights(self) -> tuple[float, ...]:
        """The weight of each evaluation, in the order of the offsets."""
        return tuple(float(weight) for weight in _weights(self.offsets))

    @functools.cached_property
    def order(self) -> int:
        """The power of h in the error, which is also the degree of the polynomials that are differentiated exactly."""
        return _order(self.offsets)

    @property
    def error_constant(self) -> float:
        """The factor C in the leading error ``C h ** order f^(order + 1)(x)``."""
        power = self.order + 1
        return float(_moment(self.offsets, power) / math.factorial(power))

    @property
    def amplification(self) -> float:
        """Sum of the absolute weights, by which an error in f, divided by h, comes back in the derivative."""
        return sum(abs(weight) for weight in self.weights)

    @property
    def reach(self) -> int:
        """The largest distance from x, in steps."""
        return max(abs(offset) for offset in self.offsets)

    @functools.cached_property
    def evaluated(self) -> tuple[int, ...]:
        """The offsets that cost an evaluation, all but 0."""
        return tuple(offset for offset in self.offsets if offset)

    def weights_at(self, offsets: Sequence[int]) -> tuple[float, ...]:
        """The weights in the order of other offsets than its own; 0 at those that it does not use."""
        by_offset = dict(zip(self.offsets, self.weights, strict=True))
        return tuple(by_offset.get(offset, 0.0) for offset in offsets)

    @functools.cached_property
    def evaluated_weights(self) -> tuple[float, ...]:
        """The weights of the offsets that cost an evaluation."""
        return self.weights_at(self.evaluated)

    @property
    def is_two_sided(self) -> bool:
        """Whether there are points on both sides of x."""
        return min(self.offsets) < 0 < max(self.offsets)

    def mirrored(self) -> Stencil:
        """The formula with every offset on the other side of x."""
        return Stencil(tuple(-offset for offset in self.offsets))

    def one_sided(self) -> Stencil:
        """A formula of the same order and the same number of evaluations, with no point left of x."""
        return Stencil(tuple(range(self.order + 1)))

    def among(self, offsets: Iterable[int]) -> Stencil | None:
        """The best formula on these offsets and 0, or None where they are too few."""
        left = tuple(sorted({0, *offsets}))
        return Stencil(left) if len(left) > 1 else None


def forward() -> Stencil:
    """``(f(x + h) - f(x)) / h``: one evaluation a direction, error O(h)."""
    return Stencil((0, 1))


def backward() -> Stencil:
    """``(f(x) - f(x - h)) / h``: one evaluation a direction, error O(h), for functions that end at x."""
    return Stencil((-1, 0))


def central(order: int = 2) -> Stencil:
    """Points on both sides of x: 2 evaluations a direction with error O(h^2), or 4 with error O(h^4).

    Args:
        order: 2 or 4.

    Raises:
        ValueError: another order.
    """
    if order not in _CENTRAL:
        raise ValueError(
            f"order must be one of {sorted(_CENTRAL)}, got {order!r}: central formulas come in even orders, and above "
            "4 round-off eats what they gain; forward() has order 1, other formulas are Stencil(offsets)"
        )
    return Stencil(_CENTRAL[order])


@functools.lru_cache(maxsize=256)
def _weights(offsets: tuple[int, ...]) -> tuple[Fraction, ...]:
    weights = []
    for j, own in enumerate(offsets):
        others = [offset for k, offset in enumerate(offsets) if k != j]
        slope = sum(math.prod(-offset for k, offset in enumerate(others) if k != m) for m in range(len(others)))
        weights.append(Fraction(slope, math.prod(own - offset for offset in others)))
    return tuple(weights)


def _moment(offsets: tuple[int, ...], power: int) -> Fraction:
    return sum((weight * offset**power for weight, offset in zip(_weights(offsets), offsets, strict=True)), Fraction(0))


@functools.lru_cache(maxsize=256)
def _order(offsets: tuple[int, ...]) -> int:
    power = len(offsets)
    while _moment(offsets, power) == 0:
        power += 1
    return power - 1
