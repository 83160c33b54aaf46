"""Models, data and hand-written loops that several tests share, and the list of every implementation of a protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt import (
    AnticipatedReweightedTruncation,
    FixedTruncation,
    FullBackpropagation,
    RandomTruncation,
    Segment,
    SlidingTruncation,
    TruncationPolicy,
    Window,
)

POLICIES: list[TruncationPolicy] = [
    FixedTruncation(1),
    FixedTruncation(4),
    FixedTruncation(100),
    SlidingTruncation(1, 4),
    SlidingTruncation(4, 4),
    SlidingTruncation(5, 7),
    RandomTruncation(12, std=3.0, halve_probability=0.2, minimum=2),
    AnticipatedReweightedTruncation(1, alpha=4, mean=8),
    AnticipatedReweightedTruncation(3, alpha=6, mean=10.5),
    FullBackpropagation(4),
]
"""Every truncation policy, for the suite that holds for all of them: a new policy adds a line here."""


class Forecaster(nn.Module):
    """A recurrent layer and a linear one on top: (T, B, F) to (T, B, O)."""

    def __init__(
        self, kind: Callable[..., nn.Module] = nn.GRU, features: int = 3, hidden: int = 5, out: int = 2
    ) -> None:
        super().__init__()
        self.rnn = kind(features, hidden)
        self.head = nn.Linear(hidden, out)

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        y, hidden = self.rnn(x, hidden)
        return self.head(y), hidden


class PairState(NamedTuple):
    h: Tensor
    extra: Tensor | None


@dataclass
class RecordState:
    h: Tensor
    steps: int = 0


class CustomCell(nn.Module):
    """An Elman cell whose state has the form that `wrap` makes of a tensor."""

    def __init__(self, wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.wrap, self.unwrap = wrap, unwrap
        self.inner = nn.Linear(3 + 5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        h = x.new_zeros(x.shape[1], 5) if state is None else self.unwrap(state)
        outputs = []
        for x_t in x:
            h = torch.tanh(self.inner(torch.cat([x_t, h], dim=-1)))
            outputs.append(self.head(h))
        return torch.stack(outputs), self.wrap(h)


@dataclass(frozen=True)
class WholeInSegments:
    """One window of all segments, weighted to the mean over the sequence, with a scale on the gradient in between."""

    steps: int
    carry_scale: float = 1.0

    def windows(self, length: int, generator: torch.Generator) -> Iterator[Window]:
        edges = [*range(0, length, self.steps), length]
        yield tuple(
            Segment(start, stop, self.carry_scale if start else 1.0, (stop - start) / length)
            for start, stop in pairwise(edges)
        )


def batches(count: int = 3, steps: int = 10, rows: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return batches (x, y) of shape (T, B, 3) and (T, B, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(steps, rows, 3, generator=generator), torch.randn(steps, rows, 2, generator=generator))
        for _ in range(count)
    ]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return a model that is the same at every call."""
    torch.manual_seed(seed)
    return make()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def detached(hidden: Any) -> Any:
    if isinstance(hidden, Tensor):
        return hidden.detach()
    return tuple(detached(part) for part in hidden)


def hand_written_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    dim: int = 0,
    hidden: Any = None,
    stateful: bool = False,
) -> list[float]:
    """Train as a careful user would by hand and return the loss of every chunk."""
    losses = []
    for x, y in data:
        if not stateful:
            hidden = None
        for x_t, y_t in zip(x.split(steps, dim), y.split(steps, dim), strict=True):
            optimizer.zero_grad()
            y_pred, hidden = model(x_t) if hidden is None else model(x_t, detached(hidden))
            loss = F.mse_loss(y_pred, y_t)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses
