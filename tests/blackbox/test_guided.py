"""Directions that remember, against closed forms, and their state across a stop."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from torch import Tensor, nn

from ignite_tbptt.blackbox import (
    AbsoluteStep,
    Blackbox,
    BoundedStep,
    CentralDifference,
    Estimator,
    FiniteDifferenceGradients,
    GuidedDirections,
    PerInputStep,
    RelativeStep,
    blackbox,
    central,
)


def guided(n: int, **options: Any) -> Estimator:
    # functions below are linear or quadratic, so that wide steps leave no truncation and little round-off
    return Estimator(central(), GuidedDirections(n, **options), AbsoluteStep(0.5))


def linear(slope: Tensor, estimator: Estimator) -> Any:
    return blackbox(lambda x: (slope * x).sum().detach(), estimator=estimator)


def gradient(f: Any, x: Tensor) -> Tensor:
    return torch.autograd.grad(f(x), x)[0]


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64, requires_grad=True)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_estimate_is_a_projection_of_the_gradient() -> None:
    slope, x = normal(200), zeros(200)
    found = gradient(linear(slope, guided(10)), x)
    # <p, g> = <p, p> for a projection p of g
    assert found @ slope == pytest.approx(float(found @ found), rel=1e-9)
    # its share of the gradient is (n / D) of |g|^2 in the mean, with a spread of about sqrt(2 n) / D
    assert abs(float(found @ found / (slope @ slope)) - 10 / 200) < 4 * math.sqrt(20) / 200


def test_what_was_found_before_is_kept_and_grows() -> None:
    """Every estimate of a constant gradient adds a share (n - 1) / (D - 1) of what is missing."""
    slope, x = normal(400), zeros(400)
    f = linear(slope, guided(21))
    missing = []
    for _ in range(30):
        found = gradient(f, x)
        missing.append(float((slope - found).square().sum() / slope.square().sum()))
    assert all(after < before for before, after in itertools.pairwise(missing))
    share = 20 / 399
    # 30 draws of shares whose relative spread is sqrt(2 / 20) each
    assert math.log(missing[-1]) == pytest.approx(30 * math.log(1 - share), rel=4 * math.sqrt(2 / 20 / 30))


def test_several_guides_span_all_that_they_saw() -> None:
    slopes, x = normal(2, 50), zeros(50)
    one, other = (linear(slope, guided(50)) for slope in slopes)
    f = blackbox(lambda x, k: (slopes[k] * x).sum().detach(), estimator=guided(5, guides=2))
    state = f.state_dict()
    state["memories"] = {"0": [gradient(one, x).view(1, -1), gradient(other, x).view(1, -1)]}
    for k in range(2):
        f.load_state_dict(state)
        assert torch.allclose(torch.autograd.grad(f(x, k), x)[0], slopes[k], atol=1e-10)


def test_a_surrogate_is_looked_along() -> None:
    slope, x = normal(500), zeros(500)
    f = linear(slope, guided(3, surrogate=lambda x, position: -7 * slope))
    assert torch.allclose(gradient(f, x), slope, atol=1e-10)


@pytest.mark.parametrize("step_size", [RelativeStep(), RelativeStep(floor=0), PerInputStep((AbsoluteStep(0.01),))])
def test_as_many_directions_as_elements_are_exact_in_any_units(step_size: Any) -> None:
    slope = normal(6)
    x = torch.tensor([300.0, 1e4, 0.2, -5.0, 1.0, 70.0], dtype=torch.float64, requires_grad=True)
    f = blackbox(lambda x: (slope * x).sum().detach(), estimator=Estimator(central(), GuidedDirections(8), step_size))
    for _ in range(2):
        found = gradient(f, x)
        # the sum, of size 1e4, is known to 1e-12, and steps are 1e-6 at the least
        assert torch.allclose(found, slope, atol=1e-5)
    assert f.nfev == 2 * 12


def test_bounds_hold_along_a_guide_too() -> None:
    lower, seen = 0.0, []

    def root(x: Tensor) -> Tensor:
        seen.append(float(x.min()))
        return x.sqrt().sum().detach()

    estimator = Estimator(central(), GuidedDirections(4), BoundedStep(AbsoluteStep(0.01), lower=lower))
    f = blackbox(root, estimator=estimator)
    x = torch.full((9,), 0.02, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        gradient(f, x)
    assert min(seen) >= lower


def test_rows_remember_each_their_own() -> None:
    slopes = normal(3, 60)
    x = zeros(3, 60)
    f = blackbox(lambda x: (slopes * x).sum(1).detach(), estimator=guided(20), in_dims=0)
    for _ in range(25):
        found = torch.autograd.grad(f(x).sum(), x)[0]
    share = 19 / 59
    missing = (found - slopes).square().sum(1) / slopes.square().sum(1)
    assert (missing.log() < 0.5 * 25 * math.log(1 - share)).all()
    fewer = x.detach()[:2].clone().requires_grad_()
    g = blackbox(lambda x: (slopes[: len(x)] * x).sum(1).detach(), estimator=guided(20), in_dims=0)
    g.load_state_dict(f.state_dict())
    again = torch.autograd.grad(g(fewer).sum(), fewer)[0]
    assert (again - slopes[:2]).square().sum(1).min() > 0.2 * slopes[:2].square().sum(1).min()


def test_a_cotangent_that_is_not_finite_is_not_remembered() -> None:
    slope, x = normal(40), zeros(40)
    f = linear(slope, guided(10))
    gradient(f, x)
    before = f.state_dict()["memories"]
    torch.autograd.grad(f(x), x, grad_outputs=torch.tensor(math.inf, dtype=torch.float64))
    torch.autograd.grad(f(x), x, grad_outputs=torch.tensor(0.0, dtype=torch.float64))
    after = f.state_dict()["memories"]
    assert torch.equal(before["0"][0], after["0"][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be a whole number of directions, at least 1, got 0"),
        ({"n": 5, "guides": 0}, "guides must be a whole number of directions, at least 1, got 0"),
        ({"n": 2, "guides": 2}, "n=2 directions are used up by the guides.*give n of 3 or more"),
        ({"n": 2, "surrogate": lambda x, position: x}, "n=2 directions are used up .*give n of 3 or more"),
    ],
)
def test_numbers_that_leave_nothing_to_look_at(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidedDirections(**options)


def test_a_surrogate_that_is_no_function_or_gives_another_shape() -> None:
    with pytest.raises(TypeError, match="surrogate must be a function of an input and its position, got 3"):
        GuidedDirections(4, surrogate=3)  # type: ignore[arg-type]  # wrong on purpose
    f = linear(normal(5), guided(4, surrogate=lambda x, position: x[:2]))
    with pytest.raises(ValueError, match=r"surrogate gave \(2,\) for the differentiated input 0 of shape \(5,\)"):
        gradient(f, zeros(5))


class Cube(nn.Module):
    """Of numpy, with 30 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 30))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor((self.weight.detach().numpy() ** 3).sum() * x.detach().numpy())


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_module_goes_on_bit_for_bit_from_its_state_dict() -> None:
    def gradients(count: int, state: Any = None) -> tuple[list[Tensor], Any]:
        model = nn.Sequential(Blackbox(Cube(), estimator=Estimator(central(), GuidedDirections(4))))
        if state is not None:
            model.load_state_dict(state)
        weight = next(model.parameters())
        found = [torch.autograd.grad(model(torch.ones(1)).sum(), weight)[0] for _ in range(count)]
        return found, saved(model.state_dict())

    whole, _ = gradients(5)
    first, state = gradients(3)
    rest, _ = gradients(2, state)
    assert all(map(torch.equal, whole, first + rest))
    assert not torch.equal(whole[3], gradients(1)[0][0])
    nn.Sequential(Blackbox(Cube())).load_state_dict(state)


def test_a_module_whose_directions_are_not_random_has_no_state_of_them() -> None:
    assert list(Blackbox(Cube(), estimator=CentralDifference()).state_dict()) == ["module.weight"]


def test_states_that_are_none_or_of_other_modules() -> None:
    with pytest.raises(ValueError, match="state_dict must have 'calls' and 'memories', got"):
        blackbox(torch.sin, estimator=guided(4)).load_state_dict({"weight": 1})
    handler = FiniteDifferenceGradients(nn.Sequential(Cube()), ["0"])
    with pytest.raises(ValueError, match=r"modules \['cell'\] that are not among the chosen \['0'\]"):
        handler.load_state_dict({"cell": {}})


def train(steps: int, state: Any = None) -> tuple[list[float], Any]:
    """Weights after each step, and the state of a checkpoint after the last."""
    model = nn.Sequential(Cube())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)

    def update(engine: Engine, batch: Tensor) -> float:
        optimizer.zero_grad()
        loss = model(batch).sum()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    trainer = Engine(update)
    handler = FiniteDifferenceGradients(model, ["0"], estimator=Estimator(central(), GuidedDirections(6)))
    if state is not None:
        model.load_state_dict(state["model"])
        handler.load_state_dict(state["gradients"])
    with handler.attach(trainer):
        trainer.run([torch.ones(1)] * steps, max_epochs=1)
        found = {"model": model.state_dict(), "gradients": handler.state_dict()}
    return list(model.state_dict()["0.weight"]), saved(found)


def test_a_trainer_that_is_resumed_goes_on_bit_for_bit() -> None:
    whole, _ = train(7)
    _, state = train(3)
    resumed, _ = train(4, state)
    assert whole == resumed
    state["gradients"]["0"]["memories"] = {}
    assert train(4, state)[0] != whole
