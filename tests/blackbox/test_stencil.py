"""Difference formulas do what their order says, on every polynomial up to it."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ignite_tbptt.blackbox.stencil import Stencil, backward, central, forward
from tests.blackbox.helpers import STENCILS

offset_sets = st.sets(st.integers(-5, 5), min_size=2, max_size=6).map(lambda some: Stencil(tuple(sorted(some))))


@pytest.mark.parametrize("name", STENCILS)
@given(coefficients=st.lists(st.integers(-9, 9), min_size=1, max_size=5), x=st.integers(-3, 3))
def test_exact_on_polynomials_up_to_the_order(name: str, coefficients: list[int], x: int) -> None:
    stencil = STENCILS[name]
    polynomial = coefficients[: stencil.order + 1]
    h = Fraction(1, 2)

    def value(t: Fraction) -> Fraction:
        return sum((c * t**k for k, c in enumerate(polynomial)), Fraction(0))

    slope = sum((k * c * Fraction(x) ** (k - 1) for k, c in enumerate(polynomial) if k), Fraction(0))
    pairs = zip(stencil.offsets, stencil.weights, strict=True)
    found = sum(float(value(x + offset * h)) * weight for offset, weight in pairs) / float(h)
    # weights are thirds and twelfths at worst: round-off of sums of a few terms of size |p|
    size = max(abs(float(value(x + offset * h))) for offset in stencil.offsets)
    assert abs(found - float(slope)) <= 16 * 2.0**-52 * stencil.amplification * max(size, 1) / float(h)


@given(stencil=offset_sets)
def test_weights_sum_to_zero_and_the_first_moment_is_one(stencil: Stencil) -> None:
    offsets, weights = stencil.offsets, stencil.weights
    rounding = 64 * 2.0**-52 * max(1, stencil.amplification) * stencil.reach**stencil.order
    assert abs(sum(weights)) <= rounding
    for power in range(1, stencil.order + 1):
        moment = sum(w * c**power for c, w in zip(offsets, weights, strict=True))
        assert abs(moment - (power == 1)) <= rounding
    beyond = sum(w * c ** (stencil.order + 1) for c, w in zip(offsets, weights, strict=True))
    assert beyond / math.factorial(stencil.order + 1) == pytest.approx(stencil.error_constant, abs=rounding)
    assert abs(stencil.error_constant) > 0


def test_the_textbook_formulas_come_out() -> None:
    assert (forward().offsets, forward().weights, forward().order) == ((0, 1), (-1.0, 1.0), 1)
    assert (backward().offsets, backward().weights, backward().order) == ((-1, 0), (-1.0, 1.0), 1)
    assert (central().weights, central().order, central().error_constant) == ((-0.5, 0.5), 2, 1 / 6)
    assert central(4).weights == pytest.approx((1 / 12, -2 / 3, 2 / 3, -1 / 12), rel=1e-16)
    assert (central(4).order, central(4).error_constant) == (4, -1 / 30)


@pytest.mark.parametrize("name", STENCILS)
def test_a_one_sided_formula_costs_no_more_and_is_of_the_same_order(name: str) -> None:
    stencil = STENCILS[name]
    one_sided = stencil.one_sided()
    assert one_sided.order == stencil.order
    assert len(one_sided.evaluated) <= len(stencil.evaluated)
    assert min(one_sided.offsets) == 0


def test_what_is_left_of_a_formula() -> None:
    assert central(4).among([-2, -1, 1]) == Stencil((-2, -1, 0, 1))
    assert central().among([1]) == forward()
    assert forward().among([]) is None
    assert forward().mirrored().evaluated == backward().evaluated


def test_an_order_that_is_not_available_is_refused() -> None:
    with pytest.raises(ValueError, match=r"order must be one of \[2, 4\], got 3: .*forward\(\) has order 1"):
        central(order=3)


@pytest.mark.parametrize("offsets", [(), (0,), (1, 1)])
def test_too_few_offsets_are_refused(offsets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="offsets must be at least two different whole numbers"):
        Stencil(offsets)


@pytest.mark.parametrize("offsets", [[-1, 1], (-0.5, 0.5), (False, True), "01"])
def test_offsets_that_are_no_tuple_of_whole_numbers_are_refused(offsets: Any) -> None:
    with pytest.raises(TypeError, match=r"offsets must be a tuple of whole numbers .* write Stencil\(\(-1, 1\)\)"):
        Stencil(offsets)
