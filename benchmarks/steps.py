"""How good is a measured step, and what does the default do with the programs of practice?

First, functions whose length scales differ: the relative error of forward, central and fourth-order differences with
the default step and with `MeasuredStep`, beside scipy's ``approx_derivative``, and what the search cost. Then programs
that print few digits, work on 8-bit images or solve to a tolerance: the median error of the default ``blackbox(fn,
numpy=True)`` over draws of x, beside that of its fixed step, and how often it said a word. Then noise that is added,
and beside the measured step the best of all, which only hindsight knows: no step makes the error smaller than that.

    python benchmarks/steps.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import figure
from scipy import integrate, optimize
from scipy.optimize._numdiff import approx_derivative

from ignite_tbptt.blackbox import (
    CentralDifference,
    Estimator,
    ForwardDifference,
    MeasuredStep,
    blackbox,
    central,
    estimate_noise,
    step_sweep,
)

Function = Callable[[Any], Any]

SMOOTH: dict[str, tuple[Function, float, Callable[[float], float]]] = {
    "exp(x) at 1": (np.exp, 1.0, math.exp),
    "exp(-x/1e6) at 1": (lambda x: np.exp(-x / 1e6), 1.0, lambda x: -1e-6 * math.exp(-1e-6 * x)),
    "sin(100 x) at 0.3": (lambda x: np.sin(100 * x), 0.3, lambda x: 100 * math.cos(100 * x)),
    "log(x) at 1e-3": (np.log, 1e-3, lambda x: 1 / x),
    "sqrt(x) at 1e-6": (np.sqrt, 1e-6, lambda x: 0.5 / math.sqrt(x)),
    "1/x at 1": (lambda x: 1 / x, 1.0, lambda x: -1 / x**2),
    "1/x at 1e-4": (lambda x: 1 / x, 1e-4, lambda x: -1 / x**2),
    "arctan(x) at 0.5": (np.arctan, 0.5, lambda x: 1 / (1 + x * x)),
    "arctan(1000 x) at 1e-3": (lambda x: np.arctan(1000 * x), 1e-3, lambda x: 1000 / (1 + 1e6 * x * x)),
    "x^10 at 1": (lambda x: x**10, 1.0, lambda x: 10 * x**9),
    "x^3 + x at 0": (lambda x: x**3 + x, 0.0, lambda x: 3 * x * x + 1),
    "1e6 + sin(x) at 1": (lambda x: 1e6 + np.sin(x), 1.0, math.cos),
    "exp(-x^2) at 0.7": (lambda x: np.exp(-(x**2)), 0.7, lambda x: -2 * x * math.exp(-x * x)),
    "sin(x)/x at 1e-2": (lambda x: np.sin(x) / x, 1e-2, lambda x: math.cos(x) / x - math.sin(x) / x**2),
    "log(cosh(x)) at 3": (lambda x: np.log(np.cosh(x)), 3.0, math.tanh),
    "x^2 at 1e5": (lambda x: x * x, 1e5, lambda x: 2 * x),
}

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "forward": lambda step=None: ForwardDifference(step),
    "central": lambda step=None: CentralDifference(step_size=step),
    "order 4": lambda step=None: CentralDifference(4, step),
}


def _curve(x: Any) -> Any:
    return np.sin(x) * np.exp(0.3 * x) + x * x


def _each(f: Callable[[float], float]) -> Function:
    return lambda x: np.array([f(float(v)) for v in x])


def _image(x: float) -> float:
    line = np.linspace(0, 1, 64)
    pixels = np.clip(np.round((0.5 + 0.5 * np.sin(3 * line + x)) * 255), 0, 255) / 255
    return float(((pixels - line) ** 2).mean())


def _smooth_image(x: float) -> float:
    line = np.linspace(0, 1, 64)
    return float(((0.5 + 0.5 * np.sin(3 * line + x) - line) ** 2).mean())


def _oscillator(method: str, **options: Any) -> Callable[[float], float]:
    def f(x: float) -> float:
        def field(t: float, y: Any) -> list[float]:
            return [y[1], x * (1 - y[0] ** 2) * y[1] - y[0]]

        return float(integrate.solve_ivp(field, (0, 8), [2.0, 0.0], method=method, **options).y[0, -1])

    return f


def _nelder_mead(x: float) -> float:
    def distance(p: Any) -> float:
        return float((p[0] - math.sin(x)) ** 2 + (p[1] - x * p[0]) ** 2)

    return float(optimize.minimize(distance, [0, 0], method="Nelder-Mead").x[1])


_SAMPLES = np.random.default_rng(0).random(100_000)
_PRECISE = _oscillator("DOP853", rtol=1e-12, atol=1e-12)

PROGRAMS: dict[str, tuple[Function, Function]] = {
    **{
        f"prints {form}": (_each(lambda v, form=form: float(form % _curve(v))), _curve)
        for form in ("%.3f", "%.4f", "%g", "%.3e")
    },
    "input printed by %g": (_each(lambda v: float(_curve(float(f"{v:g}")))), _curve),
    "8-bit image": (_each(_image), _each(_smooth_image)),
    "bisection, xtol 1e-6": (
        _each(lambda v: optimize.bisect(lambda r: r**3 + r - v - 2, -5, 5, xtol=1e-6)),
        _each(lambda v: optimize.brentq(lambda r: r**3 + r - v - 2, -5, 5, xtol=1e-14)),
    ),
    "Nelder-Mead inside": (_each(_nelder_mead), lambda x: x * np.sin(x)),
    "solve_ivp RK45, defaults": (_each(_oscillator("RK45")), _each(_PRECISE)),
    "solve_ivp LSODA, defaults": (_each(_oscillator("LSODA")), _each(_PRECISE)),
    "sampler, 1e5 shots": (
        _each(lambda v: float((1 / (1 + math.exp(-v)) > _SAMPLES).mean())),
        lambda x: 1 / (1 + np.exp(-x)),
    ),
    "float32 inside": (lambda x: _curve(x.astype(np.float32)).astype(np.float64), _curve),
}


def gradient(fn: Function, x: float, **options: Any) -> tuple[float, Any, int]:
    """Return the derivative by `blackbox`, the blackbox, and how many warnings it gave."""
    t = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    f: Any = blackbox(fn, numpy=True, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        f(t).sum().backward()
    assert t.grad is not None
    return t.grad.item(), f, len(caught)


def reference(fn: Function, x: float) -> float:
    """Return a slope that is good to eight digits, of a function without jumps."""
    h = 1e-3
    values = fn(np.array([x + 2 * h, x + h, x - h, x - 2 * h]))
    return float((-values[0] + 8 * values[1] - 8 * values[2] + values[3]) / (12 * h))


def smooth() -> None:
    names = [*ESTIMATORS, *(f"{name}, measured" for name in ESTIMATORS), "scipy 2-point", "scipy 3-point"]
    print(f"{'relative error':24}" + "".join(f"{name:>19}" for name in names) + f"{'to measure':>17}")
    spent: dict[str, list[int]] = {name: [] for name in ESTIMATORS}
    for title, (fn, x, derivative) in SMOOTH.items():
        exact, found = derivative(x), {}
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, make in ESTIMATORS.items():
                try:
                    found[name] = gradient(fn, x, estimator=make())[0]
                except Exception:  # the step leads out of the domain
                    found[name] = math.nan
                value, f, _ = gradient(fn, x, estimator=make(MeasuredStep()))
                found[f"{name}, measured"] = value
                # beside once more at x and the slopes at three widths, which are asked for whatever the step
                spent[name].append(f.count.probes - 1 - 3 * len(make().stencil.evaluated))
            for method in ("2-point", "3-point"):
                found[f"scipy {method}"] = float(approx_derivative(fn, x, method=method)[0])
        errors = {name: abs(value - exact) / abs(exact) for name, value in found.items()}
        last = str([counts[-1] for counts in spent.values()])
        print(f"{title:24}" + "".join(f"{errors[name]:>19.1e}" for name in names) + f"{last:>17}", flush=True)
    for name, counts in spent.items():
        figure(f"evaluations that measure a step, {name}: median", statistics.median(counts))
        figure(f"evaluations that measure a step, {name}: most", max(counts))


def programs(draws: int) -> None:
    print(f"\n{'median relative error over ' + str(draws) + ' draws':32}{'fixed step':>12}{'default':>10}{'told':>8}")
    draw = np.random.default_rng(1)
    for title, (fn, exact) in PROGRAMS.items():
        fixed, default, told = [], [], 0
        for x in draw.uniform(0.3, 2.0, draws):
            true = reference(exact, x)
            fixed.append(abs(gradient(fn, x, estimator=CentralDifference())[0] - true) / abs(true))
            value, _, warned = gradient(fn, x)
            default.append(abs(value - true) / abs(true))
            told += bool(warned)
        middle = statistics.median
        print(f"{title:32}{middle(fixed):>12.1e}{middle(default):>10.1e}{told:>5}/{draws}", flush=True)
        figure(f"{title}: median error, fixed step", middle(fixed), "relative")
        figure(f"{title}: median error, default", middle(default), "relative")


NOISY: dict[str, tuple[int, Function]] = {
    "Rosenbrock-4": (4, lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()),
    "sum of exp": (6, lambda x: (x.exp() if isinstance(x, torch.Tensor) else np.exp(x)).sum()),
    "quartic": (5, lambda x: ((x - 0.3) ** 4 + x * 2).sum()),
    "1 / (2 + x.x)": (8, lambda x: 1 / (2 + (x * x).sum())),
}


def best_error(function: Function, x: Any, true: Any, sigma: float, order: int) -> float:
    """The relative error to be expected of the best of all steps, which only hindsight knows."""
    stencil, found = central(order), []
    for h in 2.0 ** np.arange(-14, 3, 0.5):
        moved = [[float(function(x + offset * h * e)) for offset in stencil.offsets] for e in np.eye(len(x))]
        truncation = np.array(moved) @ np.array(stencil.weights) / h - true
        variance = len(x) * sum((weight * sigma / h) ** 2 for weight in stencil.weights)
        found.append(math.sqrt(truncation @ truncation + variance))
    return min(found) / float(np.linalg.norm(true))


def noise(points: int) -> None:
    titles = ("measured", "best step", "order 4", "best step")
    print(f"\n{'median error with noise':26}{'within 1/4 to 4':>16}" + "".join(f"{title:>12}" for title in titles))
    generator = np.random.default_rng(2)
    for name, (size, function) in NOISY.items():
        for sigma in (1e-8, 1e-6, 1e-4, 1e-2, 1e-1):

            def noisy(x: Any, sigma: float = sigma, function: Function = function) -> Any:
                return function(x) + sigma * generator.standard_normal()

            good, errors, best = 0, {2: list[float](), 4: list[float]()}, {2: list[float](), 4: list[float]()}
            for number in range(points):
                x = torch.from_numpy(generator.uniform(-1, 1, size)).requires_grad_()
                good += bool(0.25 <= estimate_noise(noisy, x, numpy=True).level / sigma <= 4)
                y = x.detach().requires_grad_()
                (true,) = torch.autograd.grad(function(y), y)
                for order, found in errors.items():
                    estimator = CentralDifference(order, step_size=MeasuredStep())
                    f: Any = blackbox(noisy, numpy=True, repeatable=False, estimator=estimator)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        (estimate,) = torch.autograd.grad(f(x), x)
                    found.append(float((estimate - true).norm() / true.norm()))
                    if number % 5 == 0:
                        best[order].append(best_error(function, x.detach().numpy(), true.numpy(), sigma, order))
            of_two, of_four = map(statistics.median, errors.values())
            best_of_two, best_of_four = map(statistics.median, best.values())
            middle = (of_two, best_of_two, of_four, best_of_four)
            row = f"{name + f', {sigma:.0e}':<26}{good / points:>16.2f}" + "".join(
                f"{value:>12.1e}" for value in middle
            )
            print(row, flush=True)
            figure(f"{name} with noise of {sigma:.0e}: noise estimated within 1/4 to 4", good / points)
            figure(f"{name} with noise of {sigma:.0e}: median error of a measured step", of_two, "relative")
            figure(f"{name} with noise of {sigma:.0e}: that of the best of all steps", best_of_two, "relative")
            figure(f"{name} with noise of {sigma:.0e}: of order 4, measured", of_four, "relative")
            figure(f"{name} with noise of {sigma:.0e}: of order 4, best of all steps", best_of_four, "relative")


def draw(path: Path) -> None:
    """Draw error against step for a program that prints four digits, and where the measured step lies."""
    from matplotlib.figure import Figure

    fn, x = PROGRAMS["prints %.4f"][0], torch.tensor([1.1], dtype=torch.float64)
    sweep = step_sweep(fn, x, numpy=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = sweep.plot(figure.subplots())
    _, f, _ = gradient(fn, 1.1, estimator=CentralDifference(step_size=MeasuredStep()))
    (kept,) = f._facts.step_sizes.values()
    h = float(kept.each(x, central(), 2.0**-52).sizes)
    axes.axvline(h, color="tab:red", label=f"measured {h:.2g}")
    axes.axvline(2.0**-17, color="tab:green", linestyle=":", label="default of float64")
    axes.set(title="A program that prints four decimals")
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"\ndrawn: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measured steps on smooth functions and on the programs of practice.")
    parser.add_argument("--draws", type=int, default=20, help="of x for each program")
    parser.add_argument("--points", type=int, default=300, help="for each level of noise")
    parser.add_argument("--output", type=Path, default=Path("output"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    smooth()
    programs(given.draws)
    noise(given.points)
    draw(given.output / "steps.png")


if __name__ == "__main__":
    main()
