"""Functions that jump, print few digits or solve to a tolerance are named; smooth ones, and kinks, are not."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ignite_tbptt.blackbox.errors import UntrustedGradientWarning
from ignite_tbptt.blackbox.estimator import CentralDifference, ForwardDifference, GaussianSmoothing
from ignite_tbptt.blackbox.function import blackbox
from ignite_tbptt.blackbox.measured_step import MeasuredStep
from ignite_tbptt.blackbox.step_size import AbsoluteStep, StepSize

DRAWS = 10


def printed(form: str) -> Callable[[Any], Any]:
    return lambda x: np.array([float(form % v) for v in 1.3 * np.sin(x) + x])


def parsed(form: str) -> Callable[[Any], Any]:
    def f(x: Any) -> Any:
        y = np.array([float(form % v) for v in x])
        return y * np.sin(y)

    return f


def image(x: Any) -> Any:
    return np.round(np.abs(x) * 255) / 255 * np.array([1.0, 2.0])


def integers(x: Any) -> Any:
    work = np.zeros(2, int)
    work[:] = x * 100
    return work / 100.0


def table(x: Any) -> Any:
    grid = np.linspace(-5, 5, 100001)
    return np.sin(grid)[np.searchsorted(grid, x)]


def root_by_bisection(x: Any) -> Any:
    found = []
    for v in x:
        low, high = -3.0, 3.0
        while high - low > 2e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if middle**3 + middle < v else (low, middle)
        found.append((low + high) / 2)
    return np.array(found)


def eighths(x: Any) -> Any:
    return np.round(8 * np.sin(2 * x)) / 8


def share_of_samples(x: Any) -> Any:
    samples = np.random.default_rng(0).random(100_000)
    return np.array([(samples < 1 / (1 + np.exp(-v))).mean() for v in x])


def of_printed(x: Any) -> Any:
    return 1.3 * np.cos(x) + 1


def of_parsed(x: Any) -> Any:
    return np.sin(x) + x * np.cos(x)


# each with its slope without the jumps; None where a step that is wide enough leaves the curve
COARSE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any] | None]] = {
    **{f"output {form}": (printed(form), of_printed) for form in ("%.3f", "%.4f", "%g", "%.3e")},
    **{f"input {form}": (parsed(form), of_parsed) for form in ("%.3f", "%.4f", "%g", "%.3e")},
    "8-bit image": (image, None),
    "integer work array": (integers, None),
    "lookup table": (table, np.cos),
    "bisection": (root_by_bisection, lambda x: 1 / (3 * root_by_bisection(x) ** 2 + 1)),
    "rounding to 1/8": (eighths, None),
    "sampler": (share_of_samples, None),
}


def drawn(seed: int) -> Tensor:
    return (torch.rand(2, generator=torch.Generator().manual_seed(seed)) * 2 - 1).requires_grad_()


def gradient(f: Callable[[Any], Any], x: Tensor, numpy: bool = True, step_size: StepSize | None = None) -> Any:
    """The gradient, and what was said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = blackbox(f, numpy=numpy, estimator=CentralDifference(step_size=step_size))(x)
        found = torch.autograd.grad(y.sum(), x)[0]
    assert all(issubclass(w.category, UntrustedGradientWarning) and w.filename == __file__ for w in caught)
    return found.double().numpy(), [str(w.message) for w in caught]


@pytest.mark.parametrize("name", COARSE)
def test_coarse_functions_are_named_and_the_advice_is_right(name: str) -> None:
    f, slope = COARSE[name]
    named = 0
    for seed in range(DRAWS):
        x = drawn(seed)
        _, told = gradient(f, x)
        named += bool(told)
        advice = re.search(r"AbsoluteStep\(([^)]+)\)", told[0]) if told else None
        if advice and slope is not None:
            found, again = gradient(f, x, step_size=AbsoluteStep(float(advice[1])))
            true = slope(x.detach().double().numpy())
            assert np.abs(found - true).max() <= 0.02 * np.abs(true).max()
            assert again == []
    assert named >= 9


@pytest.mark.parametrize("name", ["output %g", "input %g", "bisection", "float32 inside"])
def test_what_is_not_told_is_right_although_slopes_agree_by_chance(name: str) -> None:
    """Quanta that make the same slope at the step and at one 8 times as wide, and nothing at finer ones."""

    def in_float32(x: Any) -> Any:
        return printed("%.17g")(x).astype(np.float32).astype(np.float64)

    f, slope = {**COARSE, "float32 inside": (in_float32, of_printed)}[name]
    assert slope is not None
    for place in np.linspace(0.3, 2, 60):
        x = torch.tensor([place], dtype=torch.float64, requires_grad=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (found,) = torch.autograd.grad(blackbox(f, numpy=True)(x).sum(), x)
        if not caught:
            true = slope(x.detach().numpy())
            # slopes agree that differ by 0.003 of them; that of x that is found by bisection has noise of its own
            assert abs(float(found) - true) <= 0.005 * max(abs(true), 0.1)


@pytest.mark.filterwarnings("ignore")
def test_a_solver_with_a_loose_tolerance() -> None:
    solve_ivp = pytest.importorskip("scipy.integrate").solve_ivp

    def f(x: Any) -> Any:
        return np.array(
            [
                solve_ivp(lambda t, y, p=p: [y[1], -p * np.sin(y[0])], (0, 30), [1.0, 0.5], method="LSODA").y[0, -1]
                for p in np.abs(x) + 0.5
            ]
        )

    assert sum(bool(gradient(f, drawn(seed))[1]) for seed in range(5)) == 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", [None, CentralDifference(step_size=MeasuredStep())], ids=["default", "measured"])
@pytest.mark.parametrize("method", ["RK45", "LSODA"])
def test_the_jumps_of_a_solver_that_chooses_its_steps_are_its_noise(method: str, estimator: Any) -> None:
    """At rtol 1e-3 the program's own slope, between two jumps, is off by half of the true one and more."""
    solve_ivp = pytest.importorskip("scipy.integrate").solve_ivp

    def oscillator(p: float, method: str, rtol: float) -> float:
        def field(t: float, y: Any) -> list[float]:
            return [y[1], p * (1 - y[0] ** 2) * y[1] - y[0]]

        return float(solve_ivp(field, (0, 8), [2.0, 0.0], method=method, rtol=rtol, atol=1e-3 * rtol).y[0, -1])

    def loose(x: Any) -> Any:
        return np.array([oscillator(x[0], method, 1e-3)])

    told, errors = 0, []
    for p in np.random.default_rng(0).uniform(0.3, 2.0, 10):
        precise = [oscillator(p + h, "DOP853", 1e-12) for h in (1e-4, -1e-4)]
        true = (precise[0] - precise[1]) / 2e-4
        x = torch.tensor([p], requires_grad=True, dtype=torch.float64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            blackbox(loose, numpy=True, estimator=estimator)(x).sum().backward()
        told += bool(caught)
        assert x.grad is not None
        errors.append(abs(x.grad.item() - true) / abs(true))
    assert told >= 8  # short of 9: an element whose jumps are further away than is looked
    # jumps of up to 5e-3 give e ** (2 / 3) = 0.03 by noise and half as much by truncation, with constants of about 1
    assert sorted(errors)[5] <= 0.1


def test_a_sawtooth_is_told_from_what_is_only_steep() -> None:
    def teeth(x: Any) -> Any:
        return x - 1e-3 * np.floor(500 * x) + 2 * x  # pieces of slope 3, and of 2.5 over many of them

    x = torch.tensor([0.7113], dtype=torch.float64, requires_grad=True)
    with pytest.warns(UntrustedGradientWarning, match="steps were measured"):
        blackbox(teeth, numpy=True)(x).sum().backward()
    assert x.grad is not None
    assert abs(x.grad.item() - 2.5) <= 0.05
    steep = torch.tensor([0.7113], dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blackbox(lambda x: np.tanh(200 * (x - 0.71)), numpy=True)(steep).sum().backward()


def mlp(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weights, bias = (torch.randn(shape, generator=generator).to(x) for shape in ((2, 8), (8,)))
    y: Tensor = (x @ weights + bias).relu().cumsum(0)
    return y


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: 3 * x,
    "constant": lambda x: x * 0 + 3,
    "large constant": lambda x: 1000 + x,
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
    "flat": lambda x: 1 + x**8,
    "large": lambda x: 1e6 * x**2,
    "small": lambda x: 1e-9 * torch.sin(x),
    "sine": torch.sin,
    "sine of 10 x": lambda x: torch.sin(10 * x),
    "sine of 100 x": lambda x: torch.sin(100 * x),
    "ripples": lambda x: x + 1e-3 * torch.sin(30 * x),
    "decaying waves": lambda x: torch.sin(3 * x) * torch.exp(-x) + x**2,
    "exponential": torch.exp,
    "steep exponential": lambda x: torch.exp(10 * x),
    "logarithm": lambda x: torch.log(x.abs() + 1e-2),
    "root": lambda x: torch.sqrt(x.abs() + 0.01),
    "sigmoid": lambda x: torch.sigmoid(5 * x),
    "saturated": lambda x: torch.tanh(50 * x),
    "arc tangent": lambda x: torch.atan(20 * x),
    "peak": lambda x: 1 / (1 + 100 * x**2),
    "bell": lambda x: torch.exp(-50 * x**2),
    "softmax": lambda x: torch.softmax(10 * x, 0),
    "norm": lambda x: x.norm(),
    "product": lambda x: x.prod(),
    "Rosenbrock": lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2,
    "relu": torch.relu,
    "leaky": lambda x: torch.where(x > 0, x, 0.1 * x),
    "absolute value": torch.abs,
    "maximum": lambda x: torch.maximum(x, x**2),
    "network": mlp,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_and_kinks_are_differentiated_without_a_word(name: str, dtype: torch.dtype) -> None:
    for seed in range(DRAWS):
        x = drawn(seed).detach().to(dtype).requires_grad_()
        _, told = gradient(lambda x: SMOOTH[name](x).detach(), x, numpy=False)
        assert told == []


def test_a_zero_gradient_of_quanta_is_named_and_one_of_a_kink_is_not() -> None:
    x = torch.tensor([0.3, 1.3], dtype=torch.float64, requires_grad=True)
    _, told = gradient(np.round, x)
    assert re.match(r"the gradient of round with respect to a is zero at element", told[0])
    assert gradient(lambda x: np.maximum(x - 1.5, 0), x)[1] == []


def test_it_is_asked_again_at_gradients_2_4_8_and_said_once() -> None:
    x = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    rounded = [False]

    def f(x: Any) -> Any:
        y = np.sin(3 * x)
        return np.round(y, 3) if rounded[0] else y

    wrapped = blackbox(f, numpy=True)
    said = []
    for _ in range(8):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped(x).sum().backward()
        said.append(len(caught))
        rounded[0] = True
    assert said == [0, 1, 0, 0, 0, 0, 0, 0]


def test_smoothing_is_for_functions_that_jump() -> None:
    x = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    f = blackbox(eighths, numpy=True, estimator=GaussianSmoothing(2000, sigma=0.2))
    f(x).sum().backward()
    # E sin(2 (x + s)) for s of variance .04 is sin(2 x) exp(-.08); each of 2000 directions is off by |g|, about
    true = 2 * torch.cos(2 * x.detach()) * math.exp(-0.08)
    assert x.grad is not None
    assert (x.grad - true).norm() < 4 * true.norm() * math.sqrt(3 / 2000)


def slope_of_tanh(steepness: float, x: float, **options: Any) -> tuple[float, list[str]]:
    """The relative error of the slope of tanh(steepness x), in units of its largest, and what was said."""
    t = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        blackbox(lambda x: np.tanh(steepness * x), numpy=True, **options)(t).sum().backward()
    assert t.grad is not None
    exact = 1 / math.cosh(min(300.0, abs(steepness * x))) ** 2
    return abs(t.grad.item() / steepness - exact), [str(each.message) for each in caught]


@pytest.mark.parametrize("steepness", [20.0, 200.0, 2e3, 2e4])
def test_what_is_steep_on_a_longer_scale_than_the_step_is_not_told(steepness: float) -> None:
    for x in np.linspace(-5, 5, 21) / steepness:
        error, told = slope_of_tanh(steepness, x)
        assert not told
        # h is 2^-17; a third derivative of 2 at most
        assert error <= (steepness * 2.0**-17) ** 2 / 3 + 1e-9


def test_a_step_that_is_too_long_is_told_and_another_one_measured() -> None:
    """At steepness / h of 1.5 a central difference of tanh is off by up to 40 per cent."""
    for x in np.linspace(-1, 1, 9) / 2e5:
        error, told = slope_of_tanh(2e5, x)
        assert "its steps were measured instead" in told[0]
        assert error < 1e-4
    error, (told_of_chosen,) = slope_of_tanh(2e5, 0.0, estimator=CentralDifference(step_size=AbsoluteStep(1e-5)))
    assert error > 0.3
    assert "the step is too long for <lambda>" in told_of_chosen
    h = float(re.findall(r"AbsoluteStep\((.*?)\)", told_of_chosen)[0])
    error, told = slope_of_tanh(2e5, 0.0, estimator=CentralDifference(step_size=AbsoluteStep(h)))
    assert not told
    assert error < 1e-3


@pytest.mark.parametrize(
    "estimator", [ForwardDifference(), CentralDifference(), None], ids=["forward", "central", "default"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_next_to_an_optimum_and_to_a_kink_nothing_is_told(estimator: Any, dtype: torch.dtype) -> None:
    """Where the gradient is small truncation is larger than it, which is no fault of the step."""
    smooth: list[Callable[[Tensor], Tensor]] = [
        lambda x: x**2,
        lambda x: x**2 + x**3,
        torch.cosh,
        lambda x: (x - 1) ** 4,
    ]
    kinked: list[Callable[[Tensor], Tensor]] = [torch.relu, torch.abs, lambda x: torch.log1p(x.abs())]
    for functions, places in ((smooth, (0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1.0001, -3.0)), (kinked, (0.1, 1.0, -3.0))):
        for f in functions:
            for place in places:
                x = torch.full((3,), place, dtype=dtype, requires_grad=True)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    blackbox(lambda x, f=f: f(x).sum().detach(), estimator=estimator)(x).backward()


def test_elements_that_change_nothing_do_not_hide_a_coarse_function() -> None:
    x = torch.tensor([-1.8, -1.1, -1.1, -1.3, 0.2, -1.6], dtype=torch.float64, requires_grad=True)
    f: Any = blackbox(lambda x: np.round(np.maximum(x, 0.0), 4), numpy=True)
    with pytest.warns(UntrustedGradientWarning, match="rounds its inputs or outputs"):
        f(x).sum().backward()
    assert x.grad is not None
    # quanta of 1e-4, the step suits their noise: (3e-5)^(2/3) = 1e-3
    assert torch.allclose(x.grad, (x > 0).double(), atol=1e-2)
