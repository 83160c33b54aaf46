"""Steps balance truncation and round-off, are powers of two, and never leave the bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ignite_tbptt.blackbox.block import Block
from ignite_tbptt.blackbox.coordinates import Coordinates
from ignite_tbptt.blackbox.estimator import CentralDifference, Estimator, ForwardDifference
from ignite_tbptt.blackbox.function import blackbox
from ignite_tbptt.blackbox.moves import Directions
from ignite_tbptt.blackbox.random_directions import Gaussian, Rademacher
from ignite_tbptt.blackbox.stencil import Stencil, backward, central, forward
from ignite_tbptt.blackbox.step_size import (
    AbsoluteStep,
    BoundedStep,
    PerInputStep,
    RelativeStep,
    Steps,
    StepSize,
    steps_around,
)
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
            directions.moves(
                Block.of([x.detach()], [None], [0], [0], ["x"]),
                stencil,
                AbsoluteStep(1.0),
                1.0,
                9,
                f._facts.draw(1, 0, 0),
            )
        )
        slope = slope / d.drawn(0).square().item()  # type: ignore[attr-defined]
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
    assert f.nfev == 2 * 2
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


@dataclass(frozen=True)
class Backwards:
    """A user's own step size: to the left, in both senses."""

    h: float
    one_sided: bool = False

    def each(self, x: Tensor, stencil: Stencil, eps: float, position: int = 0) -> Steps:
        return Steps(torch.full_like(x, -self.h), torch.ones_like(x, dtype=torch.bool) if self.one_sided else None)

    def inside(self, x: Tensor, position: int) -> Tensor:
        return x


INNER: dict[str, Callable[[float], StepSize]] = {
    "absolute": AbsoluteStep,
    "absolute, a tensor": lambda h: AbsoluteStep(torch.tensor([h])),
    "relative": RelativeStep,
    "negative": Backwards,
    "per input": lambda h: PerInputStep((AbsoluteStep(h),)),
}
NESTED: dict[str, Callable[[StepSize, float, float], StepSize]] = {
    "once": BoundedStep,
    "upper inside lower": lambda inner, lower, upper: BoundedStep(BoundedStep(inner, upper=upper), lower=lower),
    "lower inside upper": lambda inner, lower, upper: BoundedStep(BoundedStep(inner, lower=lower), upper=upper),
    "wider outside": lambda inner, lower, upper: BoundedStep(BoundedStep(inner, lower, upper), lower - 1, upper + 1),
    "for each input": lambda inner, lower, upper: BoundedStep(
        PerInputStep((BoundedStep(inner, upper=upper),)), (lower,), (None,)
    ),
}


@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("kind", COORDINATE_ESTIMATORS)
@settings(max_examples=8)
@given(
    lower=st.floats(-100, 100),
    width=st.floats(0.01, 1e3),
    shares=st.lists(st.sampled_from([0.0, 1.0, 0.5, 1e-3, 0.999]) | st.floats(0, 1), min_size=1, max_size=4),
    h=st.floats(0.01, 30),
    double=st.booleans(),
)
def test_bounds_hold_however_they_are_nested(
    kind: str, inner: str, nested: str, lower: float, width: float, shares: list[float], h: float, double: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    low, high = torch.tensor(lower, dtype=dtype), torch.tensor(lower + width, dtype=dtype)
    x = (low + (high - low) * torch.tensor(shares, dtype=dtype)).clamp(low, high)
    stencil = COORDINATE_ESTIMATORS[kind].stencil
    step_size = NESTED[nested](INNER[inner](h), float(low), float(high))
    seen: list[Tensor] = []

    def line(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x.detach() * 3

    x.requires_grad_()
    blackbox(line, estimator=Estimator(stencil, step_size=step_size))(x).sum().backward()
    assert all(((low <= point) & (point <= high)).all() for point in seen)
    assert x.grad is not None
    # A line has no truncation. The product 3 x and the sum over four elements round by some eps of their size in each
    # evaluation; the weights and what is left of the step, at least a quarter of a half of the room, multiply that.
    left = min(h / 2, float(high - low) / 16)
    assert (x.grad - 3).abs().max() <= 32 * EPS[dtype] * 12 * max(abs(lower), abs(lower + width), 1) / left


def test_a_step_that_goes_to_one_side_only_stays_there() -> None:
    x = torch.tensor([0.5, 0.9, 0.2], dtype=torch.float64)
    steps = BoundedStep(Backwards(0.05, one_sided=True), 0.0, 1.0).each(x, central(), EPS[x.dtype])
    assert steps.one_sided is not None
    assert steps.one_sided.all()
    assert (steps.sizes == -0.05).all()


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("half", [0.002, 0.0005, 0.0001])
def test_in_a_tight_box_the_better_formula_is_taken(half: float, order: int) -> None:
    x = torch.rand(400, generator=torch.Generator().manual_seed(0)) + 0.5
    box = BoundedStep(RelativeStep(), x - half, x + half)
    stencil = central(order)
    assert box.each(x, stencil, EPS[x.dtype]).one_sided is None
    errors = {}
    for name, formula in {"taken": stencil, "one-sided": stencil.one_sided()}.items():
        point = x.clone().requires_grad_()
        blackbox(lambda x: x.detach().sin(), estimator=Estimator(formula, step_size=box))(point).sum().backward()
        assert point.grad is not None
        errors[name] = float((point.grad - x.double().cos()).square().mean().sqrt())
    # Round-off rules here. One-sided formulas have weights and a reach twice as large, in the same room.
    assert errors["taken"] < errors["one-sided"] / 2
    # half an eps in each value, which is below one, and as much in x
    assert errors["taken"] <= stencil.amplification * stencil.reach * EPS[x.dtype] / half


def test_at_the_edge_of_a_box_the_formula_turns() -> None:
    x = torch.tensor([1e-5, 0.5, 1 - 1e-5], dtype=torch.float64)
    steps = BoundedStep(AbsoluteStep(0.01), 0.0, 1.0).each(x, central(), EPS[x.dtype])
    assert steps.one_sided is not None
    assert steps.one_sided.tolist() == [True, False, True]
    assert steps.sizes.sign().tolist() == [1, 1, -1]


@pytest.mark.parametrize("bad", [math.nan, torch.tensor([0.0, math.nan]), (None, math.nan), (torch.tensor(math.nan),)])
def test_bounds_that_are_not_a_number_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="lower must not be NaN"):
        BoundedStep(RelativeStep(), lower=bad)
    with pytest.raises(ValueError, match="upper must not be NaN"):
        BoundedStep(RelativeStep(), upper=bad)


def gradient(
    f: Callable[..., Tensor], step_size: StepSize, *inputs: Tensor, in_dims: int | None = None
) -> list[Tensor]:
    """By central differences."""
    xs = [x.clone().requires_grad_() for x in inputs]
    function = blackbox(
        lambda *xs: f(*(x.detach() for x in xs)), estimator=CentralDifference(2, step_size), in_dims=in_dims
    )
    return list(torch.autograd.grad(function(*xs).sum(), xs))


def true_gradient(f: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    xs = [x.double().clone().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(f(*xs).sum(), xs))


def resonance(capacity: Tensor, inductance: Tensor) -> Tensor:
    """Frequency of a circuit of nanofarads and henries."""
    return 1 / (capacity * inductance).sqrt() / (2 * math.pi)


CAPACITY = torch.tensor([1e-9, 3e-12, 2e-6], dtype=torch.float64)
INDUCTANCE = torch.tensor([0.5, 20.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("in_dims", [None, 0])
@pytest.mark.parametrize(
    "step_size",
    [
        RelativeStep(floor=0),
        PerInputStep((RelativeStep(floor=0), AbsoluteStep(1e-6))),
        PerInputStep((AbsoluteStep(torch.tensor([1e-14, 1e-17, 1e-11])), RelativeStep())),
        PerInputStep((RelativeStep(1e-5, floor=torch.tensor([1e-9, 1e-12, 1e-6])), RelativeStep())),
        PerInputStep((RelativeStep(torch.tensor([1e-5, 1e-6, 1e-5]), floor=0), RelativeStep())),
    ],
)
def test_steps_suit_the_scale_of_each_input_and_each_element(step_size: StepSize, in_dims: int | None) -> None:
    # where rows are shared all three frequencies are in one sum, so that each element is differentiated on its own
    f = resonance
    found = gradient(f, step_size, CAPACITY, INDUCTANCE, in_dims=in_dims)
    for got, true in zip(found, true_gradient(f, CAPACITY, INDUCTANCE), strict=True):
        # h between 4e-8 and 1e-5 of x: truncation 5/8 (h / x)^2 is below 7e-11, round-off 2 eps x / h below 1.2e-8
        assert ((got - true) / true).abs().max() < 1.3e-8


def test_a_step_for_each_element_is_taken_as_given() -> None:
    x = torch.zeros(2, 3)
    assert AbsoluteStep(torch.tensor([1.0, 2.0, 4.0])).each(x, central(), 1e-7).sizes.tolist() == [[1.0, 2.0, 4.0]] * 2
    each = PerInputStep((AbsoluteStep(0.5), AbsoluteStep(0.25)))
    assert [float(each.each(x, central(), 1e-7, position).sizes[0, 0]) for position in (0, 1)] == [0.5, 0.25]
    with pytest.raises(ValueError, match="step_sizes has 2 entries, but there are more tensors"):
        each.each(x, central(), 1e-7, 2)
    with pytest.raises(ValueError, match=r"h of shape \(2,\) does not broadcast against differentiated tensor 0"):
        AbsoluteStep(torch.ones(2)).each(x, central(), 1e-7)
    with pytest.raises(ValueError, match="h must be a positive, finite number"):
        AbsoluteStep(torch.tensor([1.0, 0.0]))


def test_an_element_without_a_scale_is_refused_a_relative_step() -> None:
    step = RelativeStep(floor=0)
    with pytest.raises(ValueError, match=r"floor leaves no step to element \(0, 1\) of differentiated tensor 3"):
        step.each(torch.tensor([[1.0, 0.0]]), central(), EPS[torch.float32], 3)
    assert (RelativeStep(floor=1e-9).each(torch.zeros(2), central(), EPS[torch.float32]).sizes > 0).all()
    for floor in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="floor must be finite and not negative"):
            RelativeStep(floor=floor)


@pytest.mark.parametrize("directions", [Coordinates(), Rademacher(2), Gaussian(2)])
@pytest.mark.parametrize("stencil", [forward(), central(), central(4)])
def test_a_step_lost_in_rounding_is_told_to_be_larger(stencil: Stencil, directions: Directions) -> None:
    f = blackbox(lambda x: x.detach() * 2, estimator=Estimator(stencil, directions, AbsoluteStep(1e-4)))
    x = torch.tensor([1.0, 1e4], requires_grad=True)
    with pytest.raises(ValueError, match=r"h gives a step of 0.0001, .* next to an x of 10000 .* larger step, 0.0048"):
        f(x).sum().backward()
    # what is advised is enough: the slope of a line, over the step as realised
    (found,) = gradient(lambda x: x * 2, AbsoluteStep(0.0048), x.detach()[1:])
    assert found.item() == 2.0


def test_bounds_too_narrow_for_the_precision_say_so() -> None:
    x = torch.tensor([1e8])
    with pytest.raises(ValueError, match="the room between lower and upper gives a step of 1, which is lost"):
        BoundedStep(AbsoluteStep(100.0), x - 8, x + 8).each(x, Stencil((-8, 8)), 1e-7)


def test_orthogonal_directions_in_units_of_each_step_are_exact_whatever_the_units() -> None:
    def f(x: Tensor) -> Tensor:
        return (x[0] / 300 + (x[1] / 1e5) ** 2) * torch.exp(x[2])

    x = torch.tensor([300.0, 1e5, 0.2], dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    directions = q.T * math.sqrt(3)
    h = steps_around(RelativeStep(), x, central(), EPS[x.dtype], float(directions.abs().max()))
    slopes = torch.stack([(f(x + h * d) - f(x - h * d)) / 2 for d in directions])
    found = (slopes[:, None] * directions / h).mean(0)
    (true,) = true_gradient(f, x)
    # relative steps of 4 to 9e-6: truncation and round-off are some 1e-10 of each slope, in units of its own step
    assert ((found - true) / true).abs().max() < 1e-8


@given(
    lower=st.floats(-100, 100),
    width=st.floats(0.01, 1e3),
    share=st.floats(0.2, 0.8),
    h=st.floats(0.01, 30),
    scale=st.floats(1, 4),
    double=st.booleans(),
)
def test_steps_around_keep_all_elements_inside(
    lower: float, width: float, share: float, h: float, scale: float, double: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    low, high = torch.tensor([lower], dtype=dtype), torch.tensor([lower + width], dtype=dtype)
    x = low + (high - low) * share
    box = BoundedStep(BoundedStep(AbsoluteStep(h), upper=high), lower=low)
    try:
        steps = steps_around(box, x, central(4), EPS[dtype], scale)
    except ValueError:
        assert float(torch.minimum(x - low, high - x)) / scale / 2 < h / 4 * 1.001
        return
    for c in (-2, -1, 1, 2):
        assert low <= x + c * (steps * scale) <= high
