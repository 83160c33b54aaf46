"""Which directions x is moved in, and the dual of each, which turns a slope along it back into a gradient.

The idea: every tensor is seen as rows x width (`blocks`). Where rows are independent, one evaluation moves all rows at
once and each row's share of the output tells its own slope: batch-parallel coordinates, and random directions of its
own for every row. Where they are not, there is one row, and the same code gives plain coordinates. For coordinates the
sum over directions of dual x direction is the identity; for random directions its expectation is. Pairs with any
stencil and any step size.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ignite_tbptt.blackbox.blocks import Block
from ignite_tbptt.blackbox.stencil import Stencil
from ignite_tbptt.blackbox.step_size import StepSize

__all__ = [
    "CoordinateMoves",
    "Coordinates",
    "Directions",
    "Gaussian",
    "Moves",
    "Orthogonal",
    "Rademacher",
    "RandomMoves",
]


# Random moves are made, and compared with what they came out as, so many bytes at a time.
_POINTS_BYTES = 2**20


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

    @abstractmethod
    def realised(self, weights: Sequence[float]) -> Tensor:
        """(count, rows), double: the steps as they came out of rounding, weighted like the outputs will be."""

    @abstractmethod
    def added(self, slopes: Tensor, gradient: Tensor | None) -> Tensor:
        """The (rows, width) gradient of the block with dual x slope of every move added, slopes being (count, rows).

        `gradient` is what earlier moves gave, in double precision, and may be changed; None before the first.
        """

    @abstractmethod
    def mirrored(self, chosen: Sequence[int]) -> Moves:
        """Some of the moves again, to the other side of x."""

    @abstractmethod
    def describe(self, move: int, offset: int) -> str:
        """Which evaluation this is, for a message."""


@dataclass(frozen=True)
class CoordinateMoves(Moves):
    """Columns of the block, each moved in every row by a step of its own."""

    block: Block
    stencil: Stencil
    columns: range | Tensor
    steps: Tensor
    """(count, rows), signed."""

    @property
    def count(self) -> int:
        """Number of moves."""
        return len(self.columns)

    @functools.cached_property
    def _start(self) -> Tensor:
        return _columns(self.block.x, self.columns).T

    @functools.cached_property
    def _moved(self) -> Tensor:
        """(count, evaluated offsets, rows)."""
        moved = [torch.add(self._start, self.steps, alpha=offset) for offset in self.stencil.evaluated]
        return moved[0].unsqueeze(1) if len(moved) == 1 else torch.stack(moved, 1)

    def points(self, start: int, stop: int) -> Tensor:
        """See `Moves.points`."""
        x, moved, columns = self.block.x, self._moved, self.columns
        if (start, stop) != (0, self.count):
            moved, columns = moved[start:stop], columns[start:stop]
        points = x.expand(moved.shape[:2] + x.shape).clone(memory_format=torch.contiguous_format)
        if isinstance(columns, range):
            points.diagonal(columns.start, 0, 3).copy_(moved.permute(1, 2, 0))
            return points
        return points.scatter_(3, columns.view(-1, 1, 1, 1).expand(*moved.shape, 1), moved.unsqueeze(-1))

    def realised(self, weights: Sequence[float]) -> Tensor:
        """See `Moves.realised`."""
        return weighted(_wide(self._moved), self._start, weights)

    def added(self, slopes: Tensor, gradient: Tensor | None) -> Tensor:
        """See `Moves.added`."""
        if gradient is None:
            if self.columns == range(self.block.x.shape[1]):
                return slopes.T
            gradient = torch.zeros(self.block.x.shape, dtype=slopes.dtype, device=slopes.device)
        columns = self.columns
        gradient[:, slice(columns.start, columns.stop) if isinstance(columns, range) else columns] = slopes.T
        return gradient

    def mirrored(self, chosen: Sequence[int]) -> CoordinateMoves:
        """See `Moves.mirrored`."""
        some = torch.tensor(chosen, device=self.steps.device)
        columns = some + self.columns.start if isinstance(self.columns, range) else self.columns[some]
        return CoordinateMoves(self.block, self.stencil.mirrored(), columns, self.steps[some])

    def describe(self, move: int, offset: int) -> str:
        """See `Moves.describe`."""
        name, index, layout = self.block.spelled(int(self.columns[move]))
        rows = "" if layout.dim is None else f" (and its like in all {layout.rows} rows)"
        return f"{name}: element {index}{rows} moved by {offset * float(self.steps[move, 0]):+.3g}"


@dataclass(frozen=True)
class RandomMoves(Moves):
    """Directions that move every element of the block."""

    block: Block
    stencil: Stencil
    displacements: Tensor
    """(count, rows, width): the direction times the step."""
    share: float
    """What each direction counts for, over the squared step: 1 / (n h^2)."""

    @property
    def count(self) -> int:
        """Number of moves."""
        return len(self.displacements)

    def points(self, start: int, stop: int) -> Tensor:
        """See `Moves.points`."""
        displacements = self.displacements[start:stop]
        return torch.stack([self.block.x + offset * displacements for offset in self.stencil.evaluated], 1)

    def realised(self, weights: Sequence[float]) -> Tensor:
        """See `Moves.realised`: the component along the direction, relative to its length."""
        wanted = _wide(self.displacements)
        moved = weighted(_wide(self.points(0, self.count)), self.block.x, weights)
        return (moved * wanted).sum(-1) / wanted.square().sum(-1)

    def added(self, slopes: Tensor, gradient: Tensor | None) -> Tensor:
        """See `Moves.added`."""
        more = torch.einsum("nr,nrd->rd", slopes * self.share, _wide(self.displacements))
        return more if gradient is None else gradient.add_(more)

    def mirrored(self, chosen: Sequence[int]) -> RandomMoves:
        """See `Moves.mirrored`."""
        return RandomMoves(self.block, self.stencil.mirrored(), self.displacements[list(chosen)], self.share)

    def describe(self, move: int, offset: int) -> str:
        """See `Moves.describe`."""
        names = ", ".join(self.block.names[member] for member in self.block.members)
        largest = abs(offset) * float(self.displacements[move].abs().max())
        return f"{names}: all elements moved along a random direction, by {largest:.3g} at most"


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
            draw: how many gradients were estimated before: random directions are new each time.
        """
        ...


@dataclass(frozen=True)
class Coordinates:
    """Every element in turn, or every column of independent rows: exact up to the error of the stencil.

    Costs as many directions as a row has elements, for each tensor that requires grad.
    """

    def moves(
        self, block: Block, stencil: Stencil, step_size: StepSize, eps: float, points: int, draw: int
    ) -> Iterator[Moves]:
        """See `Directions.moves`."""
        sizes, one_sided = block.steps(step_size, stencil, eps)
        for formula, columns in _by_formula(stencil, one_sided, block.x):
            steps = sizes
            if one_sided is not None and formula is not stencil:
                # rows with room on both sides have it for the shorter reach of the two-sided formula
                steps = torch.where(one_sided, sizes, sizes * (stencil.reach / formula.reach))
            portion = max(1, points // len(formula.evaluated))
            for start in range(0, len(columns), portion):
                some = columns[start : start + portion]
                yield CoordinateMoves(block, formula, some, _columns(steps, some).T)


@dataclass(frozen=True)
class _Random(ABC):
    """What random directions have in common: their number, their seed and one step for all elements.

    Args:
        n: number of directions.
        seed: directions are drawn from a stream of their own, by this seed and the number of gradients before.

    Raises:
        ValueError: n below 1.
    """

    n: int
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(
                f"n must be a whole number of directions, at least 1, got {self.n!r}: without any there is no "
                "gradient; give n=1 for the cheapest, or Coordinates() for an exact one"
            )

    @abstractmethod
    def _directions(self, rows: int, width: int, generator: torch.Generator) -> Tensor:
        """(n, rows, width), float32 or float64 on the CPU, with the identity as mean of direction x direction."""

    def moves(
        self, block: Block, stencil: Stencil, step_size: StepSize, eps: float, points: int, draw: int
    ) -> Iterator[Moves]:
        """See `Directions.moves`."""
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + draw) % 2**63)
        directions = self._directions(block.x.shape[0], block.x.shape[1], generator)
        h = step_size.along(block.apart(block.x), stencil, eps, float(directions.abs().max()), block.positions)
        # unlike those of coordinates, moves are as large as the points themselves
        points = min(points, _POINTS_BYTES // block.x.nbytes)
        for some in directions.split(max(1, points // len(stencil.evaluated))):
            yield RandomMoves(block, stencil, (some * h).to(block.x), 1 / (len(directions) * h * h))


@dataclass(frozen=True)
class Rademacher(_Random):
    """n directions of random signs: SPSA (Spall 1992), relative variance (D - 1) / n."""

    def _directions(self, rows: int, width: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, 2, (self.n, rows, width), generator=generator).mul_(2).sub_(1).float()


@dataclass(frozen=True)
class Gaussian(_Random):
    """n directions of normal numbers: Gaussian smoothing (Nesterov and Spokoiny 2017), variance (D + 1) / n."""

    def _directions(self, rows: int, width: int, generator: torch.Generator) -> Tensor:
        return torch.randn(self.n, rows, width, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Orthogonal(_Random):
    """n random directions at right angles (Choromanski et al. 2018): relative variance D / n - 1.

    Exact up to the error of the stencil once n reaches the number of elements D; more are not drawn.
    """

    def _directions(self, rows: int, width: int, generator: torch.Generator) -> Tensor:
        n = min(self.n, width)
        normal = torch.randn(rows, width, n, generator=generator, dtype=torch.float64)
        # which of q and -q comes out is not random, but direction x dual is the same for both
        q = torch.linalg.qr(normal)[0]
        directions: Tensor = q.permute(2, 0, 1) * math.sqrt(width)
        return directions


def _by_formula(
    stencil: Stencil, one_sided: Tensor | None, x: Tensor
) -> list[tuple[Stencil, range]] | list[tuple[Stencil, Tensor]]:
    """Columns under the stencil, and those that a bound forces, in some row, to one side."""
    if one_sided is None:
        return [(stencil, range(x.shape[1]))]
    forced = one_sided.any(0)
    return [(stencil, (~forced).nonzero()[:, 0]), (stencil.one_sided(), forced.nonzero()[:, 0])]


def _columns(rows: Tensor, columns: range | Tensor) -> Tensor:
    """Some columns of (rows, width)."""
    if not isinstance(columns, range):
        return rows[:, columns]
    return rows if len(columns) == rows.shape[1] else rows[:, columns.start : columns.stop]


def weighted(values: Tensor, origin: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted sum of what changed from the origin, over the second axis: (count, offsets, ...) -> (count, ...).

    The weights sum to 0, some of them only up to rounding: what did not move has to cancel before they are applied.
    """
    total = values[:, 0] - origin
    if weights[0] != 1.0:
        total *= weights[0]
    for j, weight in enumerate(weights[1:], 1):
        total = total.add_(values[:, j] - origin, alpha=weight)
    return total


def _wide(tensor: Tensor) -> Tensor:
    """In double precision, where the device has it: differences keep the digits that the evaluations had."""
    return tensor if tensor.device.type == "mps" else tensor.double()
