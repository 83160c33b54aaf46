"""Steps that are measured: against exact derivatives, on smooth functions and on the programs of practice."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ignite_tbptt.blackbox import (
    Blackbox,
    BoundedStep,
    CentralDifference,
    Estimator,
    ForwardDifference,
    MeasuredStep,
    PerInputStep,
    RelativeStep,
    UntrustedGradientWarning,
    blackbox,
    estimate_noise,
)
from ignite_tbptt.blackbox.measured_step import find_step, ratio_weights
from ignite_tbptt.blackbox.stencil import central, forward

EPS = 2.0**-52
MEASURED: dict[str, Estimator] = {
    "forward": ForwardDifference(MeasuredStep()),
    "central": CentralDifference(step_size=MeasuredStep()),
    "order 4": CentralDifference(4, MeasuredStep()),
}

# Functions of one number, x, and the exact derivative, after problems of Gill, Murray, Saunders and Wright (1983) and
# of Stepleman and Winarsky (1979), whose length scales differ.
PROBLEMS: dict[str, tuple[Callable[[Any], Any], float, Callable[[float], float]]] = {
    "exp": (np.exp, 1.0, math.exp),
    "slow exp": (lambda x: np.exp(-x / 1e6), 1.0, lambda x: -1e-6 * math.exp(-1e-6 * x)),
    "fast sine": (lambda x: np.sin(100 * x), 0.3, lambda x: 100 * math.cos(100 * x)),
    "log near its edge": (np.log, 1e-3, lambda x: 1 / x),
    "root near its edge": (np.sqrt, 1e-6, lambda x: 0.5 / math.sqrt(x)),
    "reciprocal": (lambda x: 1 / x, 1.0, lambda x: -1 / x**2),
    "arctan": (np.arctan, 0.5, lambda x: 1 / (1 + x * x)),
    "tenth power": (lambda x: x**10, 1.0, lambda x: 10 * x**9),
    "sine on a hill": (lambda x: 1e6 + np.sin(x), 1.0, math.cos),
    "square": (lambda x: x * x, 1.0, lambda x: 2 * x),
    "line": (lambda x: 3 * x + 1, 1.0, lambda x: 3.0),
    "gauss": (lambda x: np.exp(-(x**2)), 0.7, lambda x: -2 * x * math.exp(-x * x)),
}


def error(estimator: Estimator, fn: Callable[[Any], Any], x: float, exact: float) -> tuple[float, Any]:
    t = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    wrapped = blackbox(fn, estimator=estimator, numpy=True)
    wrapped(t).sum().backward()
    assert t.grad is not None
    return abs(t.grad.item() - exact) / abs(exact), wrapped


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_problem_is_far_from_the_best_of_the_fixed_steps(name: str) -> None:
    fn, x, derivative = PROBLEMS[name]
    exact = derivative(x)
    fixed = {kind: error(e, fn, x, exact)[0] for kind, e in FIXED.items() if _defined(e, fn, x)}
    best = min(fixed.values())
    # by the formula of its own order; round-off alone, a few eps, is as good as exact
    for kind, estimator in MEASURED.items():
        found, wrapped = error(estimator, fn, x, exact)
        assert found <= 10 * max(fixed.get(kind, best), 1e-13), (kind, fixed)
        # 6 for the noise, a few for the step, and what verifies; of an odd function at 0 the noise is not easily seen
        assert wrapped.count.probes <= (45 if name == "x^3 + x at 0" else MOST[kind])
    assert error(MEASURED["order 4"], fn, x, exact)[0] <= 10 * max(best, 1e-13)


@pytest.mark.filterwarnings("ignore::ignite_tbptt.blackbox.UntrustedGradientWarning")  # of short waves on a long one
@pytest.mark.parametrize("kind", ["forward", "central", "order 4"])
def test_waves_of_any_length_on_any_slope(kind: str) -> None:
    """Waves that are as short as a thousandth of x look like noise to values that are far apart."""
    draw, ratios = np.random.default_rng(0), []
    for _ in range(100):
        a, b, d = 10 ** draw.uniform(-3, 3, 3)
        c, x = draw.uniform(0, 6), draw.uniform(-3, 3) * 10 ** draw.uniform(-2, 2)
        e = draw.uniform(-2, 2) / max(1, abs(x))
        grown = d * math.exp(e * x)

        def waves(x: Any, a: float = a, b: float = b, c: float = c, d: float = d, e: float = e) -> Any:
            return a * np.sin(b * x + c) + d * np.exp(e * x)

        t = torch.tensor([x], dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(blackbox(waves, numpy=True, estimator=MEASURED[kind])(t).sum(), t)
        order = MEASURED[kind].stencil.order
        noise = EPS * (a * max(1.0, abs(b * x)) + grown)
        curvature = a * b ** (order + 1) + grown * abs(e) ** (order + 1)
        best = noise ** (order / (order + 1)) * curvature ** (1 / (order + 1))
        exact = a * b * math.cos(b * x + c) + e * grown
        ratios.append(abs(float(found) - exact) / max(best, noise / max(1.0, abs(x))))
    # up to constants, and to a noise that is a few bits at one place and none at another
    assert sorted(ratios)[50] < 1
    assert max(ratios) < 200


FIXED: dict[str, Estimator] = {
    "forward": ForwardDifference(),
    "central": CentralDifference(),
    "order 4": CentralDifference(4),
}


MOST = {"forward": 25, "central": 40, "order 4": 75}


def _defined(estimator: Estimator, fn: Callable[[Any], Any], x: float) -> bool:
    h = float(estimator.step_size.each(torch.tensor([x]), estimator.stencil, EPS).sizes)
    with np.errstate(invalid="ignore", divide="ignore"):
        return bool(np.isfinite(fn(x - 2 * h)))


def test_a_long_scale_is_found() -> None:
    fn, x, derivative = PROBLEMS["slow exp"]
    assert error(MEASURED["central"], fn, x, derivative(x))[0] <= 1e-9


@pytest.mark.parametrize("form", ["%.3f", "%.4f", "%g", "%.3e"])
def test_printed_digits(form: str) -> None:
    """Of 40 draws of x the median is right to 5 per cent, and none is off by half."""
    draw = random.Random(0)

    def smooth(x: Any) -> Any:
        return np.sin(x) * np.exp(0.3 * x) + x * x

    def printed(x: Any) -> Any:
        return np.array([float(form % value) for value in smooth(x)])

    errors = []
    for _ in range(40):
        x = draw.uniform(0.3, 2.0)
        exact = math.cos(x) * math.exp(0.3 * x) + 0.3 * math.sin(x) * math.exp(0.3 * x) + 2 * x
        errors.append(error(MEASURED["central"], printed, x, exact)[0])
    assert sorted(errors)[20] <= 0.005
    assert max(errors) <= 0.05


def test_a_step_for_each_input_and_rows_that_move_together() -> None:
    def coarse(x: Any, w: Any) -> Any:
        return np.round(np.sin(x) * w, 4)

    x = torch.linspace(0.3, 1.2, 24, dtype=torch.float64).view(8, 3).requires_grad_()
    w = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    f = blackbox(coarse, estimator=CentralDifference(step_size=MeasuredStep()), numpy=True, in_dims=(0, None))
    f(x, w).sum().backward()
    assert torch.allclose(x.grad, (x.cos() * w).detach(), rtol=0.05)  # type: ignore[arg-type]
    assert torch.allclose(w.grad, x.sin().sum(0).detach(), rtol=0.05)  # type: ignore[arg-type]
    probes, evaluations = f.count.probes, f.nfev
    for _ in range(2):
        f(x, w).sum().backward()
    third = f.nfev
    f(x, w).sum().backward()
    assert f.nfev - third == evaluations  # the search is not repeated
    assert f.count.probes - probes < probes


SCALES = torch.tensor([1e-6, 1.0, 1e3], dtype=torch.float64)


def of_three_scales(x: Any) -> Any:
    """Each element on a scale of its own, printed with eight decimals."""
    values: Any = np.sin(x / SCALES.numpy())
    return np.round(values, 8)


@pytest.mark.parametrize("rows", [None, 1, 5])
def test_a_step_for_each_element_where_they_have_scales_of_their_own(rows: int | None) -> None:
    estimator = CentralDifference(step_size=MeasuredStep(per_element=True))
    f: Any = blackbox(of_three_scales, numpy=True, estimator=estimator, in_dims=None if rows is None else 0)
    x = (SCALES * 0.7).repeat(rows or 1, 1) if rows else SCALES * 0.7
    x.requires_grad_()
    (found,) = torch.autograd.grad(f(x).sum(), x)
    # noise 3e-9 and derivatives of size 1 in units of the scale: h about 2e-3, errors of 1e-6
    exact = torch.cos(x / SCALES).detach() / SCALES
    assert torch.allclose(found, exact, rtol=2e-5, atol=0)
    one_for_all: Any = blackbox(
        of_three_scales, numpy=True, estimator=MEASURED["central"], in_dims=None if rows is None else 0
    )
    (coarse,) = torch.autograd.grad(one_for_all(x).sum(), x)
    assert not torch.allclose(coarse, exact, rtol=0.1, atol=0)
    report = f.report()
    assert report.count("differentiated input 0") == 3
    assert "column 2 of" in report


def test_steps_of_elements_follow_the_number_of_rows_and_of_columns() -> None:
    estimator = CentralDifference(step_size=MeasuredStep(per_element=True))
    f: Any = blackbox(lambda x: np.round(np.exp(x), 6), numpy=True, estimator=estimator, in_dims=0)
    counts = []
    for shape in ((4, 2), (7, 2), (7, 3), (7, 3)):
        x = torch.linspace(0, 1, shape[0] * shape[1], dtype=torch.float64).view(shape).requires_grad_()
        before = f.count.probes
        (found,) = torch.autograd.grad(f(x).sum(), x)
        counts.append(f.count.probes - before)
        assert torch.allclose(found, x.detach().exp(), rtol=1e-3)
    assert counts[2] > 50  # measured anew, for three columns


def test_inside_bounds_and_beside_other_step_sizes() -> None:
    seen: list[float] = []

    def f(x: Any, w: Any) -> Any:
        seen.extend(x)
        return np.round(np.sqrt(x) * w, 5)

    x = torch.tensor([0.001, 1.0], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    steps = BoundedStep(PerInputStep((MeasuredStep(), RelativeStep(factor=0.01))), lower=(0.0, None), upper=(1.0, None))
    blackbox(f, estimator=CentralDifference(step_size=steps), numpy=True)(x, w).sum().backward()
    assert min(seen) >= 0
    assert max(seen) <= 1
    assert torch.allclose(w.grad, x.sqrt().detach(), rtol=0.01)  # type: ignore[arg-type]
    assert abs(x.grad[1].item() - 1.5) <= 0.05  # type: ignore[index]


def test_a_noise_that_is_known_is_taken() -> None:
    f: Any = blackbox(np.sin, estimator=CentralDifference(step_size=MeasuredStep(noise=1e-4)), numpy=True)
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    f(x).sum().backward()
    (kept,) = f._facts.step_sizes.values()
    h = float(kept.each(torch.ones(1, dtype=torch.float64), central(), EPS).sizes)
    # (3 e / |f'''|)^(1/3), at which both errors are of one size, to a factor of 2 and that of powers of two
    assert (3e-4 / math.cos(1.0)) ** (1 / 3) / 4 <= h <= (3e-4 / math.cos(1.0)) ** (1 / 3) * 4
    with pytest.raises(ValueError, match="noise must be a positive, finite number, got 0"):
        MeasuredStep(0.0)
    elements: Any = 3
    with pytest.raises(ValueError, match="per_element must be True, to measure along every element, or False, got 3"):
        MeasuredStep(per_element=elements)


def test_a_simulator_that_is_noisy_by_nature() -> None:
    generator = np.random.default_rng(0)

    def noisy(x: Any) -> Any:
        return np.exp(x) + 1e-6 * generator.standard_normal(x.shape)

    f = blackbox(noisy, estimator=CentralDifference(step_size=MeasuredStep()), numpy=True, repeatable=False)
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).requires_grad_()
    f(x).sum().backward()
    # noise 1e-6 and f''' about 1: h about 0.014, errors of noise / (sqrt(2) h) = 5e-5 and h^2/6 = 3e-5
    assert (x.grad - x.exp()).abs().max() <= 1e-3  # type: ignore[operator]


@pytest.mark.parametrize("sigma", [1e-8, 1e-5, 1e-2])
def test_the_noise_is_found_within_a_factor_of_four(sigma: float) -> None:
    generator = np.random.default_rng(1)

    def rosenbrock(x: Any) -> Any:
        value = (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        return value + sigma * generator.standard_normal()

    ratios = []
    for seed in range(40):
        x = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, 4))
        ratios.append(estimate_noise(rosenbrock, x, numpy=True, seed=seed).level / sigma)
    assert sum(0.25 <= ratio <= 4 for ratio in ratios) >= 36


def test_noise_says_how_good_it_is() -> None:
    found = estimate_noise(torch.exp, torch.ones(3))
    assert found.converged
    assert found.relative <= 2.0**-23
    assert str(found).startswith("noise ")
    with pytest.raises(TypeError, match="fn must be callable, got float"):
        estimate_noise(1.0, torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs a tensor of floating point"):
        estimate_noise(torch.sin, torch.ones(1, dtype=torch.int64))


def test_the_ratio_is_that_of_the_paper() -> None:
    """Equations 2.3 and 3.4 of Shi et al.: f(4h) - 4 f(h) + 3 f(0), and f(3h) - 3 f(h) + 3 f(-h) - f(-3h), over 8."""
    assert ratio_weights(forward()) == {0: -3 / 8, 1: 4 / 8, 4: -1 / 8}
    assert ratio_weights(central()) == {-3: 1 / 8, -1: -3 / 8, 1: 3 / 8, 3: -1 / 8}


def test_a_jump_counts_as_noise() -> None:
    """A staircase whose steps are equal looks noiseless at spacings of a step; the search finds its height."""
    found = find_step(lambda ts: [round(3 * (1 + t), 3) for t in ts], central(), 1e-16, 1.0)
    assert found.noise > 1e-4
    assert found.h > 0.01


def test_a_tensor_that_does_not_matter() -> None:
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    def first(x: Tensor, w: Tensor) -> Tensor:
        return x.detach() * 2

    blackbox(first, estimator=CentralDifference(step_size=MeasuredStep()))(x, w).sum().backward()
    assert torch.allclose(x.grad, torch.full((2,), 2.0), rtol=1e-3)  # type: ignore[arg-type]
    assert w.grad.abs().max() == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["%.3f", "%.4f", "%g"])
def test_the_default_measures_where_its_step_does_not_suit(form: str) -> None:
    """Of 20 draws of x the default gradient is right to 5 per cent in the median, and says that it measured."""
    errors = []
    draw = random.Random(1)
    for _ in range(20):
        x = torch.tensor([draw.uniform(0.3, 2.0) for _ in range(2)], dtype=torch.float64, requires_grad=True)
        f: Any = blackbox(lambda x: np.array([float(form % v) for v in x * np.sin(x)]), numpy=True)
        with pytest.warns(UntrustedGradientWarning, match=r"So its steps were measured"):
            f(x).sum().backward()
        exact = (x.sin() + x * x.cos()).detach()
        errors.append(float((x.grad - exact).norm() / exact.norm()))  # type: ignore[operator]
        before = f.count.probes
        for _ in range(2):
            f(x).sum().backward()
        assert f.count.probes - before < before  # the search is not repeated
    assert sorted(errors)[10] <= 0.05


def test_on_smooth_functions_the_default_measures_nothing() -> None:
    f = blackbox(np.sin, numpy=True)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    f(x).sum().backward()  # type: ignore[arg-type]
    assert not f._facts.step_sizes
    assert f.nfev == 18
    assert (x.grad - x.cos()).abs().max() <= 1e-9  # type: ignore[operator]


def test_a_report_tells_the_step_the_cost_and_what_was_verified() -> None:
    f: Any = blackbox(lambda x: np.round(np.sin(x), 4), numpy=True, in_dims=0, estimator=MEASURED["central"])
    assert f.report().startswith("<lambda>, by Coordinates and a formula of order 2\n  gradients: 0, by 0 evaluations")
    x = torch.linspace(0.1, 1, 6, dtype=torch.float64).requires_grad_()
    f(x).sum().backward()
    (((found,),),) = [list(measured.values()) for measured in f._facts.measurements.values()]
    report = f.report()
    assert f"step: {found.step.h:.2g} for differentiated input 0" in report
    assert f"gradients: 1, by 2 evaluations in {f.count.calls} calls, and {f.count.probes} more to verify" in report
    assert "rows: independent, as verified; their points share calls" in report
    module = Blackbox(torch.nn.Linear(2, 1), estimator=CentralDifference(sparsity=torch.ones(1, 5).bool()))
    module(torch.ones(2, requires_grad=True)).sum().backward()
    assert "sparsity: columns that share no output" in module.report()
    assert module.report().startswith("Linear, by Coordinates")


# Straight pieces: no step shows truncation along one element, while the others are next to a kink.

PIECES: dict[str, tuple[Any, Any]] = {
    "relu": (lambda x: np.maximum(x, 0.0), lambda x: (x > 0).double()),
    "abs": (np.abs, torch.sign),
    "clip": (lambda x: np.clip(x, -1.0, 1.5), lambda x: ((x > -1) & (x < 1.5)).double()),
    "leaky": (lambda x: np.where(x > 0, x, 0.1 * x), lambda x: 0.1 + 0.9 * (x > 0).double()),
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("options", [{}, {"per_element": True}, {"in_dims": 0}], ids=str)
def test_a_straight_piece_does_not_make_the_step_long(name: str, options: dict[str, Any]) -> None:
    fn, derivative = PIECES[name]
    estimator = CentralDifference(step_size=MeasuredStep(per_element=options.get("per_element", False)))
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x = (4 * torch.rand(6, generator=generator, dtype=torch.float64) - 2).requires_grad_()
        blackbox(fn, numpy=True, estimator=estimator, in_dims=options.get("in_dims"))(x).sum().backward()
        assert x.grad is not None
        assert float((x.grad - derivative(x.detach())).abs().max()) <= 1e-9


def test_elements_that_bend_together_leave_an_accepted_step_as_it_is() -> None:
    # A program of five digits whose six parameters work together: all at once show more truncation than one alone.
    time = np.arange(12) / 3

    def decay(x: Any) -> Any:
        a, b, c, d, e, f = x
        return np.array([float(f"{v:.5g}") for v in a * np.exp(-b * time) + c * np.sin(d * time + e) + f * time])

    def smooth(x: Tensor) -> Any:
        a, b, c, d, e, f = x
        t = torch.from_numpy(time)
        return a * torch.exp(-b * t) + c * torch.sin(d * t + e) + f * t

    x = torch.tensor([1.5, 0.5, 0.7, 1.2, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    wrapped: Any = blackbox(decay, numpy=True, estimator=CentralDifference(step_size=MeasuredStep()))
    (found,) = torch.autograd.grad(wrapped(x).square().sum(), x)
    (true,) = torch.autograd.grad(smooth(x).square().sum(), x)
    # digits of 1e-5 and 1e-4 make noise of 1e-5, and (1e-5)^(2/3) is 5e-4
    assert float((found - true).norm() / true.norm()) <= 5e-3
