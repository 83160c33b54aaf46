"""How often is the true error of a gradient inside the interval of its certificate, and what does that cost?

Gradients whose errors come from noise, from truncation and from directions that were not looked at: the share of 95 %
intervals that hold the true error, the estimate over the true error in the median, and the evaluations that certifying
every tenth gradient adds.

    python benchmarks/certificates.py
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from figures import figure
from torch import Tensor

from ignite_tbptt.blackbox import (
    SPSA,
    AbsoluteStep,
    CentralDifference,
    Estimator,
    ForwardDifference,
    GuidedDirections,
    MeasuredStep,
    blackbox,
    central,
)

Function = Callable[[Any], Any]
MEASURED = CentralDifference(step_size=MeasuredStep())


def rosenbrock(x: Any) -> Any:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def sines(x: Any) -> Any:
    return (x.sin() if isinstance(x, Tensor) else np.sin(x)).sum()


CASES: dict[str, tuple[Function, int, float, Estimator]] = {
    **{f"Rosenbrock-4, noise {s:.0e}": (rosenbrock, 4, s, MEASURED) for s in (1e-8, 1e-6, 1e-4, 1e-2, 1e-1)},
    "10 sines, noise 1e-4, forward": (sines, 10, 1e-4, ForwardDifference(step_size=MeasuredStep())),
    "10 sines, central, step 0.1": (sines, 10, 0.0, CentralDifference(step_size=AbsoluteStep(0.1))),
    "200 sines, SPSA(20)": (sines, 200, 0.0, SPSA(20)),
    "200 sines, SPSA(20), noise 1e-4": (sines, 200, 1e-4, SPSA(20, AbsoluteStep(0.03))),
    "200 sines, guided by 20": (sines, 200, 0.0, Estimator(central(), GuidedDirections(20))),
}


def covered(fn: Function, size: int, sigma: float, estimator: Estimator, points: int) -> tuple[float, float]:
    """The share of intervals that hold the true error, and the median of estimate over error."""
    inside, ratios = 0, []
    alive = []  # blackboxes that live at the same time draw directions of their own
    for seed in range(points):
        generator = np.random.default_rng(seed)
        x = torch.from_numpy(generator.uniform(-1, 1, size)).requires_grad_()

        def noisy(x: np.ndarray, generator: np.random.Generator = generator) -> Any:
            return fn(x) + sigma * generator.standard_normal()

        f = blackbox(noisy if sigma else fn, numpy=True, repeatable=not sigma, estimator=estimator, certify=10)
        alive.append(f)
        (found,) = torch.autograd.grad(f(x), x)
        y = x.detach().requires_grad_()
        (true,) = torch.autograd.grad(fn(y), y)
        error, made = float((found - true).norm() / found.norm()), f.certificate
        inside += made.low <= error <= made.high
        ratios.append(made.relative / error)
    return inside / points, statistics.median(ratios)


def overhead(size: int, estimator: Estimator) -> float:
    """Evaluations that certifying every tenth of 100 gradients adds, over those without."""
    x = torch.linspace(-1, 1, size, dtype=torch.float64, requires_grad=True)
    spent = []
    for certify in (None, 10):
        f = blackbox(sines, numpy=True, estimator=estimator, certify=certify)
        for _ in range(100):
            torch.autograd.grad(f(x), x)
        spent.append(f.count.nfev + f.count.probes)
    return spent[1] / spent[0] - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--points", type=int, default=300, help="for each case")
    points = parser.parse_args().points
    warnings.simplefilter("ignore")
    print(f"{'':<34}{'intervals that hold':>20}{'estimate / error':>18}")
    for name, case in CASES.items():
        share, ratio = covered(*case, points)
        print(f"{name:<34}{share:>20.3f}{ratio:>18.2f}")
        figure(f"95 % intervals that hold the true error: {name}", 100 * share, "%")
    for name, size, estimator in (
        ("4 elements, central", 4, CentralDifference()),
        ("10 elements, central", 10, CentralDifference()),
        ("10,000 elements, SPSA(50)", 10_000, SPSA(50)),
    ):
        figure(f"evaluations that certify=10 adds: {name}", 100 * overhead(size, estimator), "%")


if __name__ == "__main__":
    main()
