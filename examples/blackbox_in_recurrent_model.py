"""A measured table in a recurrent cell
====================================

A recurrent model whose cell looks a valve up in a measured table, with numpy, trained through that table.

A tank is fed by a valve. Its controller decides from the inflow demand and the level how far to open; the valve's flow
is known only as a table of measurements, read by ``numpy.interp``, which cuts the graph in every time step. The same
model is trained three times by truncated back-propagation through time, on the levels that a tank with known weights
shows: with the table as it is, with FiniteDifferenceGradients attached, and with the table written in torch.

Run: ``python examples/blackbox_in_recurrent_model.py``. It takes half a minute, prints the weights and draws
``output/blackbox_in_recurrent_model.png``.

.. image:: /images/blackbox_in_recurrent_model.png
   :alt: A measured table in a recurrent cell
"""

# sphinx_gallery_thumbnail_path = "images/blackbox_in_recurrent_model.png"

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt import create_supervised_tbptt_trainer
from ignite_tbptt.blackbox import FiniteDifferenceGradients, find_graph_cuts

OPENING = np.array([-1.0, -0.6, -0.25, 0.1, 0.4, 0.75, 1.0])
FLOW = np.array([0.00, 0.05, 0.30, 0.42, 0.90, 1.05, 1.60])
STEPS, BATCH, BATCHES, EPOCHS, TBTT_STEP = 60, 8, 6, 45, 20
DEMAND_WEIGHT, LEVEL_WEIGHT, BIAS, LEAK = 0.9, -0.7, 0.1, 0.35


class TableValve(nn.Module):
    """The valve as it is delivered: a table, and numpy."""

    def forward(self, opening: Tensor) -> Tensor:
        """Flow at each opening, of the same shape."""
        flow = np.interp(opening.detach().numpy(), OPENING, FLOW)
        return torch.from_numpy(flow).to(opening.dtype)


class TorchValve(nn.Module):
    """The same table as a function that autograd can differentiate."""

    def forward(self, opening: Tensor) -> Tensor:
        """Flow at each opening, of the same shape."""
        grid, flow = (torch.as_tensor(column, dtype=opening.dtype) for column in (OPENING, FLOW))
        left = torch.searchsorted(grid, opening.detach(), right=True).sub(1).clamp(0, len(grid) - 2)
        slope = (flow[left + 1] - flow[left]) / (grid[left + 1] - grid[left])
        return flow[left] + slope * (opening - grid[left])


class Tank(nn.Module):
    """Levels (steps, batch, 1) from demands of the same shape; the last level is the hidden state."""

    def __init__(self, valve: nn.Module) -> None:
        super().__init__()
        self.controller = nn.Linear(2, 1)
        self.leak = nn.Parameter(torch.tensor(0.8))
        self.valve = valve

    def forward(self, demand: Tensor, level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The levels, and the last one to go on from."""
        level = torch.zeros_like(demand[0]) if level is None else level
        levels = []
        for wanted in demand:
            opening = torch.tanh(self.controller(torch.cat([wanted, level], dim=-1)))
            level = level + 0.5 * self.valve(opening) - self.leak * level
            levels.append(level)
        return torch.stack(levels), level


def true_tank() -> Tank:
    """The tank that the measurements come from."""
    tank = Tank(TorchValve())
    with torch.no_grad():
        tank.controller.weight.copy_(torch.tensor([[DEMAND_WEIGHT, LEVEL_WEIGHT]]))
        tank.controller.bias.fill_(BIAS)
        tank.leak.fill_(LEAK)
    return tank


def measurements() -> list[tuple[Tensor, Tensor]]:
    """Demands and the levels that follow."""
    generator = torch.Generator().manual_seed(1)
    demands = [1.5 * torch.randn(STEPS, BATCH, 1, generator=generator) for _ in range(BATCHES)]
    with torch.no_grad():
        return [(demand, true_tank()(demand)[0]) for demand in demands]


def train(
    valve: nn.Module, finite_differences: bool, epochs_to_train: int = EPOCHS
) -> tuple[Tank, list[float], FiniteDifferenceGradients | None, float]:
    """Train a tank with this valve; returns it, its loss after each epoch, the handler, and seconds taken."""
    torch.manual_seed(0)
    tank = Tank(valve)
    optimizer = torch.optim.Adam(tank.parameters(), lr=0.03)
    trainer = create_supervised_tbptt_trainer(tank, optimizer, F.mse_loss, tbtt_step=TBTT_STEP)
    # a valve does not know of the others in the batch: one move serves them all
    handler = FiniteDifferenceGradients(tank, in_dims=0) if finite_differences else None
    if handler is not None:
        handler.attach(trainer)
    losses: list[float] = []
    epoch: list[float] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def remember(engine: Engine) -> None:
        epoch.append(float(engine.state.output))

    @trainer.on(Events.EPOCH_COMPLETED)
    def average() -> None:
        losses.append(sum(epoch) / len(epoch))
        epoch.clear()

    start = time.perf_counter()
    trainer.run(measurements(), max_epochs=epochs_to_train)
    return tank, losses, handler, time.perf_counter() - start


def told(tank: Tank) -> str:
    """The weights on one line."""
    weights = [*tank.controller.weight.flatten().tolist(), tank.controller.bias.item(), tank.leak.item()]
    return "  ".join(f"{weight:8.4f}" for weight in weights)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Losses of all three, how far the two that learn are apart, and the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    styles = {"table, cut": ("tab:red", ":"), "table + handler": ("tab:blue", "-"), "torch": ("tab:orange", "--")}
    epochs = range(1, len(curves["torch"]) + 1)
    for name, losses in curves.items():
        colour, line = styles[name]
        left.semilogy(epochs, losses, line, color=colour, label=name, linewidth=2)
    left.set(title="Training loss", xlabel="epoch", ylabel="mean squared error of the level")
    left.legend()
    apart = [abs(a - b) / b for a, b in zip(curves["table + handler"], curves["torch"], strict=True)]
    middle.semilogy(epochs, apart, color="tab:blue")
    middle.set(title="table + handler against torch", xlabel="epoch", ylabel="relative difference of the losses")
    right.plot(OPENING, FLOW, "o-", color="black")
    right.set(title="The valve, as measured", xlabel="opening", ylabel="flow", xticks=[-1, -0.5, 0, 0.5, 1])
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] = ()) -> None:
    """Show the cut, train three times, compare, draw."""
    parser = argparse.ArgumentParser(description="A tank whose valve is a table in numpy, trained through it.")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="a few seconds, which show nothing but that it runs")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        parser.exit(2, "this example needs matplotlib: pip install 'ignite-tbptt[plot]'\n")
    given.output.mkdir(parents=True, exist_ok=True)
    epochs = 1 if given.quick else EPOCHS
    print(find_graph_cuts(Tank(TableValve()), measurements()[0][0]))
    print()
    runs = {
        "table, cut": train(TableValve(), finite_differences=False, epochs_to_train=epochs),
        "table + handler": train(TableValve(), finite_differences=True, epochs_to_train=epochs),
        "torch": train(TorchValve(), finite_differences=False, epochs_to_train=epochs),
    }
    print(f"{'':18}{'demand':>8}  {'level':>8}  {'bias':>8}  {'leak':>8}      last loss   seconds")
    print(f"{'true weights':18}{told(true_tank())}")
    for name, (tank, losses, _, seconds) in runs.items():
        print(f"{name:18}{told(tank)}   {losses[-1]:12.3e}   {seconds:7.2f}")
    handler = runs["table + handler"][2]
    assert handler is not None
    print(f"\nvalve evaluations for gradients: {handler.nfev}, {handler.seconds:.2f} s inside them")
    path = given.output / "blackbox_in_recurrent_model.png"
    draw({name: losses for name, (_, losses, _, _) in runs.items()}, path)
    print(f"drawn: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
