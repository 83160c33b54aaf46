"""Steps balance truncation and round-off, are powers of two, and never leave the bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ignite_tbptt.blackbox.block import Block
from ignite_tbptt.blackbox.moves import Coordinates, Directions, Gaussian, Rademacher
from ignite_tbptt.blackbox.estimator import CentralDifference, Estimator, ForwardDifference
from ignite_tbptt.blackbox.function import blackbox
from ignite_tbptt.blackbox.stencil import Stencil, backward, central, forward
from ignite_tbptt.blackbox.step_size import AbsoluteStep, BoundedStep, RelativeStep
from tests.blackbox.helpers import COORDINATE_ESTIMATORS

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


@pytest.mark.parametrize(
    ("dtype", "steps"), [(torch.float32, (3.5e-4, 4.9e-3, 4.1e-2)), (torch.float64, (1.5e-8, 6.1e-6, 7.4e-4))]
)
def test_relative_steps_are_powers_of_two_next_to_the_optimum(dtype: torch.dtype, steps: tuple[float, ...]) -> None:
    x = torch.tensor([0.0, -0.5, 1.0, 300.0, -1e5], dtype=dtype)
    for stencil, h in zip((forward(), central(), central(4)), steps, strict=True):
        found = RelativeStep().each(x, stencil, EPS[dtype]).sizes
        wanted = h * x.abs().clamp(min=1).double()
        assert found.dtype == dtype
        assert (torch.log2(found) % 1 == 0).all()
        # the nearest power of two is within a factor sqrt(2); the steps above have two digits
        assert ((found / wanted).log2().abs() < 0.5 + 0.03).all()


def test_steps_are_realised_without_rounding() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10
    h = RelativeStep().each(x, central(), EPS[torch.float32]).sizes
    # a step across a power of two may round: 0.06 % of elements, against 99.96 % for steps that are not powers of two
    assert ((x + h) - x != h).double().mean() < 0.002


@pytest.mark.parametrize("directions", [Coordinates(), Gaussian(1), Rademacher(1)])
@pytest.mark.parametrize("stencil", [forward(), central(), central(4)])
def test_slopes_are_over_the_step_that_rounding_left(stencil: Stencil, directions: Directions) -> None:
    # next to 1000 a float32 holds 0.1 to three digits only, and so would the slope; here nothing else is rounded
    x = torch.tensor([1000.0], requires_grad=True)
    f = blackbox(lambda x: x.detach() * 4, estimator=Estimator(stencil, directions, AbsoluteStep(0.1)))
    slope = torch.autograd.grad(f(x).sum(), x)[0]
    if isinstance(directions, Gaussian):
        d = next(
            directions.moves(Block.of([x.detach()], [None], [0], [0], ["x"]), stencil, AbsoluteStep(1.0), 1.0, 9, 0)
        )
        slope = slope / d.displacements.square().item()  # type: ignore[attr-defined]
    assert slope.item() == pytest.approx(4, rel=2.0**-22)


def test_a_factor_and_an_absolute_step_are_taken_as_given() -> None:
    x = torch.tensor([0.0, 8.0])
    assert RelativeStep(0.25).each(x, central(), 1e-7).sizes.tolist() == [0.25, 2.0]
    assert AbsoluteStep(0.3).each(x, central(), 1e-7).sizes.tolist() == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("h", [0.0, -1.0, math.nan, math.inf])
def test_steps_that_are_no_steps_are_refused(h: float) -> None:
    with pytest.raises(ValueError, match=r"h must be a positive, finite number, got .*RelativeStep\(\) chooses"):
        AbsoluteStep(h)
    with pytest.raises(ValueError, match="factor must be a positive, finite number"):
        RelativeStep(h)


@pytest.mark.parametrize("kind", COORDINATE_ESTIMATORS)
@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    h=st.floats(1e-6, 3),
    double=st.booleans(),
)
def test_a_bounded_function_is_never_evaluated_outside(kind: str, values: list[float], h: float, double: bool) -> None:
    seen: list[torch.Tensor] = []

    def square(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.detach() ** 2

    stencil = COORDINATE_ESTIMATORS[kind].stencil
    estimator = Estimator(stencil, step_size=BoundedStep(AbsoluteStep(h), 0.0, 1.0))
    x = torch.tensor(values, dtype=torch.float64 if double else torch.float32, requires_grad=True)
    blackbox(square, estimator=estimator)(x).sum().backward()
    assert all(((point >= 0) & (point <= 1)).all() for point in seen)
    assert x.grad is not None
    # truncation of at most h, and round-off of some eps over what is left of h where there is little room
    assert (x.grad - 2 * x).abs().max() <= 1.01 * h + 100 * EPS[x.dtype] / h


@pytest.mark.parametrize("order", [2, 4])
def test_at_a_bound_a_two_sided_formula_keeps_its_order(order: int) -> None:
    # exact on polynomials of its order, so what is left is round-off: some 10 eps / h
    step = BoundedStep(AbsoluteStep(0.01), 0.0, 1.0)
    x = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    f = blackbox(lambda x: x.detach() ** order, estimator=CentralDifference(order, step))
    f(x).sum().backward()
    assert f.nfev == order * 3
    assert x.grad is not None
    assert torch.allclose(x.grad, order * x.detach() ** (order - 1), rtol=0, atol=10 * 2.0**-52 / 0.01)


def test_rows_at_a_bound_turn_the_formula_for_their_column() -> None:
    step = BoundedStep(AbsoluteStep(0.125), 0.0, 1.0)
    x = torch.tensor([[0.0, 0.5], [0.3, 0.4], [1.0, 0.6], [0.87, 0.5]], dtype=torch.float64, requires_grad=True)
    seen: list[torch.Tensor] = []

    def square(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.detach() ** 2

    f = blackbox(square, estimator=CentralDifference(step_size=step), in_dims=0)
    f(x).sum().backward()
    # 0.87 has room for a step on both sides, not for the two that the one-sided formula takes
    assert all(((point >= 0) & (point <= 1)).all() for point in seen)
    assert f.nfev == 2 * 2 + 1
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * x.detach(), rtol=0, atol=1e-13)


def test_bounds_for_each_tensor() -> None:
    step = BoundedStep(AbsoluteStep(0.5), lower=(torch.tensor([0.0, -9.0]), None), upper=(1.0, None))
    f = blackbox(lambda x, w: (x * w).detach(), estimator=ForwardDifference(step))
    x = torch.tensor([0.75, -3.0], requires_grad=True)
    w = torch.tensor([7.0, 8.0], requires_grad=True)
    f(x, w).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [7.0, 8.0]


def test_bounds_that_exclude_x_are_refused() -> None:
    f = blackbox(lambda x: x.detach(), estimator=CentralDifference(step_size=BoundedStep(RelativeStep(), 0.0, 1.0)))
    with pytest.raises(ValueError, match=r"upper excludes x: element \(1,\) of differentiated tensor 0 is 1\.5, 0\.5"):
        f(torch.tensor([0.5, 1.5], requires_grad=True)).sum().backward()


def test_bounds_without_room_are_refused() -> None:
    step = BoundedStep(RelativeStep(), 1.0, 1.0)
    f = blackbox(lambda x: x.detach(), estimator=Estimator(backward(), step_size=step))
    with pytest.raises(ValueError, match="leave no room to move differentiated tensor 0"):
        f(torch.ones(2, requires_grad=True)).sum().backward()


def test_bounds_of_another_shape_are_refused() -> None:
    step = BoundedStep(RelativeStep(), torch.zeros(3))
    with pytest.raises(ValueError, match=r"lower of shape \(3,\) does not broadcast against .* of shape \(2,\)"):
        step.each(torch.ones(2), central(), 1e-7)
    with pytest.raises(ValueError, match="lower has 1 entries, but there are more tensors"):
        BoundedStep(RelativeStep(), (0.0,)).each(torch.ones(2), central(), 1e-7, position=1)


def test_random_directions_keep_each_tensor_in_its_own_bounds() -> None:
    # with rows of its own, x is moved apart from the rate that all rows share
    rates: list[float] = []

    def f(x: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
        rates.append(float(rate))
        return x * rate

    bounded = BoundedStep(AbsoluteStep(0.1), lower=(-10.0, 0.0), upper=(10.0, 100.0))
    x = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([0.05], dtype=torch.float64, requires_grad=True)
    function = blackbox(f, estimator=Estimator(central(), Rademacher(4), bounded), in_dims=(0, None))
    function(x, rate).sum().backward()
    assert min(rates) >= 0.0
    assert len(set(rates)) > 1
