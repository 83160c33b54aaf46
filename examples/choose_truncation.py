"""How long must chunks be? Measured from the decay of the gradient, on the copy task.

Streams of blocks: 5 to 10 random symbols out of 6, then as many steps in which they are to be said again; nothing
marks how long a block will be but the first question mark. An LSTM of 2 x 50 units is trained for the same number of
time steps with fixed chunks of several lengths, and with chunks that `AdaptiveTruncation` sets from the measured
horizon. The script prints the perplexity of the repeated symbols on a held-out stream (6 is guessing) and draws the
horizon before and after training and the lengths that were chosen, in output/choose_truncation_*.png. What there is to
see is the length that is found with no search, close to the best fixed one; its perplexity comes close as well, but the
last digits of one run are noise: between seeds they differ by 0.1.

    python examples/choose_truncation.py                  # a few minutes
    python examples/choose_truncation.py --steps 20000    # a look

Source of the task and the comparison: Aicher, Foti and Fox, Adaptively Truncating Backpropagation Through Time to
Control Gradient Bias, UAI 2019, arXiv:1905.07473, section 5.1.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt import (
    AdaptiveTruncation,
    ContiguousStreams,
    GradientHorizon,
    Tbptt_Events,
    create_supervised_tbptt_trainer,
)

SYMBOLS, MEMORY, ROWS, BATCH = 6, (5, 10), 64, 240
QUESTION, SILENT = SYMBOLS, SYMBOLS  # as input: say the next one; as target: nothing is to be said


class Copier(nn.Module):
    """Symbols (T, B) to logits of what is to be said (T, B, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(SYMBOLS + 1, 50, num_layers=2)
        self.head = nn.Linear(50, SYMBOLS + 1)

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        y, hidden = self.rnn(F.one_hot(x, SYMBOLS + 1).float(), hidden)
        return self.head(y), hidden


def cross_entropy(y_pred: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(y_pred.flatten(0, 1), y.flatten())


def stream(steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of one long stream of blocks."""
    inputs, targets = [], []
    seen = 0
    while seen < steps:
        size = int(torch.randint(MEMORY[0], MEMORY[1] + 1, (), generator=generator))
        symbols = torch.randint(SYMBOLS, (size,), generator=generator)
        inputs += [symbols, torch.full((size,), QUESTION)]
        targets += [torch.full((size,), SILENT), symbols]
        seen += 2 * size
    return torch.cat(inputs)[:steps], torch.cat(targets)[:steps]


@torch.no_grad()
def perplexity(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the perplexity of the symbols that are to be said, all rows of the held-out streams together."""
    logits, _ = model(x)
    said = y != SILENT
    return math.exp(F.cross_entropy(logits[said], y[said]).item())


class Experiment:
    """The data, and one training run for each way to choose the chunks."""

    def __init__(self, steps: int, window: int, tolerance: float, seed: int) -> None:
        self.steps, self.window, self.tolerance, self.seed = steps, window, tolerance, seed
        generator = torch.Generator().manual_seed(seed)
        self.data = ContiguousStreams(stream(steps * ROWS, generator), rows=ROWS, steps=BATCH, remainder="drop")
        held_out = [stream(1000, generator) for _ in range(ROWS)]
        self.held_out = tuple(torch.stack(parts, dim=1) for parts in zip(*held_out, strict=True))
        self.chosen: list[tuple[int, int]] = []

    def train(self, tbtt_step: int, adaptive: bool, folder: Path | None = None) -> tuple[float, float]:
        """Train on the stream once; return the last perplexity and the best on the way."""
        torch.manual_seed(self.seed)
        model = Copier()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        trainer = create_supervised_tbptt_trainer(model, optimizer, cross_entropy, tbtt_step, stateful=True)
        trainer.add_event_handler(
            Tbptt_Events.BACKWARD_COMPLETED, lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0) and None
        )
        if adaptive:
            self._adapt(trainer, folder)
        found: list[float] = []
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(every=10) | Events.COMPLETED,
            lambda: found.append(perplexity(model, *self.held_out)),
        )
        trainer.run(self.data)
        return found[-1], min(found)

    def _adapt(self, trainer: Engine, folder: Path | None) -> None:
        horizon = GradientHorizon(self.window, samples=16, tolerance=self.tolerance)
        horizon.attach(trainer, Events.ITERATION_STARTED(event_filter=lambda _, count: count % 10 == 1))
        AdaptiveTruncation(horizon, self.tolerance, minimum=5, maximum=60).attach(trainer)

        def record(engine: Engine) -> None:
            state: Any = engine.state
            first = not self.chosen
            self.chosen.append(((state.iteration - 1) * BATCH, state.tbtt_step))
            if folder is not None and first:
                horizon.plot().savefig(folder / "choose_truncation_before.png", dpi=120)

        horizon.on_measured(record)
        if folder is not None:
            trainer.add_event_handler(
                Events.COMPLETED,
                lambda: horizon.plot().savefig(folder / "choose_truncation_after.png", dpi=120),
            )


def draw_choice(chosen: list[tuple[int, int]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.step(*zip(*chosen, strict=True), where="post")
    axes.set(xlabel="time steps seen", ylabel="tbtt_step", title="the length of chunks that was chosen")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Adaptive against fixed truncation on the copy task.")
    parser.add_argument("--steps", type=int, default=36_000, help="time steps of each of the 64 rows")
    parser.add_argument("--window", type=int, default=80, help="time steps over which the decay is measured")
    parser.add_argument("--tolerance", type=float, default=0.1, help="relative bias that is allowed for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("output"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(given.steps, given.window, given.tolerance, given.seed)
    print(
        f"copy task, {given.steps} time steps of {ROWS} rows; perplexity of the copied symbols, {SYMBOLS} is guessing"
    )
    print(f"{'':14}{'last':>8}{'best':>8}{'seconds':>9}")
    for name, steps in (("adaptive", 15), *((f"chunks of {steps}", steps) for steps in (5, 10, 15, 20, 30))):
        start = time.perf_counter()
        last, best = experiment.train(steps, adaptive=name == "adaptive", folder=given.folder)
        print(f"{name:14}{last:>8.3f}{best:>8.3f}{time.perf_counter() - start:>9.1f}", flush=True)
    lengths = [steps for _, steps in experiment.chosen]
    print(f"tbtt_step chosen: {lengths[0]} at first, {min(lengths)} to {max(lengths)}, {lengths[-1]} at the end")
    draw_choice(experiment.chosen, given.folder / "choose_truncation_steps.png")
    print(f"drawn: {given.folder}/choose_truncation_{{before,after,steps}}.png")


if __name__ == "__main__":
    main()
