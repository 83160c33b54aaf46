"""A numpy module in every step of a recurrent model, beside the autograd.Function that one writes by hand.

32 steps of 16 rows, a module of two inputs and no parameters; forward and backward together, in turns in one run. With
``in_dims`` the whole window is one round: the points of all its calls go into few calls of the module. Run with
``OMP_NUM_THREADS=1 python benchmarks/blackbox_window.py``; ``--profile`` says where the time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from figures import figure
from torch import Tensor, nn

from ignite_tbptt.blackbox import bind, blackbox

STEPS, ROWS, PAIRS = 32, 16, 101
H = 2.0**-7


def cell(x: Any, h: Any) -> Any:
    """The blackbox: both inputs and the output are (rows,) arrays."""
    return np.tanh(0.9 * h + x) + 0.1 * np.sin(x * h)


class ByHand(torch.autograd.Function):
    """Central differences of the cell, each input moved in all rows at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor) -> Tensor:
        ctx.save_for_backward(x, h)
        return torch.from_numpy(cell(x.numpy(), h.numpy()))

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        x, h = (tensor.numpy() for tensor in ctx.saved_tensors)
        dx = (cell(x + H, h) - cell(x - H, h)) / (2 * H)
        dh = (cell(x, h + H) - cell(x, h - H)) / (2 * H)
        return cotangent * torch.from_numpy(dx), cotangent * torch.from_numpy(dh)


class Cell(nn.Module):
    """The cell as a module."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """(rows,), (rows,) -> (rows,)."""
        return torch.from_numpy(cell(x.detach().numpy(), h.detach().numpy()))


def window(step: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, gain: Tensor) -> None:
    """Forward and backward of a sequence."""
    gain.grad = None
    state, loss = torch.zeros(ROWS, dtype=inputs.dtype), torch.zeros((), dtype=inputs.dtype)
    for x in inputs:
        state = step(x * gain, state * gain)
        loss = loss + state.square().mean()
    loss.backward()


def main() -> None:
    """Time all ways in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs, gain = torch.randn(STEPS, ROWS, dtype=torch.float64), torch.ones((), dtype=torch.float64).requires_grad_()
    bound, alone = Cell(), Cell()
    bind(bound, in_dims=0)
    bind(alone)
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "by hand": ByHand.apply,  # type: ignore[dict-item]
        "module, in_dims": bound,
        "function, in_dims": blackbox(cell, numpy=True, in_dims=0),
        "module, no in_dims": alone,
    }
    gradients = {}
    for name, way in ways.items():
        for _ in range(5):  # verified at gradients 1, 2, 4, ...
            window(way, inputs, gain)
        gradients[name] = float(gain.grad)  # type: ignore[arg-type]
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.pairs):
        for name, way in ways.items():
            if name == "module, no in_dims" and len(taken[name]) > 3:
                continue
            start = time.perf_counter()
            window(way, inputs, gain)
            taken[name].append(time.perf_counter() - start)
    print(f"{STEPS} steps of {ROWS} rows, forward and backward, medians")
    for name, times in taken.items():
        over = statistics.median(mine / theirs for mine, theirs in zip(times, taken["by hand"], strict=False))
        print(f"  {name:22}{statistics.median(times) * 1e3:9.2f} ms{over:8.2f}   gradient {gradients[name]:.6f}")
        if name != "by hand":
            figure(f"{STEPS} calls in a recurrent model, time of {name} over a Function by hand", over, "x")
    if given.profile:
        with cProfile.Profile() as profile:
            for _ in range(20):
                window(bound, inputs, gain)
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    main()
