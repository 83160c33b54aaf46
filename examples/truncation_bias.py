"""Influence balancing
===================

A task on which truncated back-propagation learns the opposite of what it should.

The state of a linear system is driven by one parameter theta, which pushes ten of its units up at once and the other
thirteen down with a delay. The short-term effect of theta on the loss has the wrong sign, so chunks that are too short
push theta away from its best value -1/6, however long one trains. Anticipated reweighting has short windows as well and
no bias; full back-propagation has the exact gradient, here in the memory of 50 steps. The script prints where theta
ended and draws output/truncation_bias.png.

::

    python examples/truncation_bias.py        # seconds

Source: Tallec and Ollivier, Unbiasing Truncated Backpropagation Through Time, 2017, arXiv:1705.08209, section 5.1.

.. image:: /images/truncation_bias.png
   :alt: Influence balancing
"""

# sphinx_gallery_thumbnail_path = "images/truncation_bias.png"

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ignite_tbptt import (
    AnticipatedReweightedTruncation,
    FixedTruncation,
    FullBackpropagation,
    Tbptt_Events,
    TruncationPolicy,
    create_supervised_tbptt_trainer,
)

UNITS, UP, BEST, DIVERGED = 23, 10, -1 / 6, 1e6
FLOAT = torch.float64


class InfluenceBalancing(nn.Module):
    """s <- A s + theta v with A = I/2 + superdiagonal/2; y_pred is the first unit of s at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.5, dtype=FLOAT))
        superdiagonal = torch.diag(torch.full((UNITS - 1,), 0.5, dtype=FLOAT), 1)
        self.register_buffer("transition", torch.eye(UNITS, dtype=FLOAT) / 2 + superdiagonal)
        self.register_buffer("push", torch.where(torch.arange(UNITS) < UP, 1.0, -1.0).to(FLOAT))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if state is None:
            state = torch.ones(UNITS, dtype=FLOAT)
        drive, first = self.theta * self.push, []
        for _ in x:
            state = torch.addmv(drive, self.transition, state)
            first.append(state[0])
        return torch.stack(first), state


def half_square(y_pred: Tensor, y: Tensor) -> Tensor:
    return (y_pred - y).square().mean() / 2


class Curve:
    """Theta and the loss of the window against the time steps seen."""

    def __init__(self) -> None:
        self.seen = 0
        self.steps: list[int] = []
        self.theta: list[float] = []
        self.loss: list[float] = []

    def prepare_batch(self, batch: Any, device: Any, non_blocking: bool) -> Any:
        self.seen += len(batch[0])
        return batch


def train(policy: TruncationPolicy, rate: float, steps: int) -> Curve:
    model, curve = InfluenceBalancing(), Curve()
    trainer = create_supervised_tbptt_trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=rate),
        half_square,
        policy,
        prepare_batch=curve.prepare_batch,
        stateful=True,
        checkpoint_segments=isinstance(policy, FullBackpropagation),
    )

    @trainer.on(Tbptt_Events.OPTIMIZER_STEP_COMPLETED)
    def record() -> None:
        curve.steps.append(curve.seen)
        curve.theta.append(model.theta.item())
        curve.loss.append(trainer.state.output)
        if abs(model.theta.item()) > DIVERGED:
            trainer.terminate()

    # The exact gradient needs an end of the sequence to be taken at: there a step for every thousand time steps.
    length = 1000 if isinstance(policy, FullBackpropagation) else steps
    batch = torch.zeros(length, dtype=FLOAT), torch.ones(length, dtype=FLOAT)
    trainer.run([batch] * (steps // length))
    return curve


def draw(curves: dict[str, Curve], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        left.plot(curve.steps, curve.theta, label=name)
        right.plot(curve.steps, [max(loss, 1e-30) for loss in curve.loss], label=name)
    left.axhline(BEST, color="black", linestyle=":", linewidth=1)
    left.set(xlabel="time steps", ylabel="theta", ylim=(-0.5, 2.5), title="the parameter; dotted: its best value, -1/6")
    right.set(xlabel="time steps", ylabel="loss", yscale="log", ylim=(1e-30, 1e6), title="the loss")
    left.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Influence balancing: which truncation learns it.")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="a few seconds, which show nothing but that it runs")
    parser.add_argument("--steps", type=int, default=30_000, help="time steps to train for")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random cuts")
    given = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        parser.exit(2, "this example needs matplotlib: pip install 'ignite-tbptt[plot]'\n")
    given.output.mkdir(parents=True, exist_ok=True)
    given.steps = 2000 if given.quick else given.steps
    reweighted = AnticipatedReweightedTruncation(steps=1, alpha=6, mean=16, seed=given.seed)
    # A window weighs its length over the mean, so that the rate for the sum of its losses is rate / mean.
    candidates: dict[str, tuple[TruncationPolicy, float]] = {
        **{f"chunks of {steps}": (FixedTruncation(steps), 1e-2) for steps in (10, 50, 100, 150)},
        "ARTBP, mean 16": (reweighted, 16 * 3e-5),
        "full, checkpointed": (FullBackpropagation(50), 1e-2),
    }
    print(f"theta should become {BEST:.4f}; {given.steps} time steps, or until it exceeds {DIVERGED:g}")
    print(f"{'':20}{'theta':>12}{'last loss':>12}{'steps seen':>12}{'seconds':>9}")
    curves = {}
    for name, (policy, rate) in candidates.items():
        start = time.perf_counter()
        curve = curves[name] = train(policy, rate, given.steps)
        seconds = time.perf_counter() - start
        verdict = "" if math.isclose(curve.theta[-1], BEST, abs_tol=1e-3) else "  the wrong way"
        print(
            f"{name:20}{curve.theta[-1]:>12.4g}{curve.loss[-1]:>12.1e}{curve.steps[-1]:>12}{seconds:>9.1f}{verdict}",
            flush=True,
        )
    picture = given.output / "truncation_bias.png"
    draw(curves, picture)
    print(f"drawn: {picture}")


if __name__ == "__main__":
    main()
