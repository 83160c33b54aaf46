"""Modules that cut the graph, each beside a twin that does not: the twin's autograd is the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Central differences in float64 with h near eps^(1/3) |x|: truncation h^2 / 6 and round-off eps / h are both near 4e-11
# for functions of order one. The factor of 1000 leaves room for sums over a layer and for third derivatives above one.
CENTRAL64 = 4e-8


class Through(nn.Module):
    """Runs layers, and lets their result through (the twin) or leaves the graph with it."""

    def __init__(self, *layers: nn.Module, cut: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return torch.from_numpy(y.detach().numpy().copy()) if self.cut else y


class Nested(nn.Module):
    """Takes and gives nests: a tensor, a keyword, None; a dict with a tensor and things that are not."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.cut = cut

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, *, gain: Tensor) -> dict[str, Any]:
        y = torch.tanh(self.inner(x)) * gain
        if state is not None:
            y = y + state[0] * state[1]
        return {"y": y.detach() if self.cut else y, "state": (y.detach() if self.cut else y) ** 2, "none": None, "n": 3}


class Cell(nn.Module):
    """A recurrent cell whose state passes through numpy, or does not."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(2, 2)
        self.cut = cut

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        h = torch.tanh(self.mix(h) + x)
        return torch.from_numpy(h.detach().numpy().copy()) if self.cut else h


class Recurrent(nn.Module):
    """A linear encoder, a cell that may cut, a linear decoder; state in, state out."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.encode, self.cell, self.decode = nn.Linear(1, 2), Cell(cut), nn.Linear(2, 1)

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = torch.zeros(x.shape[1], 2, dtype=x.dtype) if h is None else h
        outputs = []
        for step in x:
            h = self.cell(self.encode(step), h)
            outputs.append(self.decode(h))
        return torch.stack(outputs), h


def twins(make: Callable[[bool], nn.Module], seed: int = 0) -> tuple[Any, Any]:
    """The module that cuts and its twin, in float64 with equal weights."""
    torch.manual_seed(seed)
    cut, smooth = make(True).double(), make(False).double()
    smooth.load_state_dict(cut.state_dict())
    return cut, smooth


def gradients(module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """What every parameter and input that requires grad has received."""
    named = {**dict(module.named_parameters()), **{f"input {index}": value for index, value in enumerate(inputs)}}
    received = {}
    for name, value in named.items():
        if value.requires_grad:
            assert value.grad is not None, f"{name} received no gradient"
            received[name] = value.grad
    return received


def assert_near(got: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = CENTRAL64) -> None:
    """The relative error of all gradients taken together, and no name missing."""
    assert got.keys() == truth.keys()
    error = sum(float((got[name] - truth[name]).square().sum()) for name in truth) ** 0.5
    size = sum(float(value.square().sum()) for value in truth.values()) ** 0.5
    assert size > 0
    assert error <= tolerance * size, f"relative error {error / size:.2e}"
