"""Which way x is moved, and how slopes along the moves become a gradient: what all directions have in common.

The idea: every tensor is seen as rows x width (`block`). Where rows are independent, one evaluation moves all rows at
once and each row's share of the output tells its own slope. Where they are not, there is one row, and the same code
serves. Whoever chooses directions is a `Directions`; each makes `Moves` that know their points and their dual. Pairs
with any stencil and any step size; `coordinates`, `random_directions` and `guided` are the directions there are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ignite_tbptt.blackbox.block import Block
from ignite_tbptt.blackbox.stencil import Stencil
from ignite_tbptt.blackbox.step_size import StepSize

__all__ = ["Directions", "Moves", "all_finite", "contract", "weighted", "wide", "wide_type"]


class Moves(ABC):
    """A few moves of one block under one stencil.

    Attributes:
        block: what is moved.
        stencil: at which multiples of each move.
    """

    block: Block
    stencil: Stencil

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of moves."""

    @abstractmethod
    def points(self, start: int, stop: int) -> Tensor:
        """The block at all evaluated offsets of moves start to stop, (moves, evaluated offsets, rows, width)."""

    def point(self, move: int, index: int) -> Tensor:
        """The block at one evaluated offset of a move, (rows, width)."""
        return self.points(move, move + 1)[0, index]

    @abstractmethod
    def realised(self, weights: Sequence[float]) -> Tensor:
        """(count, rows), double: the steps as they came out of rounding, weighted like the outputs will be."""

    @abstractmethod
    def added(self, slopes: Tensor, before: Any) -> Any:
        """What these moves, with slopes (count, rows), and those before them come to; before is None at first."""

    @staticmethod
    @abstractmethod
    def gradient(total: Any) -> Tensor:
        """The gradient of the block, (rows, width), from what all moves come to: the sum of dual x slope."""

    def contracted(
        self, slopes: Sequence[Tensor], cotangents: Sequence[Tensor], dims: Sequence[int] | None, broken: bool
    ) -> Tensor:
        """Slopes of <v, f> along each move, (count, rows); see `contract`."""
        return contract(slopes, cotangents, dims, broken)

    def learn(self, gradient: Tensor) -> None:  # noqa: B027 - most directions remember nothing
        """Remember a gradient of the block, (rows, width), where the next directions depend on it."""

    @abstractmethod
    def mirrored(self, chosen: Sequence[int]) -> Moves:
        """Some of the moves again, to the other side of x."""

    @abstractmethod
    def describe(self, move: int, offset: int) -> str:
        """Which evaluation this is, for a message."""


class Directions(Protocol):
    """Chooses directions; a frozen dataclass of what it needs to know."""

    def moves(
        self, block: Block, stencil: Stencil, step_size: StepSize, eps: float, points: int, draw: int
    ) -> Iterator[Moves]:
        """Yield all moves of a block, in portions of about `points` evaluations.

        Args:
            block: what is to be moved; it has at least one element.
            stencil: the formula that slopes are taken by.
            step_size: how far.
            eps: relative precision, see `StepSize.each`.
            points: of how many evaluations the outputs may lie in memory at a time.
            draw: seeds what is random: another number for every blackbox, call, gradient and rank.
        """
        ...


def contract(
    slopes: Sequence[Tensor], cotangents: Sequence[Tensor], dims: Sequence[int] | None, broken: bool = False
) -> Tensor:
    """Slopes of <v, f> along each move, (count, rows), each row of the output counting for the row that was moved.

    Args:
        slopes: of every output, (count, *shape).
        cotangents: v for each output.
        dims: the axis of the rows in each output, None where the block has one row only.
        broken: whether some slopes are NaN, which counts only where v is not 0.
    """
    total: Tensor | None = None
    for k, (slope, cotangent) in enumerate(zip(slopes, cotangents, strict=True)):
        product = slope * cotangent
        if broken:
            product = torch.where((cotangent == 0) & slope.isnan(), 0.0, product)
        share = _by_row(product, 0 if dims is None else dims[k])
        if dims is None:
            share = share.sum(1, keepdim=True)
        total = share if total is None else total + share
    assert total is not None
    if not all_finite(total):
        # What an output does not depend on takes no part in a cotangent of it that is not finite.
        with_zeros = [torch.where(slope == 0, 0.0, slope * v) for slope, v in zip(slopes, cotangents, strict=True)]
        ones = [torch.ones_like(v) for v in cotangents]
        if any(not all_finite(v) for v in cotangents):
            return contract(with_zeros, ones, dims, broken=False)
    return total


def all_finite(values: Tensor) -> bool:
    """Whether all values are; their sum is, unless it overflows, and is looked at first because it costs less."""
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


def _by_row(values: Tensor, dim: int) -> Tensor:
    """(count, *shape) -> (count, rows), summed over all axes but the one of the rows.

    Where rows are shared this comes before the sum over them all: so that moving one row alone and moving all rows at
    once add the same numbers in the same order.
    """
    if values.dim() == 2:
        return values
    if values.dim() == 1:
        return values.unsqueeze(1)
    moved = values.movedim(dim + 1, 1) if dim else values
    return moved.reshape(moved.shape[0], moved.shape[1], -1).sum(-1)


def weighted(values: Tensor, origin: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted sum of what changed from the origin, over the second axis: (count, offsets, ...) -> (count, ...).

    The weights sum to 0, some of them only up to rounding: what did not move has to cancel before they are applied.
    """
    if len(weights) == 2 and weights[0] == -weights[1]:  # the origin takes no part
        return (values[:, 1] - values[:, 0]).mul_(weights[1])
    total = values[:, 0] - origin
    if weights[0] != 1.0:
        total *= weights[0]
    for j, weight in enumerate(weights[1:], 1):
        total = total.add_(values[:, j] - origin, alpha=weight)
    return total


def wide_type(tensor: Tensor) -> torch.dtype:
    """Double precision, where the device has it."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


def wide(tensor: Tensor) -> Tensor:
    """In double precision, where the device has it: differences keep the digits that the evaluations had."""
    return tensor if tensor.device.type == "mps" else tensor.double()
