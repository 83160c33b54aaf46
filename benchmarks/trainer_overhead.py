"""What does the trainer cost over a lean hand-written loop?

A lean loop, contrib's trainer and ours train equal models on equal data, interleaved in one process; the figure is the
median over many rounds of the time relative to the lean loop of the same round. The lean loop sets the model's mode
once, fires no event and keeps no record but the loss. Sequences are 64 chunks long (16 for the largest model), so the
cost of a batch as such, which is above contrib's, is spread over them.

    python benchmarks/trainer_overhead.py
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from figures import figure
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt import create_supervised_tbptt_trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ignite.contrib.engines import create_supervised_tbptt_trainer as create_contrib_trainer

SIZES = [(4, 16, 1), (4, 16, 8), (32, 64, 16), (32, 256, 32)]
"""Rows, hidden size, steps of a chunk."""


class Forecaster(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(size, size)
        self.head = nn.Linear(size, size)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, hidden = self.rnn(x, hidden)
        return self.head(y), hidden


def lean_loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: Tensor, y: Tensor) -> list[float]:
    losses = []
    hidden = None
    model.train()
    for x_t, y_t in zip(x.split(steps), y.split(steps), strict=True):
        optimizer.zero_grad()
        y_pred, hidden = model(x_t) if hidden is None else model(x_t, hidden.detach())
        loss = F.mse_loss(y_pred, y_t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def contestants(size: int, steps: int, optimizer: Any, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Forecaster(size)
        return model, optimizer(model.parameters(), lr=1e-3)

    lean = model_and_optimizer()
    contrib = create_contrib_trainer(*model_and_optimizer(), nn.functional.mse_loss, steps)
    ours = create_supervised_tbptt_trainer(*model_and_optimizer(), F.mse_loss, steps)
    return {
        "lean": lambda: lean_loop(*lean, steps, x, y),
        "contrib": lambda: contrib.run([(x, y)]),
        "ours": lambda: ours.run([(x, y)]),
    }


def measure(runs: dict[str, Callable[[], Any]], seconds: float) -> tuple[dict[str, list[float]], int]:
    """Run all in turn until the time is up and return each one's time relative to "lean" round by round."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name in names:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
        names = names[1:] + names[:1]  # nobody always follows the same one
    ratios = {name: [t / lean for t, lean in zip(times[name], times["lean"], strict=True)] for name in runs}
    return {**ratios, "lean seconds": times["lean"]}, len(times["lean"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the trainer over a lean loop, beside contrib's.")
    parser.add_argument("--seconds", type=float, default=12.0, help="for each size and optimizer")
    parser.add_argument("--threads", type=int, default=1, help="of torch; small models are slower with more")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"GRU and linear layer, {arguments.threads} thread(s); median time over the lean loop (quartiles)")
    print(f"{'B':>4}{'H':>5}{'k':>4}  {'':5}{'lean us/chunk':>14}{'rounds':>8}   {'contrib':<22}{'ours':<22}")
    for rows, size, steps in SIZES:
        chunks = 64 if size < 256 else 16
        x, y = torch.randn(2, chunks * steps, rows, size).unbind()
        for optimizer in (torch.optim.SGD, torch.optim.Adam):
            ratios, rounds = measure(contestants(size, steps, optimizer, x, y), arguments.seconds)
            lean = statistics.median(ratios["lean seconds"]) / chunks * 1e6
            line = f"{rows:>4}{size:>5}{steps:>4}  {optimizer.__name__:5}{lean:>14.0f}{rounds:>8}   "
            for name in ("contrib", "ours"):
                low, middle, high = statistics.quantiles(ratios[name], n=4)
                line += f"{f'{middle:.3f} ({low:.3f}-{high:.3f})':<22}"
            print(line, flush=True)
            for name, who in (("ours", "trainer"), ("contrib", "contrib's trainer")):
                sizes = f"B={rows} H={size} k={steps} {optimizer.__name__}"
                figure(f"time of {who} over a lean loop, {sizes}", statistics.median(ratios[name]), "x")


if __name__ == "__main__":
    main()
