"""How long must chunks be?
========================

Measured from the decay of the gradient, on the copy task.

Streams of blocks: 5 to 10 random symbols out of 6, then as many steps in which they are to be said again; nothing
marks how long a block will be but the first question mark. An LSTM of 2 x 50 units is trained for the same number of
time steps with fixed chunks of several lengths, and with chunks that `AdaptiveTruncation` sets from the measured
decay. The script prints the perplexity of the repeated symbols on held-out streams (6 is guessing) and draws the
decay and the bias at the first measurement and the last, and the runs: output/choose_truncation_*.png.

::

    python examples/choose_truncation.py                       # one seed, a few minutes
    python examples/choose_truncation.py --seeds 5 6 7 8 9     # the comparison
    python examples/choose_truncation.py --steps 14400         # a look

The protocol of the comparison was fixed on the seeds 100 to 102, before it was run on others:

- 36,000 time steps in each of 64 rows; Adam with a learning rate of 0.003 sqrt(K / 15) for chunks of K steps, fixed
  or chosen, as in the paper; gradients clipped at a norm of 1.
- Fixed K = 10, 15, 20, 30. (5 is too short for the task and only costs time.)
- Adaptive: within the range of the fixed ones, 10 to 30; a relative bias of 0.5, the default; measured every 2,400
  steps, from the third time on: like the paper's, it starts with 4,800 steps of training at K = 15.
- What counts is the perplexity at the end, no best on the way; the mean of the last three, after 31,200, 33,600 and
  36,000 steps, is told as well, for it is less noisy. The best fixed K is the one with the least mean over the seeds;
  the best of each seed, which nobody knows beforehand, is told as well.

Over the seeds 5 to 19, of which 10 to 19 were run for more certainty after 5 to 9, the means at the end are 1.193 for
adaptive and 1.429, 1.186, 1.162, 1.246 for chunks of 10, 15, 20, 30: adaptive is 0.031 +- 0.017 above the best of them,
chunks of 20. An earlier version, which could leave a chunk of a few steps at the end of a batch, was run once on the
seeds 0 to 4, two of which had been seen before: 1.181, and 1.377, 1.159, 1.163, 1.181. So a good length is found in one
run and not in four. It is far better than a wrong guess, and not quite as good as the best one.

Source of the task and the comparison: Aicher, Foti and Fox, Adaptively Truncating Backpropagation Through Time to
Control Gradient Bias, UAI 2019, arXiv:1905.07473, section 5.1.

.. image:: /images/choose_truncation_runs.png
   :alt: How long must chunks be?

.. image:: /images/choose_truncation_before.png
   :alt: How long must chunks be?

.. image:: /images/choose_truncation_after.png
   :alt: How long must chunks be?
"""

# sphinx_gallery_thumbnail_path = "images/choose_truncation_runs.png"

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from dataclasses import dataclass, field
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

SYMBOLS, MEMORY, ROWS = 6, (5, 10), 64
BATCH = 2400  # steps between measurements; a multiple of many lengths, and long beside the others' last chunk
FIXED, START, WARM_UP, RATE = (10, 15, 20, 30), 15, 2, 3e-3
ADAPTIVE = 0  # in the place of a fixed length
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


@dataclass
class Run:
    """What one training run left: the perplexity after every batch, and the lengths that were chosen."""

    perplexities: list[float] = field(default_factory=list)
    chosen: list[tuple[int, int]] = field(default_factory=list)

    @property
    def last(self) -> float:
        return self.perplexities[-1]

    @property
    def late(self) -> float:
        return statistics.fmean(self.perplexities[-3:])


class Experiment:
    """The data of one seed, and a training run for each way to choose the chunks."""

    def __init__(self, steps: int, window: int, tolerance: float, seed: int, folder: Path | None) -> None:
        self.window, self.tolerance, self.seed, self.folder = window, tolerance, seed, folder
        generator = torch.Generator().manual_seed(seed)
        inputs = stream(steps * ROWS, generator)
        self.data = ContiguousStreams(inputs, rows=ROWS, steps=min(BATCH, steps), remainder="drop")
        held_out = [stream(1000, generator) for _ in range(ROWS)]
        self.held_out = tuple(torch.stack(parts, dim=1) for parts in zip(*held_out, strict=True))

    def train(self, length: int) -> Run:
        """Train on the stream once, in chunks of `length` steps, or ADAPTIVE ones."""
        run = Run()
        torch.manual_seed(self.seed)
        model = Copier()
        start = length or START
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE * math.sqrt(start / START))
        trainer = create_supervised_tbptt_trainer(model, optimizer, cross_entropy, start, stateful=True)
        trainer.add_event_handler(
            Tbptt_Events.BACKWARD_COMPLETED, lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0) and None
        )
        if length == ADAPTIVE:
            self._adapt(trainer, optimizer, run)
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: run.perplexities.append(perplexity(model, *self.held_out))
        )
        trainer.run(self.data)
        return run

    def _adapt(self, trainer: Engine, optimizer: torch.optim.Optimizer, run: Run) -> None:
        horizon = GradientHorizon(self.window, tolerance=self.tolerance)
        horizon.attach(trainer, Events.ITERATION_STARTED(event_filter=lambda _, count: count > WARM_UP))
        AdaptiveTruncation(horizon, self.tolerance, min(FIXED), max(FIXED), optimizer).attach(trainer)
        run.chosen.append((0, START))

        def record(engine: Engine) -> None:
            state: Any = engine.state
            first = len(run.chosen) == 1
            run.chosen.append(((state.iteration - 1) * BATCH, state.tbtt_step))
            if self.folder is not None and first:
                horizon.plot().savefig(self.folder / "choose_truncation_before.png", dpi=120)

        def draw_last() -> None:
            if self.folder is not None and len(run.chosen) > 1:
                horizon.plot().savefig(self.folder / "choose_truncation_after.png", dpi=120)

        horizon.on_measured(record)
        trainer.add_event_handler(Events.COMPLETED, draw_last)


def draw(runs: dict[int, Run], path: Path) -> None:
    """Draw the perplexities of one seed, and the lengths that were chosen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for length, run in runs.items():
        seen = [BATCH * (index + 1) for index in range(len(run.perplexities))]
        style = {"color": "black", "linewidth": 2.5, "zorder": 3} if length == ADAPTIVE else {}
        left.plot(seen, run.perplexities, label=name_of(length), **style)
    left.set(xlabel="time steps seen", ylabel="perplexity", yscale="log", title="copied symbols, held out")
    left.set_yticks([1, 1.5, 2, 3, 4, 6], labels=["1", "1.5", "2", "3", "4", "6"])
    left.minorticks_off()
    left.legend()
    times, lengths = zip(*runs[ADAPTIVE].chosen, strict=True)
    right.step([*times, seen[-1]], [*lengths, lengths[-1]], where="post", color="black", linewidth=2.5)
    right.set(xlabel="time steps seen", ylabel="tbtt_step", ylim=(0, max(FIXED) + 2), title="length that was chosen")
    for length in FIXED:
        right.axhline(length, color="lightgrey", zorder=0)
    figure.savefig(path, dpi=120)


def name_of(length: int) -> str:
    return f"chunks of {length}" if length else "adaptive"


def compare(title: str, table: dict[int, list[float]]) -> None:
    """Print the means over the seeds and how far adaptive is from the best fixed length, both ways to name it."""
    means = {length: statistics.fmean(values) for length, values in table.items()}
    print(f"{title}\n{'mean':8}" + "".join(f"{mean:>14.3f}" for mean in means.values()))
    best = min(FIXED, key=means.__getitem__)
    of_each = [min(values) for values in zip(*(table[length] for length in FIXED), strict=True)]
    for name, others in ((f"chunks of {best}, the best by mean", table[best]), ("the best of each seed", of_each)):
        differences = [ours - theirs for ours, theirs in zip(table[ADAPTIVE], others, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        print(f"adaptive less {name}: {statistics.fmean(differences):+.3f} +- {error:.3f} (standard error)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Adaptive against fixed truncation on the copy task.")
    parser.add_argument("--output", "--folder", type=Path, default=Path("output"), help="folder for the pictures")
    parser.add_argument("--quick", action="store_true", help="a few seconds, which show nothing but that it runs")
    parser.add_argument("--steps", type=int, default=36_000, help="time steps of each of the 64 rows")
    parser.add_argument("--window", type=int, default=80, help="time steps over which the decay is measured")
    parser.add_argument("--tolerance", type=float, default=0.5, help="relative bias that is allowed for")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        parser.exit(2, "this example needs matplotlib: pip install 'ignite-tbptt[plot]'\n")
    given.output.mkdir(parents=True, exist_ok=True)
    given.steps = 2 * BATCH if given.quick else given.steps
    ways = (ADAPTIVE, *FIXED)
    print(f"copy task, {given.steps} steps of {ROWS} rows; perplexity of the copied symbols, {SYMBOLS} is guessing")
    print(f"{'seed':8}" + "".join(f"{name_of(length):>14}" for length in ways) + f"{'seconds':>10}")
    table: dict[int, list[Run]] = {length: [] for length in ways}
    for seed in given.seeds:
        start, folder = time.perf_counter(), given.output if seed == given.seeds[0] else None
        experiment = Experiment(given.steps, given.window, given.tolerance, seed, folder)
        print(f"{seed:<8}", end="", flush=True)
        for length, runs in table.items():
            runs.append(experiment.train(length))
            print(f"{runs[-1].last:>14.3f}", end="", flush=True)
        print(f"{time.perf_counter() - start:>10.0f}")
        chosen = table[ADAPTIVE][-1].chosen
        print(f"        chosen: {', '.join(str(length) for _, length in chosen)}", flush=True)
        if folder is not None:
            draw({length: runs[0] for length, runs in table.items()}, folder / "choose_truncation_runs.png")
    if len(given.seeds) > 1:
        compare("at the end", {length: [run.last for run in runs] for length, runs in table.items()})
        compare("mean of the last three", {length: [run.late for run in runs] for length, runs in table.items()})
    print(f"drawn: {', '.join(map(str, sorted(given.output.glob('choose_truncation_*.png'))))}")


if __name__ == "__main__":
    main()
