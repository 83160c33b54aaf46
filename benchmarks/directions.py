"""How much of a gradient do 50 directions find in 10,000 dimensions, and what does it save?

Least squares, ``0.5 sum_i c_i (x_i - b_i)^2`` with D = 10,000 and curvatures c from 0.1 to 1, seen through
``blackbox(fn, numpy=True)``. 200 steps of gradient descent by each kind of directions, 100 evaluations a step, each with
the learning rate (of powers of 2) that leaves it the smallest loss. Shown: the cosine of each estimate to the true
gradient, and the calls of the simulator until the loss is what SPSA reaches at its end.

    python benchmarks/directions.py --output docs/images
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from figures import figure

from ignite_tbptt.blackbox import Estimator, GuidedDirections, Orthogonal, Rademacher, blackbox, central

KINDS = {"SPSA": Rademacher, "orthogonal": Orthogonal, "guided": GuidedDirections}


def descent(kind: str, rate: float, size: int, n: int, steps: int) -> tuple[list[float], list[float], int]:
    """Cosines and losses of every step, and the evaluations of one."""
    generator = np.random.default_rng(0)
    curvatures = 10.0 ** generator.uniform(-1, 0, size)
    target = generator.normal(size=size)
    f = blackbox(
        lambda x: 0.5 * (curvatures * (x - target) ** 2).sum(),
        numpy=True,
        estimator=Estimator(central(), KINDS[kind](n)),
    )
    x = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    cosines, losses = [], []
    for _ in range(steps):
        loss = f(x)
        losses.append(float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, x)
        true = torch.as_tensor(curvatures * (x.detach().numpy() - target))
        cosines.append(float(torch.cosine_similarity(gradient, true, dim=0)))
        with torch.no_grad():
            x -= rate * gradient
        if not losses[-1] < 10 * losses[0]:
            break
    return cosines, losses, f.nfev // len(losses)


def best(kind: str, size: int, n: int, steps: int) -> tuple[float, list[float], list[float], int]:
    """The descent whose learning rate leaves the smallest loss: rates grow until they are too large."""
    rate = 2.0**-9 if kind != "guided" else 2.0**-1
    found: tuple[float, list[float], list[float], int] | None = None
    while True:
        cosines, losses, each = descent(kind, rate, size, n, steps)
        if found is not None and not losses[-1] < found[2][-1]:
            return found
        found, rate = (rate, cosines, losses, each), 2 * rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a folder for the picture; none is drawn without it")
    parser.add_argument("--quick", action="store_true", help="400 dimensions, 10 directions, 40 steps")
    given = parser.parse_args()
    size, n, steps = (400, 10, 40) if given.quick else (10_000, 50, 200)

    found = {kind: best(kind, size, n, steps) for kind in KINDS}
    spsa = found["SPSA"][2]
    print(
        f"{'directions':<12}{'rate':>9}{'cosine at 1':>13}{'at end':>8}{'loss at end':>13}{'calls to equal loss':>21}"
    )
    for kind, (rate, cosines, losses, each) in found.items():
        reached = next((step for step, loss in enumerate(losses) if loss <= spsa[-1]), None)
        calls = "never" if reached is None else f"{reached * each:,}"
        print(f"{kind:<12}{rate:>9.3g}{cosines[0]:>13.3f}{cosines[-1]:>8.3f}{losses[-1] / losses[0]:>13.3f}{calls:>21}")
        figure(f"cosine to the gradient after {steps} steps, {n} of {size:,} directions, {kind}", cosines[-1])
        if reached and kind != "SPSA":
            ratio = (len(spsa) - 1) / reached
            figure(f"calls of SPSA over those of {kind}, to the loss that SPSA reaches in {steps} steps", ratio, "x")
    if given.output:
        draw(given.output / "directions.png", found, n, size)


def draw(path: Path, found: dict[str, tuple[float, list[float], list[float], int]], n: int, size: int) -> None:
    import matplotlib.pyplot as plt

    figure_, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for kind, (_, cosines, losses, each) in found.items():
        left.plot(cosines, label=kind)
        right.plot([each * step for step in range(len(losses))], [loss / losses[0] for loss in losses], label=kind)
    left.set(xlabel="step", ylabel="cosine to the true gradient", ylim=(0, 1))
    right.set(xlabel="calls of the simulator", ylabel="loss / first loss", ylim=(0, 1))
    left.set_title(f"{n} directions in {size:,} dimensions", fontsize="medium")
    left.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    main()
