"""Certificates, against errors that are known: of directions, of truncation, of noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from scipy import stats
from torch import Tensor, nn

from ignite_tbptt import Tbptt_Events, create_supervised_tbptt_trainer
from ignite_tbptt.blackbox import (
    SPSA,
    AbsoluteStep,
    Blackbox,
    BoundedStep,
    CentralDifference,
    Certify,
    Estimator,
    FiniteDifferenceGradients,
    ForwardDifference,
    GaussianSmoothing,
    GuidedDirections,
    MeasuredStep,
    UntrustedGradientWarning,
    blackbox,
    central,
)
from ignite_tbptt.blackbox.certificate import _WIGGLES, quantile

Case = Callable[[np.random.Generator], tuple[Any, Tensor, Tensor]]


def directions(estimator: Any) -> Case:
    def case(generator: np.random.Generator) -> tuple[Any, Tensor, Tensor]:
        slope = torch.from_numpy(generator.normal(size=200))
        f = blackbox(lambda x: (slope * x).sum().detach(), estimator=estimator, certify=1)
        return f, torch.zeros(200, dtype=torch.float64), slope

    return case


def truncation(estimator: Any) -> Case:
    def case(generator: np.random.Generator) -> tuple[Any, Tensor, Tensor]:
        x = torch.from_numpy(generator.normal(size=10))
        return blackbox(lambda x: np.sin(x).sum(), numpy=True, estimator=estimator, certify=1), x, x.cos()

    return case


def noise(sigma: float) -> Case:
    def case(generator: np.random.Generator) -> tuple[Any, Tensor, Tensor]:
        def rosenbrock(x: Any) -> Any:
            value = (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
            return value + sigma * generator.standard_normal()

        x = torch.from_numpy(generator.uniform(-1, 1, 4))
        estimator = CentralDifference(step_size=MeasuredStep())
        f = blackbox(rosenbrock, numpy=True, repeatable=False, estimator=estimator, certify=10)
        y = x.clone().requires_grad_()
        value = (100 * (y[1:] - y[:-1] ** 2) ** 2 + (1 - y[:-1]) ** 2).sum()
        return f, x, torch.autograd.grad(value, y)[0]

    return case


@pytest.mark.parametrize(
    "case",
    [
        directions(SPSA(20)),
        directions(Estimator(central(), GuidedDirections(20))),
        truncation(CentralDifference(step_size=AbsoluteStep(0.1))),
        truncation(ForwardDifference(step_size=AbsoluteStep(0.01))),
        noise(1e-6),
        noise(1e-2),
    ],
    ids=["spsa", "guided", "truncation", "truncation, one-sided", "noise 1e-6", "noise 1e-2"],
)
@pytest.mark.filterwarnings("ignore::ignite_tbptt.blackbox.UntrustedGradientWarning")
def test_intervals_hold_the_true_error_as_often_as_they_say(case: Case) -> None:
    generator, inside, count, ratios = np.random.default_rng(0), 0, 200, []
    alive = []  # blackboxes that live at the same time draw directions of their own
    for _ in range(count):
        f, x, true = case(generator)
        x.requires_grad_()
        alive.append(f)
        (found,) = torch.autograd.grad(f(x).sum(), x)
        # errors are in units of the steps, which are the same for all elements here
        error = float((found - true).norm() / found.norm())
        inside += f.certificate.low <= error <= f.certificate.high
        ratios.append(f.certificate.relative / error)
        # of chi-square with 2 degrees of freedom and more
        assert f.certificate.high <= 6.3 * f.certificate.relative
    # 95 %, up to three standard errors of the count; those that allow for their own noise hold it more often
    assert inside / count >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / count)
    # the median of a root mean square of 2 normal numbers is sqrt(log 2) = 0.83, up to the noise of 4 elements' slopes
    assert 0.7 <= np.median(ratios) <= 1.2


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("estimator", [CentralDifference, ForwardDifference])
@pytest.mark.filterwarnings("ignore::ignite_tbptt.blackbox.UntrustedGradientWarning")
def test_noise_makes_as_much_of_the_error_as_the_formula_says(estimator: Any, rows: int | None) -> None:
    """Of a plane with noise there is no other error: in each column and row the noise times the weights over h."""
    generator, sigma, h = np.random.default_rng(0), 1e-6, 0.5
    slope = torch.arange(1, 5, dtype=torch.float64)
    weights = 0.5 if estimator is CentralDifference else 2.0
    f: Any = blackbox(
        lambda x: (x * slope.numpy()).sum(-1) + sigma * generator.standard_normal(rows),
        numpy=True,
        repeatable=False,
        in_dims=None if rows is None else 0,
        estimator=estimator(step_size=AbsoluteStep(h)),
        certify=1,
    )
    x = torch.arange(4 * (rows or 1), dtype=torch.float64).view((4,) if rows is None else (rows, 4)).requires_grad_()
    told, errors = [], []
    for _ in range(200):
        (found,) = torch.autograd.grad(f(x).sum(), x)
        told.append((f.certificate.noise * float(found.norm())) ** 2)
        errors.append(float((found - slope).norm()) ** 2)
    expected = x.numel() * weights * (sigma / h) ** 2
    # errors are of chi-square, with one degree of freedom at the least, as f(x) is common to one-sided slopes; of the
    # noise 8 certificates of 200 look at it, with 2 degrees each; three standard errors
    assert np.mean(errors) == pytest.approx(expected, rel=3 * math.sqrt(2 / 200))
    assert told[-1] == pytest.approx(expected, rel=3 * math.sqrt(2 / (2 * 8)))


def test_wiggles_see_noise_alone() -> None:
    places = np.array([-1, -0.5, -0.25, 0, 0.25, 0.5, 1])
    for wiggle in _WIGGLES:
        assert all(abs(places**degree @ np.array(wiggle)) < 1e-12 for degree in range(5))
    assert not np.dot(*_WIGGLES)


def test_truncation_is_what_noise_leaves() -> None:
    f: Any = blackbox(np.exp, numpy=True, estimator=CentralDifference(step_size=AbsoluteStep(0.125)), certify=1)
    x = torch.linspace(0, 1, 6, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(f(x).sum(), x)
    error = float((found - x.detach().exp()).norm() / found.norm())
    made = f.certificate
    # a smooth function leaves next to nothing beyond degree 4
    assert made.noise < 0.05 * made.relative
    assert made.truncation == pytest.approx(made.relative, rel=0.01)
    assert made.low <= error <= made.high
    assert str(made).endswith(f"directions held out; noise makes {made.noise:.2g} of it")
    g = blackbox(square, estimator=SPSA(2), certify=1)
    torch.autograd.grad(g(x), x)
    assert g.certificate is not None
    assert g.certificate.noise is g.certificate.truncation is None


@pytest.mark.parametrize("degrees", [1, 2, 5, 16])
@pytest.mark.parametrize("p", [0.025, 0.5, 0.975])
def test_quantiles_of_chi_square(degrees: int, p: float) -> None:
    assert quantile(p, degrees) == pytest.approx(stats.chi2.ppf(p, degrees), rel=1e-9)


def square(x: Tensor) -> Tensor:
    return (x**2).sum().detach()


def test_every_so_many_gradients_are_certified_for_a_tenth_of_the_evaluations() -> None:
    f = blackbox(square, certify=10)
    x = torch.ones(10, dtype=torch.float64, requires_grad=True)
    plain = blackbox(square)
    seen = []
    for _ in range(20):
        torch.autograd.grad(f(x), x)
        torch.autograd.grad(plain(x), x)
        assert f.certificate is not None
        seen.append(f.certificate.gradient)
    assert seen == [1] * 10 + [11] * 10
    more = f.count.probes - plain.count.probes
    assert f.nfev == plain.nfev == 400
    assert 0 < more <= 0.1 * f.nfev
    assert "certificate: gradient 11 is off by" in f.report()
    assert plain.certificate is None


def test_gradients_are_the_same_with_and_without() -> None:
    def noisy(x: Tensor) -> Tensor:
        return (x**3 + torch.randn(3, dtype=torch.float64)).detach()

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    plain = [torch.autograd.grad(blackbox(noisy)(x).sum(), x)[0] for _ in range(3)]
    after = torch.rand(1)
    torch.manual_seed(1)
    certified = [torch.autograd.grad(blackbox(noisy, certify=1)(x).sum(), x)[0] for _ in range(3)]
    assert all(map(torch.equal, plain, certified))
    assert torch.equal(after, torch.rand(1))


def test_a_window_is_certified_call_by_call() -> None:
    f = blackbox(lambda x: (x**2).detach(), in_dims=0, certify=2)
    x = torch.linspace(1, 2, 4, dtype=torch.float64)[:, None].requires_grad_()
    y = x
    for _ in range(5):
        y = f(y) * 0.5
    y.sum().backward()
    assert f.certificate is not None
    assert f.certificate.gradient == 5
    assert f.certificate.relative < 1e-7


def test_a_tolerance_warns_at_the_line_of_the_user() -> None:
    x = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    f = blackbox(lambda x: x.sum().detach(), estimator=SPSA(2), certify=Certify(1, tolerance=0.1))
    with pytest.warns(UntrustedGradientWarning, match=r"is off by .* and the tolerance is 0\.1; step_sweep") as told:
        f(x).backward()
    assert told[0].filename == __file__
    g = blackbox(lambda x: x.sum().detach(), certify=Certify(1, tolerance=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        g(x).backward()


def test_bounds_hold_for_certificates() -> None:
    seen = []

    def inside(x: Tensor) -> Tensor:
        seen.append(float(x.min()))
        return x.sum().detach()

    f = blackbox(inside, estimator=CentralDifference(step_size=BoundedStep(AbsoluteStep(0.01), lower=0.0)), certify=1)
    f(torch.full((9,), 0.05, dtype=torch.float64, requires_grad=True)).backward()
    assert min(seen) >= 0
    assert f.certificate is not None
    with pytest.warns(UntrustedGradientWarning, match="could not be certified: bounds leave"):
        f(torch.full((9,), 1e-9, dtype=torch.float64, requires_grad=True)).backward()


def test_a_domain_that_ends_nearby_is_told_once() -> None:
    estimator = ForwardDifference(step_size=AbsoluteStep(0.01))
    f = blackbox(lambda x: torch.where(x < 0, torch.nan, x).sum().detach(), estimator=estimator, certify=1)
    x = torch.full((2,), 1e-3, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UntrustedGradientWarning, match="could not be certified: it is NaN or infinite"):
        f(x).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(x).backward()


def test_cotangents_that_are_not_finite_or_zero_certify_nothing_wrong() -> None:
    f = blackbox(square, certify=1)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(f(x), x, torch.tensor(math.nan, dtype=torch.float64))
    assert f.certificate is None
    torch.autograd.grad(f(x), x, torch.tensor(0.0, dtype=torch.float64))
    assert f.certificate is not None
    assert (f.certificate.low, f.certificate.relative, f.certificate.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: blackbox(square, certify=0), "certify must be a whole number of gradients, .* got 0"),
        (lambda: Blackbox(square, certify=True), "certify must be a whole number of gradients, .* got True"),
        (lambda: blackbox(square, certify=Certify(1, tolerance=-1)), "tolerance must be a positive, finite number"),
        (
            lambda: blackbox(square, certify=1, estimator=GaussianSmoothing(3, 0.1)),
            "certify compares a gradient with slopes of the function, and Gaussian directions",
        ),
    ],
)
def test_what_cannot_be_certified(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNN(1, 3)
        self.simulator = Simulator()

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, hidden = self.cell(x, hidden)
        return self.simulator(y), hidden


class Simulator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.ones(3))

    def forward(self, y: Tensor) -> Tensor:
        return torch.from_numpy((y.detach().numpy() * self.gains.detach().numpy()).sum(-1, keepdims=True))


@pytest.mark.parametrize(("estimator", "withheld"), [(SPSA(1), True), (CentralDifference(), False)])
def test_a_step_is_withheld_where_its_gradient_is_off(estimator: Estimator, withheld: bool) -> None:
    torch.manual_seed(0)
    model = Recurrent()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    trainer = create_supervised_tbptt_trainer(model, optimizer, nn.functional.mse_loss, 2)
    handler = FiniteDifferenceGradients(model, "simulator", estimator=estimator, certify=1)
    handler.withhold_steps(trainer, Tbptt_Events.BACKWARD_COMPLETED, optimizer, above=0.3)
    before = [parameter.clone() for parameter in model.parameters()]
    told: list[float] = []
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda engine: told.append(engine.state.gradient_error),
    )
    with handler.attach(trainer):
        trainer.run([(torch.randn(4, 2, 1), torch.randn(4, 2, 1))])
    assert withheld == all(map(torch.equal, before, model.parameters()))
    assert (told[0] > 0.3) == withheld
    assert list(handler.certificates) == ["simulator"]


def test_the_worst_call_of_a_window_counts_and_what_was_seen_before_does_not() -> None:
    torch.manual_seed(0)
    simulator = Simulator()
    model = nn.Sequential(simulator)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handler = FiniteDifferenceGradients(model, "0", estimator=SPSA(1), certify=1)
    # the call that is made first, to which backward comes last, has the gradient zero, which is exact
    exact, wrong = torch.zeros(1, 3), torch.ones(1, 3)

    def step(engine: Engine, batch: Tensor) -> None:
        optimizer.zero_grad()
        (0 * model(exact).sum() + model(batch).sum()).backward()
        engine.fire_event(Events.GET_BATCH_STARTED)
        optimizer.step()

    trainer = Engine(step)
    handler.withhold_steps(trainer, Events.GET_BATCH_STARTED, optimizer, above=0.3)
    weights = [simulator.gains.detach().clone()]
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: weights.append(simulator.gains.detach().clone()))
    with handler.attach(trainer):
        trainer.run([wrong])
    assert torch.equal(weights[0], weights[1])
    assert not handler._withholding
    with handler.attach(trainer):
        trainer.run([wrong])
    assert not torch.equal(weights[1], weights[2])  # detach has taken it back


def test_withholding_needs_certificates() -> None:
    model = Recurrent()
    handler = FiniteDifferenceGradients(model, "simulator")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="nothing is certified: give FiniteDifferenceGradients"):
        handler.withhold_steps(Engine(lambda engine, batch: None), Events.ITERATION_COMPLETED, optimizer, 0.3)
