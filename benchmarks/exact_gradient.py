"""What does the exact gradient of a long sequence cost in chunk memory?

Peak tensor memory (beyond data, parameters and gradients) and time of one batch: full back-propagation written by hand,
`FullBackpropagation` with recomputed segments, and `FixedTruncation` for what truncation would cost, all in this
process and interleaved; the error is that of the gradient against the one written by hand. The goal for segments of 50
steps is a thirtieth of full back-propagation's memory at no more than 1.35 of its time.

An LSTM is one fused operation on the CPU. A GRU is many small ones: there the graph of a segment is walked once, for
the parameters that it leads to, dropped and made again, besides the second forward itself.

    python benchmarks/exact_gradient.py              # half a minute
    python benchmarks/exact_gradient.py --cell gru   # some minutes, most of them in the profiler
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from figures import figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from ignite_tbptt import FixedTruncation, FullBackpropagation, TruncationPolicy, create_supervised_tbptt_trainer

FEATURES = 16


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return how many bytes of tensors `run` holds at most beyond those there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class Candidate:
    """A model with its own parameters and a function that puts the gradient of a batch into them."""

    def __init__(self, name: str, cell: str, hidden: int) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](FEATURES, hidden)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.run: Callable[[], Any]
        self.times: list[float] = []

    def by_hand(self, x: Tensor, y: Tensor) -> Candidate:
        def run() -> None:
            self.optimizer.zero_grad()
            F.mse_loss(self.model(x)[0], y).backward()
            self.optimizer.step()

        self.run = run
        return self

    def by_trainer(self, x: Tensor, y: Tensor, policy: TruncationPolicy, checkpoint: bool) -> Candidate:
        trainer = create_supervised_tbptt_trainer(
            self.model,
            self.optimizer,
            F.mse_loss,
            policy,
            gradient_accumulation_steps="sequence",
            checkpoint_segments=checkpoint,
        )
        self.run = lambda: trainer.run([(x, y)], max_epochs=1)
        return self

    def gradient(self) -> Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of the exact gradient by recomputed segments.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--cell", choices=("lstm", "gru"), default="lstm")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    x = torch.randn(given.steps, given.rows, FEATURES)
    y = torch.randn(given.steps, given.rows, given.hidden)
    sizes = given.cell, given.hidden
    candidates = [
        Candidate("full BPTT by hand", *sizes).by_hand(x, y),
        Candidate("FullBackpropagation(50), recomputed", *sizes).by_trainer(x, y, FullBackpropagation(50), True),
        Candidate("FullBackpropagation(200), recomputed", *sizes).by_trainer(x, y, FullBackpropagation(200), True),
        Candidate("FullBackpropagation(50)", *sizes).by_trainer(x, y, FullBackpropagation(50), False),
        Candidate("FixedTruncation(50)", *sizes).by_trainer(x, y, FixedTruncation(50), False),
    ]
    for candidate in candidates:
        candidate.run()  # gradients and whatever is made once
    for _ in range(given.repeats):
        for candidate in candidates:
            start = time.perf_counter()
            candidate.run()
            candidate.times.append(time.perf_counter() - start)
    print(f"{given.cell.upper()}, T={given.steps}, B={given.rows}, H={given.hidden}, {torch.get_num_threads()} threads")
    print(f"{'':38}{'MiB':>8}{'of full':>9}{'seconds':>9}{'of full':>9}{'gradient error':>16}")
    full, full_bytes = candidates[0], peak_bytes(candidates[0].run)
    for candidate in candidates:
        size = peak_bytes(candidate.run)
        # Runs that follow one another share what else the machine does: the ratio is taken round by round.
        ratio = statistics.median(ours / theirs for ours, theirs in zip(candidate.times, full.times, strict=True))
        error = ((candidate.gradient() - full.gradient()).norm() / full.gradient().norm()).item()
        print(
            f"{candidate.name:38}{size / 2**20:>8.1f}{f'1/{full_bytes / size:.1f}':>9}"
            f"{statistics.median(candidate.times):>9.2f}{ratio:>9.2f}{error:>16.1e}"
        )
        if candidate is not full:
            figure(f"peak memory of full BPTT over that of {candidate.name}", full_bytes / size, "x")
            figure(f"time of {candidate.name} over full BPTT", ratio, "x")
            figure(f"gradient error of {candidate.name}", error, "relative")


if __name__ == "__main__":
    main()
