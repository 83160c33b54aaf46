"""What does the trainer cost over a hand-written loop on two ranks?

Two gloo ranks under DistributedDataParallel run a lean loop and the trainer in turn, on equal models and data; the
figure is the median over many rounds of the trainer's time relative to the loop of the same round, on rank 0. The
trainer agrees with the other rank before every step, which the loop does not.

    python benchmarks/ranks_overhead.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from figures import figure
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from trainer_overhead import Forecaster, lean_loop

from ignite_tbptt import create_supervised_tbptt_trainer

SIZES = [(4, 16, 1), (32, 64, 16), (32, 256, 32)]
"""Rows, hidden size, steps of a chunk."""

CHUNKS = 32


def contestants(size: int, steps: int, x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def wrapped() -> Any:
        torch.manual_seed(0)
        return DistributedDataParallel(Forecaster(size))

    by_hand, by_trainer = wrapped(), wrapped()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1e-3)
    trainer = create_supervised_tbptt_trainer(
        by_trainer, torch.optim.SGD(by_trainer.parameters(), lr=1e-3), F.mse_loss, steps
    )
    return {
        "loop": lambda: lean_loop(by_hand, optimizer, steps, x, y),
        "trainer": lambda: trainer.run([(x, y)]),
    }


def main(rank: int, rounds: int) -> None:
    torch.set_num_threads(1)
    for rows, size, steps in SIZES:
        x, y = torch.randn(2, CHUNKS * steps, rows, size).unbind()
        runs = contestants(size, steps, x, y)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds + 1):
            for name in sorted(runs, reverse=bool(turn % 2)):
                dist.barrier()
                start = time.perf_counter()
                runs[name]()
                if turn:
                    times[name].append(time.perf_counter() - start)
        ratios = [ours / loop for ours, loop in zip(times["trainer"], times["loop"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        if rank == 0:
            loop = statistics.median(times["loop"]) / CHUNKS * 1e6
            print(f"{rows:>4}{size:>5}{steps:>4}{loop:>14.0f}   {middle:.3f} ({low:.3f}-{high:.3f})", flush=True)
            figure(f"time of the trainer over a lean loop, 2 ranks, B={rows} H={size} k={steps}", middle, "x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time of the trainer over a hand-written loop on two gloo ranks.")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    print(f"GRU and linear layer, 2 gloo ranks of 1 thread, median of {arguments.rounds} rounds (quartiles)")
    print(f"{'B':>4}{'H':>5}{'k':>4}{'loop us/chunk':>14}   trainer / loop")
    with tempfile.TemporaryDirectory() as folder:
        init = f"file://{folder}/meeting"
        with idist.Parallel(backend="gloo", nproc_per_node=2, init_method=init, start_method="spawn") as parallel:
            parallel.run(main, arguments.rounds)
