"""How much of a gradient do 50 directions find in 10,000 dimensions, and what does it save?

Least squares, ``0.5 sum_i c_i (x_i - b_i)^2`` with curvatures c from 0.1 to 1, seen through ``blackbox(fn,
numpy=True)``: 200 steps of gradient descent, 100 evaluations a step. Shown: the cosine of each estimate to the true
gradient, and the calls of the simulator until the loss is what SPSA reaches at the best of its learning rates.

Small steps turn the gradient slowly, so that what is remembered of it adds up. The largest steps use up what was found
at once: then the directions of all steps together, as many as dimensions here, say how far a descent can come, and
memory saves no calls. A surrogate, here of the wrong curvatures and a target that is off, does.

    python benchmarks/directions.py --output docs/images
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from figures import figure

from ignite_tbptt.blackbox import Estimator, GuidedDirections, Orthogonal, Rademacher, blackbox, central

# learning rates by powers of 2; the mean of SPSA is the gradient, guided directions give a part of it
RUNS = [
    ("SPSA", 2.0**-8),
    ("SPSA", 2.0**-7),
    ("SPSA", 2.0**-6),
    ("orthogonal", 2.0**-7),
    ("guided", 2.0**-7),
    ("guided", 2.0**-4),
    ("guided", 1.0),
    ("guided, surrogate", 1.0),
]


def descent(kind: str, rate: float, size: int, n: int, steps: int) -> tuple[list[float], list[float]]:
    """Cosines and losses of every step."""
    generator = np.random.default_rng(0)
    curvatures = 10.0 ** generator.uniform(-1, 0, size)
    target = generator.normal(size=size)
    guess = target + 0.5 * generator.normal(size=size)

    def simulate(x: np.ndarray) -> np.ndarray:
        return 0.5 * (curvatures * (x - target) ** 2).sum()

    directions = {
        "SPSA": Rademacher(n),
        "orthogonal": Orthogonal(n),
        "guided": GuidedDirections(n),
        "guided, surrogate": GuidedDirections(n, surrogate=lambda x, position: x - torch.from_numpy(guess)),
    }
    f = blackbox(simulate, numpy=True, estimator=Estimator(central(), directions[kind]))
    x = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    cosines, losses = [], []
    for _ in range(steps):
        loss = f(x)
        losses.append(float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, x)
        true = torch.from_numpy(curvatures * (x.detach().numpy() - target))
        cosines.append(float(torch.cosine_similarity(gradient, true, dim=0)))
        with torch.no_grad():
            x -= rate * gradient
    assert f.nfev == 2 * n * steps
    return cosines, [loss / losses[0] for loss in losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, help="a folder for the picture; none is drawn without it")
    parser.add_argument("--quick", action="store_true", help="400 dimensions, 10 directions, 40 steps")
    given = parser.parse_args()
    size, n, steps = (400, 10, 40) if given.quick else (10_000, 50, 200)

    found = {(kind, rate): descent(kind, rate, size, n, steps) for kind, rate in RUNS}
    spsa = min(losses[-1] for (kind, _), (_, losses) in found.items() if kind == "SPSA")
    heads = f"{'directions':<20}{'rate':>8}{'cosine at 1':>13}{'at end':>8}{'loss at end':>13}"
    print(f"{heads}{'calls to equal loss':>21}")
    fewest: dict[str, int] = {}
    for (kind, rate), (cosines, losses) in found.items():
        reached = next((step for step, loss in enumerate(losses) if loss <= spsa), None)
        if reached is not None:
            fewest[kind] = min(reached, fewest.get(kind, steps))
        calls = "not reached" if reached is None else f"{2 * n * reached:,}"
        print(f"{kind:<20}{rate:>8.3g}{cosines[0]:>13.3f}{cosines[-1]:>8.3f}{losses[-1]:>13.3f}{calls:>21}")
        if kind != "SPSA" or rate == 2.0**-7:
            name = f"cosine to the gradient after {steps} steps at a learning rate of {rate:.3g}, {kind}"
            figure(f"{name}, {n} directions in {size:,} dimensions", cosines[-1])
    for kind, step in fewest.items():
        if kind == "SPSA":
            continue
        figure(f"calls of SPSA over those of {kind}, to equal loss, each at its best rate", fewest["SPSA"] / step, "x")
    if given.output:
        draw(given.output / "directions.png", found, n, size)


def draw(path: Path, found: dict[tuple[str, float], tuple[list[float], list[float]]], n: int, size: int) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for (kind, rate), (cosines, losses) in found.items():
        if (kind, rate) in {("SPSA", 2.0**-8), ("SPSA", 2.0**-6)}:
            continue
        left.plot(cosines, label=f"{kind}, rate {rate:.2g}")
        right.plot([2 * n * step / 1000 for step in range(len(losses))], losses)
    left.set(xlabel="step", ylabel="cosine to the true gradient", ylim=(0, 1))
    right.set(xlabel="thousand calls of the simulator", ylabel="loss / first loss", ylim=(0, 1))
    left.set_title(f"{n} directions in {size:,} dimensions", fontsize="medium")
    drawn.legend(loc="outside right center", frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150)
    print(f"drawn: {path}")


if __name__ == "__main__":
    main()
