"""Fit an external program
=======================

Two parameters of a program that prints few digits and cannot bear every input.

The program simulates a mass on a spring with friction and prints where the mass is, with six digits. It refuses a
negative stiffness or friction. Its parameters are found from a noisy measurement by gradient descent: several copies of
the program run at a time, steps are measured, since six digits are too few for the usual ones, and stay within bounds.

.. image:: /images/external_program.png
   :alt: Fit an external program
"""

# sphinx_gallery_thumbnail_path = "images/external_program.png"

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ignite_tbptt.blackbox import BoundedStep, CentralDifference, MeasuredStep, blackbox_from_command

# Any program will do; this one is Python so that it is there.
PROGRAM = """
import sys
stiffness, friction = map(float, sys.argv[1:])
if stiffness < 0 or friction < 0:
    sys.exit("stiffness and friction must not be negative")
x, v, dt = 1.0, 0.0, 0.01
for step in range(600):
    v += dt * (-stiffness * x - friction * v)
    x += dt * v
    if step % 30 == 29:
        print("%.6g" % x)
"""
TRUE = torch.tensor([2.0, 0.3], dtype=torch.float64)
LOWEST = 0.01


def main(arguments: Sequence[str] = ()) -> None:
    """Measure, fit, compare, draw."""
    parser = argparse.ArgumentParser(description="Fit the parameters of a program that is started for each evaluation.")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="a few seconds, which show nothing but that it runs")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        parser.exit(2, "this example needs matplotlib: pip install 'ignite-tbptt[plot]'\n")
    given.output.mkdir(parents=True, exist_ok=True)
    estimator = CentralDifference(step_size=BoundedStep(MeasuredStep(), lower=0.0, upper=10.0))
    torch.manual_seed(0)
    start = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        simulate = blackbox_from_command(
            [sys.executable, "-S", "-c", PROGRAM], timeout=60, estimator=estimator, executor=pool
        )
        clean = simulate(TRUE)
        measured = clean + 0.02 * torch.randn_like(clean)
        parameters = torch.tensor([1.2, 1.0], dtype=torch.float64, requires_grad=True)
        first = simulate(parameters).detach()
        optimizer = torch.optim.Adam([parameters], lr=0.1, betas=(0.7, 0.99))
        losses: list[float] = []
        for _ in range(3 if given.quick else 60):
            optimizer.zero_grad()
            loss = ((simulate(parameters) - measured) ** 2).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                parameters.clamp_(min=LOWEST)
            losses.append(loss.item())
        fitted = simulate(parameters).detach()
    print(f"{'':10}{'stiffness':>10}{'friction':>10}")
    print(f"{'true':10}{TRUE[0]:10.4f}{TRUE[1]:10.4f}")
    print(f"{'fitted':10}{parameters[0]:10.4f}{parameters[1]:10.4f}")
    print(f"loss {losses[0]:.5f} -> {losses[-1]:.5f} (noise alone: {0.02**2:.5f})")
    print(f"{simulate.nfev} evaluations for gradients, {time.perf_counter() - start:.1f} s in all")
    path = given.output / "external_program.png"
    draw(measured, first, fitted, losses, path)
    print(f"drawn: {path}")


def draw(measured: Tensor, first: Tensor, fitted: Tensor, losses: list[float], path: Path) -> None:
    """The motion before and after, and the loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    times = [0.3 * (k + 1) for k in range(len(measured))]
    left.plot(times, measured.tolist(), "o", color="black", label="measured")
    left.plot(times, first.tolist(), ":", color="tab:red", label="before")
    left.plot(times, fitted.tolist(), "-", color="tab:blue", label="fitted")
    left.set(title="A mass on a spring", xlabel="time", ylabel="position")
    left.legend()
    right.semilogy(range(1, len(losses) + 1), losses, color="tab:blue")
    right.set(title="Loss", xlabel="step", ylabel="mean squared error")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
