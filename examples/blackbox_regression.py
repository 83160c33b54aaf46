"""One regression, with and without autograd
=========================================

The same regression twice: once through torch, once through a formatted string under ``eval``.

The function is f(x, w) = 2 x w0 + x^2 w1. Written in torch it is differentiated by autograd; written as a string, with
the weights printed into it, it is a blackbox, and `blackbox` differentiates it by central differences. Everything else
is the same: the data, the order of the batches, Adam, Ignite's trainer. Both find the same weights, on the same way:
whatever the seed, the two end within a few millionths of one another.

How near to the true weights both are after 20 epochs is a matter of the start: on [0, 1), x and x^2 are much alike, and
Adam follows a flat valley of the loss in which some starts arrive and others are still on their way. The seed is chosen
such that this run ends at (1.1996, -3.3987), to a thousandth.

Run: ``python examples/blackbox_regression.py``. It takes seconds, prints the weights and draws
``output/blackbox_regression.png``.

.. image:: /images/blackbox_regression.png
   :alt: One regression, with and without autograd
"""

# sphinx_gallery_thumbnail_path = "images/blackbox_regression.png"

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ignite_tbptt.blackbox import blackbox

TRUE_WEIGHTS = (1.2, -3.4)
POINTS, BATCH, EPOCHS, LEARNING_RATE = 200, 10, 20, 0.1
SEED = 25


def in_torch(x: Tensor, w: Tensor) -> Tensor:
    """The function, as autograd likes it."""
    return 2 * x * w[0] + x**2 * w[1]


@blackbox
def as_text(x: Tensor, w: Tensor) -> Tensor:
    """The function, as a string for each number: no gradient comes through here but by differences."""
    w0, w1 = w.tolist()
    return torch.tensor([eval(f"2 * {value} * {w0} + {value} ** 2 * {w1}") for value in x.tolist()])


class Regression(nn.Module):
    """Points (B,) to values (B,), with two weights."""

    def __init__(self, as_string: bool, start: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start.clone())
        self.as_string = as_string

    def forward(self, x: Tensor) -> Tensor:
        """The values of the function."""
        return as_text(x, self.w) if self.as_string else in_torch(x, self.w)


@dataclass(frozen=True)
class Trained:
    """What came of one training."""

    weights: list[float]
    losses: list[float]
    predicted: Tensor
    seconds: float


def train(as_string: bool, validation: Tensor, seed: int = SEED, epochs: int = EPOCHS) -> Trained:
    """Train one of the two, from the same start and on the same batches as the other."""
    data = torch.Generator().manual_seed(seed)
    x, start = torch.rand(POINTS, generator=data), torch.randn(2, generator=data)
    y = in_torch(x, torch.tensor(TRUE_WEIGHTS))
    shuffled = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True, generator=shuffled)
    model = Regression(as_string, start)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    trainer = create_supervised_trainer(model, optimizer, nn.functional.mse_loss)
    losses: list[float] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def keep_loss(engine: Engine) -> None:
        losses.append(engine.state.output)

    begun = time.perf_counter()
    trainer.run(loader, max_epochs=epochs)
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        return Trained(model.w.tolist(), losses, model(validation), seconds)


def draw(torch_run: Trained, text_run: Trained, validation: Tensor, path: Path) -> None:
    """The losses over one another, and what each misses of the true function."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(torch_run.losses, color="0.6", linewidth=5, label="torch, autograd")
    left.semilogy(text_run.losses, color="C3", linewidth=1.2, label="string, central differences")
    left.set(xlabel="iteration", ylabel="mean squared error", title="Training loss")
    true = in_torch(validation, torch.tensor(TRUE_WEIGHTS))
    right.plot(validation, torch_run.predicted - true, color="0.6", linewidth=5, label="torch, autograd")
    right.plot(validation, text_run.predicted - true, color="C3", linewidth=1.2, label="string, central differences")
    apart = float((torch_run.predicted - text_run.predicted).abs().max())
    right.ticklabel_format(axis="y", scilimits=(0, 0))
    right.set(xlabel="x", ylabel="predicted - true", title=f"Validation: the two are at most {apart:.0e} apart")
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] = ()) -> None:
    """Train both, compare, draw."""
    parser = argparse.ArgumentParser(description="Regression through a string under eval, beside torch's own.")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="a few seconds, which show nothing but that it runs")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        parser.exit(2, "this example needs matplotlib: pip install 'ignite-tbptt[plot]'\n")
    given.output.mkdir(parents=True, exist_ok=True)
    validation = torch.linspace(0, 1, 50)
    epochs = 1 if given.quick else EPOCHS
    runs = {"torch": train(False, validation, epochs=epochs), "string": train(True, validation, epochs=epochs)}
    print(f"{'':8}{'w0':>9}{'w1':>9}{'loss':>10}{'seconds':>9}    true weights {TRUE_WEIGHTS}")
    for name, run in runs.items():
        print(f"{name:8}{run.weights[0]:9.4f}{run.weights[1]:9.4f}{run.losses[-1]:10.1e}{run.seconds:9.2f}")
    gradients = len(runs["string"].losses)
    apart = max(abs(a - b) for a, b in zip(runs["torch"].weights, runs["string"].weights, strict=True))
    print(f"weights at most {apart:.0e} apart")
    print(f"{as_text.nfev} evaluations of the string, {as_text.seconds:.2f} s, for {gradients} gradients")
    path = given.output / "blackbox_regression.png"
    draw(runs["torch"], runs["string"], validation, path)
    print(f"drawn: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
