"""How much memory does a sequence of T steps take beyond its data?

Peak tensor memory of one batch, from the allocation events of torch's profiler, while T grows: the trainer, contrib's
trainer (which cuts the same chunks) and full back-propagation, all in this process. The data exist before and are not
counted. The trainer should not grow with T. Then what the plan of a million windows takes until the first one is there,
in memory of Python objects and in time.

    python benchmarks/memory_vs_length.py
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from figures import figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from ignite_tbptt import FixedTruncation, RandomTruncation, SlidingTruncation, create_supervised_tbptt_trainer
from ignite_tbptt.truncation import plan_windows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ignite.contrib.engines import create_supervised_tbptt_trainer as create_contrib_trainer

ROWS, SIZE, CHUNK = 8, 32, 64


class Forecaster(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(SIZE, SIZE)  # one fused operation on the CPU, so few events for the profiler
        self.head = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        y, hidden = self.rnn(x, hidden)
        return self.head(y), hidden


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return how many bytes of tensors `run` holds at most beyond those there before."""
    run()  # gradients and whatever is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def chunked(factory: Any, x: Tensor, y: Tensor) -> int:
    torch.manual_seed(0)
    model = Forecaster()
    trainer = factory(model, torch.optim.SGD(model.parameters(), lr=1e-3), F.mse_loss, CHUNK)
    return peak_bytes(lambda: trainer.run([(x, y)], max_epochs=1))


def full(x: Tensor, y: Tensor) -> int:
    torch.manual_seed(0)
    model = Forecaster()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x)[0], y).backward()
        optimizer.step()

    return peak_bytes(run)


def first_window(policy: Any, length: int) -> tuple[float, float]:
    """Return KiB and milliseconds until the first window of a plan is there."""
    start = time.perf_counter()
    next(iter(plan_windows(policy, length, 0)))
    seconds = time.perf_counter() - start
    tracemalloc.start()
    next(iter(plan_windows(policy, length, 0)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1024, 1000 * seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak tensor memory beyond the data, against the sequence length.")
    parser.add_argument("--longest", type=int, default=65_536)
    longest = parser.parse_args().longest
    print(f"LSTM, B={ROWS}, H={SIZE}, chunks of {CHUNK}: peak KiB of tensors beyond the data")
    print(f"{'T':>8}{'data':>10}{'trainer':>10}{'contrib':>10}{'full BPTT':>12}{'full/trainer':>14}")
    measured = []
    length = 1024
    while length <= longest:
        x, y = torch.randn(2, length, ROWS, SIZE).unbind()
        ours, contrib, whole = (
            chunked(create_supervised_tbptt_trainer, x, y),
            chunked(create_contrib_trainer, x, y),
            full(x, y),
        )
        measured.append(ours)
        kib = [size / 1024 for size in (2 * x.nbytes, ours, contrib, whole)]
        print(
            f"{length:>8,}{kib[0]:>10,.0f}{kib[1]:>10,.1f}{kib[2]:>10,.1f}{kib[3]:>12,.1f}{whole / ours:>14.1f}",
            flush=True,
        )
        length *= 4
    figure(f"full BPTT's peak memory over the trainer's, T={length // 4:,}", whole / ours, "x")
    figure(
        f"the trainer's peak memory, T from 1,024 to {length // 4:,}: largest over smallest",
        max(measured) / min(measured),
        "x",
    )
    for policy, note in (
        (FixedTruncation(1), ""),
        (SlidingTruncation(1, 4), ""),
        (RandomTruncation(2, std=0.5, minimum=1), " (drawn once to be counted)"),
    ):
        kib_of_plan, milliseconds = first_window(policy, 1_000_000)
        print(f"{policy!r} of 1,000,000 steps: {kib_of_plan:.0f} KiB, {milliseconds:.1f} ms to the first window{note}")
        figure(f"plan of {policy!r} for 1,000,000 steps", kib_of_plan, "KiB")


if __name__ == "__main__":
    main()
