"""How exact gradients by finite differences are: each module under each formula, against autograd in float64.

The first table stands beside the figures that the package promises: modules on a small batch, a loss that is a positive
sum of the outputs, numbers that float32 can hold; each figure is the median of five seeds. The second takes modules of
sizes that chance has chosen and losses of either sign, and stands beside the error that truncation and round-off must
make for these sizes. Run: ``OMP_NUM_THREADS=1 python benchmarks/blackbox_accuracy.py``; it takes a minute.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from figures import figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # the modules and their truths are those of the tests

from tests.blackbox.accuracy import FORMULAS, OF_A_BATCH, TABLE, Problem, of_any_size

SETTINGS = [(name, dtype) for dtype in (torch.float32, torch.float64) for name in FORMULAS]
HEADS = [f"{name}, f{torch.finfo(dtype).bits}" for name, dtype in SETTINGS]


def row(title: str, cells: list[str]) -> None:
    print(f"{title:26}" + "".join(f"{cell:>14}" for cell in cells))


def beside_the_promise(seeds: int = 5) -> None:
    """Medians for a small batch, over what is promised."""
    row("a small batch", HEADS)
    worst = dict.fromkeys(HEADS, 0.0)
    for kind, case in OF_A_BATCH.items():
        problems = [Problem(case, seed, torch.float32, positive=True) for seed in range(seeds)]
        found = [statistics.median(p.error(FORMULAS[name], dtype) for p in problems) for name, dtype in SETTINGS]
        row(kind, [f"{error:.1e}" for error in found])
        for head, error, bound in zip(HEADS, found, TABLE.get(kind, ()), strict=False):
            worst[head] = max(worst[head], error / bound)
        promised = [f"{error:.0e}" for error in TABLE.get(kind, ())]
        row("  promised", promised + ["-"] * (len(SETTINGS) - len(promised)))
    for head, error in worst.items():
        if error:
            figure(f"{head}: largest median error over the promised one", error, "x")


def beside_the_theory(seeds: int = 3) -> None:
    """Median error for sizes by chance, over what truncation and round-off must make."""
    row("\nsizes by chance", HEADS)
    for kind in OF_A_BATCH:
        found: list[float] = []
        derived: list[float] = []
        for name, dtype in SETTINGS:
            problems = [Problem(of_any_size(kind, seed), seed, dtype) for seed in range(seeds)]
            found.append(statistics.median(p.error(FORMULAS[name], dtype) for p in problems))
            derived.append(statistics.median(p.expected(FORMULAS[name], dtype).total for p in problems))
        row(kind, [f"{error:.1e}" for error in found])
        row("  derived", [f"{error:.1e}" for error in derived])


if __name__ == "__main__":
    torch.set_num_threads(1)
    beside_the_promise()
    beside_the_theory()
