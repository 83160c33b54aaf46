"""Coordinates: every element in turn, every column of independent rows, or every colour of a sparse pattern.

The sum over these directions of dual x direction is the identity, so that the gradient is exact up to the error of the
stencil. Pairs with `coloring`, which tells which columns may be moved at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ignite_tbptt.blackbox.block import Block
from ignite_tbptt.blackbox.coloring import Coloring, coloring_of, pattern_of
from ignite_tbptt.blackbox.moves import Moves, weighted, wide
from ignite_tbptt.blackbox.stencil import Stencil
from ignite_tbptt.blackbox.step_size import StepSize

__all__ = ["ColoredMoves", "CoordinateMoves", "Coordinates"]


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
        return weighted(wide(self._moved), self._start, weights)

    def added(self, slopes: Tensor, before: Any) -> list[tuple[CoordinateMoves, Tensor]]:
        """See `Moves.added`."""
        return [*(before or ()), (self, slopes)]

    @staticmethod
    def gradient(total: list[tuple[CoordinateMoves, Tensor]]) -> Tensor:
        """See `Moves.gradient`."""
        parts = total
        first, slopes = parts[0]
        if len(parts) == 1 and isinstance(first.columns, range):
            return slopes.T
        together = torch.cat([slopes.T for _, slopes in parts], 1)
        if all(isinstance(moves.columns, range) for moves, _ in parts):
            return together
        order = torch.cat([torch.as_tensor(moves.columns, device=together.device) for moves, _ in parts])
        return together.index_select(1, order.argsort())

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
class ColoredMoves(Moves):
    """Colours: columns of a block of one row that no output shares, moved at once."""

    block: Block
    stencil: Stencil
    coloring: Coloring
    numbers: Tensor
    """The colours."""
    steps: Tensor
    """Of every column, (width,), signed."""

    @property
    def count(self) -> int:
        """Number of moves."""
        return len(self.numbers)

    def _displacements(self, start: int, stop: int) -> Tensor:
        colors = self.coloring.colors.to(self.steps.device)
        return self.steps * (colors == self.numbers[start:stop, None].to(colors.device))

    def points(self, start: int, stop: int) -> Tensor:
        """See `Moves.points`."""
        moved = self._displacements(start, stop)
        return torch.stack([self.block.x + offset * moved for offset in self.stencil.evaluated], 1).unsqueeze(2)

    def realised(self, weights: Sequence[float]) -> Tensor:
        """See `Moves.realised`: 1, since columns of a colour have steps of their own, by which `contracted` divides."""
        return torch.ones(self.count, 1, dtype=torch.float64, device=self.steps.device)

    def contracted(
        self, slopes: Sequence[Tensor], cotangents: Sequence[Tensor], dims: Sequence[int] | None, broken: bool
    ) -> Tensor:
        """See `Moves.contracted`: (count, width), where each output counts for the column that it depends on."""
        outputs = self.coloring.owners.shape[1]
        if len(slopes) != 1 or slopes[0][0].numel() != outputs:
            sizes = ", ".join(str(slope[0].numel()) for slope in slopes)
            remedy = "return one tensor, with a number for each row of the pattern"
            if len(self.block.members) > 1:
                remedy += (
                    f", whose columns are the elements of all {len(self.block.members)} differentiated inputs, one "
                    "after the other; where an output depends on the same element of each, give in_dims=0 instead"
                )
            raise ValueError(
                f"sparsity is of {outputs} outputs, but the function gives {len(slopes)} tensors of {sizes} numbers: "
                f"{remedy}"
            )
        product = (slopes[0] * cotangents[0]).flatten(1)
        if broken:
            product = torch.where((cotangents[0].flatten() == 0) & product.isnan(), 0.0, product)
        width = self.block.x.shape[1]
        owners = self.coloring.owners.to(product.device)[self.numbers.to(product.device)]
        return product.new_zeros(self.count, width + 1).scatter_add_(1, owners, product)[:, :width]

    def added(self, slopes: Tensor, before: Any) -> tuple[ColoredMoves, Tensor]:
        """See `Moves.added`."""
        share = slopes.sum(0)
        return self, share if before is None else before[1] + share

    @staticmethod
    def gradient(total: tuple[ColoredMoves, Tensor]) -> Tensor:
        """See `Moves.gradient`."""
        moves, shares = total
        weights = moves.stencil.evaluated_weights
        moved = torch.stack([moves.block.x[0] + offset * moves.steps for offset in moves.stencil.evaluated])
        steps = weighted(wide(moved.unsqueeze(0)), moves.block.x[0], weights)[0]
        # an element that is NaN or infinite cannot move, and need not where nothing that counts depends on it
        return torch.where(shares == 0, 0.0, shares / steps).unsqueeze(0)

    def mirrored(self, chosen: Sequence[int]) -> ColoredMoves:
        """See `Moves.mirrored`."""
        some = self.numbers[torch.tensor(chosen)]
        return ColoredMoves(self.block, self.stencil.mirrored(), self.coloring, some, self.steps)

    def describe(self, move: int, offset: int) -> str:
        """See `Moves.describe`."""
        column = int((self.coloring.colors == self.numbers[move]).nonzero()[0])
        name, index, _ = self.block.spelled(column)
        return (
            f"{name}: element {index} and the others of its colour moved by {offset * float(self.steps[column]):+.3g}"
        )


@dataclass(frozen=True)
class Coordinates:
    """Every element in turn, or every column of independent rows: exact up to the error of the stencil.

    Costs as many directions as a row has elements, for each tensor that requires grad; with a `sparsity` as many as the
    pattern has colours, 3 for a tridiagonal one of any size.

    Example:
        >>> import torch
        >>> from ignite_tbptt.blackbox import CentralDifference, banded, blackbox
        >>> @blackbox(estimator=CentralDifference(sparsity=banded(1, 0)))
        ... def advance(x):  # each cell and the one before it
        ...     return (x + 0.1 * torch.diff(x, prepend=x[:1])).detach()
        >>> x = torch.ones(1000, requires_grad=True)
        >>> advance(x).sum().backward()
        >>> advance.nfev
        4

    Args:
        sparsity: which outputs depend on which inputs: a bool tensor or array (outputs, inputs), a matrix of
            scipy.sparse, `banded(k)` or "elementwise"; see `detect_sparsity`. For functions that return one tensor; it
            is verified at the first gradient and at gradients 2, 4, 8, ..., unless the function is said to be noisy
            (``repeatable=False``).

    Raises:
        TypeError: sparsity is no pattern; when gradients are taken, a ValueError where its size is another.
    """

    sparsity: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", pattern_of(self.sparsity))

    def moves(
        self, block: Block, stencil: Stencil, step_size: StepSize, eps: float, points: int, draw: int
    ) -> Iterator[Moves]:
        """See `Directions.moves`."""
        sizes, one_sided = block.steps(step_size, stencil, eps)
        if self.sparsity is not None:
            yield from self._colored(block, stencil, sizes, one_sided, points)
            return
        for formula, columns in _by_formula(stencil, one_sided, block.x):
            steps = sizes
            if one_sided is not None and formula is not stencil:
                # rows with room on both sides have it for the shorter reach of the two-sided formula
                steps = torch.where(one_sided, sizes, sizes * (stencil.reach / formula.reach))
            portion = max(1, points // len(formula.evaluated))
            for start in range(0, len(columns), portion):
                some = columns[start : start + portion]
                yield CoordinateMoves(block, formula, some, _columns(steps, some).T)

    def _colored(
        self, block: Block, stencil: Stencil, sizes: Tensor, one_sided: Tensor | None, points: int
    ) -> Iterator[Moves]:
        if block.x.shape[0] > 1:
            raise ValueError("sparsity and in_dims cannot be said of one blackbox: leave in_dims out")
        coloring = coloring_of(self.sparsity, block.x.shape[1])
        formula, steps = stencil, sizes[0]
        if one_sided is not None:  # then all are, since those of a colour share a formula
            formula = stencil.one_sided()
            steps = torch.where(one_sided[0], steps, steps * (stencil.reach / formula.reach))
        portion = max(1, points // len(formula.evaluated))
        for start in range(0, coloring.count, portion):
            numbers = torch.arange(start, min(start + portion, coloring.count))
            yield ColoredMoves(block, formula, coloring, numbers, steps)


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
