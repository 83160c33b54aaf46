"""Which directions x is moved in, and the dual of each, which turns a slope along it back into a gradient.

The idea: every tensor is seen as rows x width. Where rows are independent, one evaluation moves all rows at once and
each row's share of the output tells its own slope: batch-parallel coordinates, and random directions of its own for
every row. Where they are not, there is one row, and the same code gives plain coordinates. For coordinates the sum over
directions of dual x direction is the identity; for random directions its expectation is. Pairs with any stencil and
any step size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ignite_tbptt.blackbox.stencil import Stencil
from ignite_tbptt.blackbox.step_size import StepSize

__all__ = [
    "Block",
    "CoordinateMoves",
    "Coordinates",
    "Directions",
    "Gaussian",
    "Moves",
    "Orthogonal",
    "Rademacher",
    "RandomMoves",
    "Rows",
]


class Rows:
    """A tensor's shape, seen as independent rows of some width; as a single row where `dim` is None."""

    def __init__(self, shape: Sequence[int], dim: int | None) -> None:
        self.shape = tuple(shape)
        self.dim = dim
        numel = math.prod(self.shape)
        self.rows = 1 if dim is None else self.shape[dim]
        self.width = numel // self.rows if self.rows else 0

    def split(self, tensor: Tensor) -> Tensor:
        """(*shape) -> (rows, width)."""
        moved = tensor if self.dim is None else tensor.movedim(self.dim, 0)
        return moved.reshape(self.rows, self.width)

    def join(self, rows: Tensor) -> Tensor:
        """(*leading, rows, width) -> (*leading, *shape)."""
        leading = rows.shape[:-2]
        if self.dim is None:
            return rows.reshape((*leading, *self.shape))
        rest = self.shape[: self.dim] + self.shape[self.dim + 1 :]
        return rows.reshape((*leading, self.rows, *rest)).movedim(len(leading), len(leading) + self.dim)

    def index(self, row: int, column: int) -> tuple[int, ...]:
        """Where an element stands in the tensor."""
        flat = torch.zeros(self.rows, self.width, dtype=torch.bool)
        flat[row, column] = True
        return tuple(self.join(flat).nonzero()[0].tolist())


@dataclass(frozen=True)
class Block:
    """Tensors that are moved together: those with independent rows, or those that all rows share.

    Attributes:
        xs: the tensors, each as (rows, width).
        layouts: how each goes back into its shape.
        names: what each is called in messages.
        positions: the place of each among all tensors that are differentiated.
    """

    xs: tuple[Tensor, ...]
    layouts: tuple[Rows, ...]
    names: tuple[str, ...]
    positions: tuple[int, ...]

    @property
    def rows(self) -> int:
        """The number of independent rows."""
        return self.layouts[0].rows

    @property
    def width(self) -> int:
        """Elements of one row, over all tensors."""
        return sum(layout.width for layout in self.layouts)


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
    def points(self) -> dict[int, Tensor]:
        """Index in the block -> (count, evaluated offsets, rows, width), for the tensors that move."""

    @abstractmethod
    def realised(self, weights: Sequence[float]) -> Tensor:
        """(count, rows), float64: the steps as they came out of rounding, weighted like the outputs will be."""

    @abstractmethod
    def add(self, slopes: Tensor, gradients: Sequence[Tensor]) -> None:
        """Add dual x slope of every move to the (rows, width) gradients of the block, slopes being (count, rows)."""

    @abstractmethod
    def mirrored(self, chosen: Sequence[int]) -> Moves:
        """Some of the moves again, to the other side of x."""

    @abstractmethod
    def describe(self, move: int, offset: int) -> str:
        """Which evaluation this is, for a message."""


@dataclass(frozen=True)
class CoordinateMoves(Moves):
    """Columns of one tensor of the block, each moved in every row by a step of its own."""

    block: Block
    stencil: Stencil
    member: int
    columns: Tensor
    steps: Tensor
    """(count, rows), signed."""

    @property
    def count(self) -> int:
        """Number of moves."""
        return len(self.columns)

    def _moved(self) -> tuple[Tensor, Tensor]:
        start = self.block.xs[self.member][:, self.columns].T
        offsets = torch.tensor(self.stencil.evaluated, dtype=start.dtype, device=start.device)
        return start, start.unsqueeze(1) + offsets.view(1, -1, 1) * self.steps.unsqueeze(1)

    def points(self) -> dict[int, Tensor]:
        """See `Moves.points`."""
        x, moved = self.block.xs[self.member], self._moved()[1]
        points = x.expand(*moved.shape[:2], *x.shape).clone(memory_format=torch.contiguous_format)
        columns = self.columns.view(-1, 1, 1, 1).expand(*moved.shape, 1)
        return {self.member: points.scatter_(3, columns, moved.unsqueeze(-1))}

    def realised(self, weights: Sequence[float]) -> Tensor:
        """See `Moves.realised`."""
        start, moved = self._moved()
        return _weighted(_wide(moved) - _wide(start).unsqueeze(1), weights)

    def add(self, slopes: Tensor, gradients: Sequence[Tensor]) -> None:
        """See `Moves.add`."""
        gradients[self.member][:, self.columns] = slopes.T

    def mirrored(self, chosen: Sequence[int]) -> CoordinateMoves:
        """See `Moves.mirrored`."""
        some = torch.tensor(chosen, device=self.columns.device)
        return CoordinateMoves(self.block, self.stencil.mirrored(), self.member, self.columns[some], self.steps[some])

    def describe(self, move: int, offset: int) -> str:
        """See `Moves.describe`."""
        column, layout = int(self.columns[move]), self.block.layouts[self.member]
        index, h = layout.index(0, column), offset * float(self.steps[move, 0])
        rows = "" if layout.dim is None else f" (and its like in all {layout.rows} rows)"
        return f"{self.block.names[self.member]}: element {index}{rows} moved by {h:+.3g}"


@dataclass(frozen=True)
class RandomMoves(Moves):
    """Directions that move every element of the block."""

    block: Block
    stencil: Stencil
    displacements: tuple[Tensor, ...]
    """(count, rows, width) for each tensor: the direction times the step."""
    share: float
    """What each direction counts for, over the squared step: 1 / (n h^2)."""

    @property
    def count(self) -> int:
        """Number of moves."""
        return len(self.displacements[0])

    def points(self) -> dict[int, Tensor]:
        """See `Moves.points`."""
        points = {}
        for k, (x, displacement) in enumerate(zip(self.block.xs, self.displacements, strict=True)):
            offsets = torch.tensor(self.stencil.evaluated, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
            points[k] = x + offsets * displacement.unsqueeze(1)
        return points

    def realised(self, weights: Sequence[float]) -> Tensor:
        """See `Moves.realised`: the component along the direction, relative to its length."""
        along, length = torch.zeros(()), torch.zeros(())
        for k, points in self.points().items():
            wanted = _wide(self.displacements[k])
            moved = _wide(points) - _wide(self.block.xs[k])
            along = along.to(wanted) + (_weighted(moved, weights) * wanted).sum(-1)
            length = length.to(wanted) + wanted.square().sum(-1)
        return along / length

    def add(self, slopes: Tensor, gradients: Sequence[Tensor]) -> None:
        """See `Moves.add`."""
        for gradient, displacement in zip(gradients, self.displacements, strict=True):
            gradient.add_(torch.einsum("nr,nrd->rd", slopes * self.share, _wide(displacement)))

    def mirrored(self, chosen: Sequence[int]) -> RandomMoves:
        """See `Moves.mirrored`."""
        some = tuple(displacement[list(chosen)] for displacement in self.displacements)
        return RandomMoves(self.block, self.stencil.mirrored(), some, self.share)

    def describe(self, move: int, offset: int) -> str:
        """See `Moves.describe`."""
        largest = max(float(displacement[move].abs().max()) for displacement in self.displacements)
        names = ", ".join(self.block.names)
        return f"{names}: all elements moved along a random direction, by {abs(offset) * largest:.3g} at most"


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
            points: how many evaluations may lie in memory at a time.
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
        for member, (x, position) in enumerate(zip(block.xs, block.positions, strict=True)):
            layout = block.layouts[member]
            # bounds are given in the tensor's own shape
            steps = step_size.each(layout.join(x), stencil, eps, position)
            sizes = layout.split(steps.sizes)
            for formula, columns in _by_formula(stencil, steps.one_sided, layout, x.device):
                if formula is not stencil and steps.one_sided is not None:
                    # rows with room on both sides have it for the shorter reach of the two-sided formula
                    forced = layout.split(steps.one_sided)
                    sizes = torch.where(forced, sizes, sizes * (stencil.reach / formula.reach))
                portion = max(1, points // len(formula.evaluated))
                for some in columns.split(portion) if len(columns) else ():
                    yield CoordinateMoves(block, formula, member, some, sizes[:, some].T)


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
            raise ValueError(f"n must be a whole number of directions, at least 1, got {self.n!r}")

    @abstractmethod
    def _directions(self, rows: int, width: int, generator: torch.Generator) -> Tensor:
        """(n, rows, width), float32 or float64 on the CPU, with the identity as mean of direction x direction."""

    def moves(
        self, block: Block, stencil: Stencil, step_size: StepSize, eps: float, points: int, draw: int
    ) -> Iterator[Moves]:
        """See `Directions.moves`."""
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + draw) % 2**63)
        directions = self._directions(block.rows, block.width, generator)
        natural = [layout.join(x) for layout, x in zip(block.layouts, block.xs, strict=True)]
        h = step_size.along(natural, stencil, eps, float(directions.abs().max()))
        widths = [layout.width for layout in block.layouts]
        portion = max(1, points // len(stencil.evaluated))
        for some in directions.split(portion):
            parts = zip(some.split(widths, dim=-1), block.xs, strict=True)
            displacements = tuple((part * h).to(x) for part, x in parts)
            yield RandomMoves(block, stencil, displacements, 1 / (len(directions) * h * h))


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
        q, r = torch.linalg.qr(normal)
        # signs that make the frame uniformly distributed (Mezzadri 2007, section 4)
        q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)
        directions: Tensor = q.permute(2, 0, 1) * math.sqrt(width)
        return directions


def _by_formula(
    stencil: Stencil, one_sided: Tensor | None, layout: Rows, device: torch.device
) -> list[tuple[Stencil, Tensor]]:
    """Columns under the stencil, and those that a bound forces, in some row, to one side."""
    if one_sided is None:
        return [(stencil, torch.arange(layout.width, device=device))]
    forced = layout.split(one_sided).any(0)
    return [(stencil, (~forced).nonzero()[:, 0]), (stencil.one_sided(), forced.nonzero()[:, 0])]


def _weighted(moved: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum over the second axis, (count, offsets, ...) -> (count, ...)."""
    total = moved[:, 0] * weights[0]
    for j, weight in enumerate(weights[1:], 1):
        total = total + moved[:, j] * weight
    return total


def _wide(tensor: Tensor) -> Tensor:
    """In double precision, where the device has it: differences keep the digits that the evaluations had."""
    return tensor if tensor.device.type == "mps" else tensor.double()
