"""Which directions x is moved in, and the dual of each, which turns a slope along it back into a gradient.

The idea: every tensor is seen as rows x width (`block`). Where rows are independent, one evaluation moves all rows at
once and each row's share of the output tells its own slope: batch-parallel coordinates, and random directions of its
own for every row. Where they are not, there is one row, and the same code gives plain coordinates. For coordinates the
sum over directions of dual x direction is the identity; for random directions its expectation is. Pairs with any
stencil and any step size.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ignite_tbptt.blackbox.block import Block
from ignite_tbptt.blackbox.coloring import Coloring, coloring_of
from ignite_tbptt.blackbox.stencil import Stencil
from ignite_tbptt.blackbox.step_size import AbsoluteStep, RelativeStep, StepSize, steps_around

__all__ = [
    "ColoredMoves",
    "CoordinateMoves",
    "Coordinates",
    "Directions",
    "Gaussian",
    "Moves",
    "Orthogonal",
    "Rademacher",
    "RandomMoves",
    "all_finite",
    "contract",
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
            raise ValueError(
                f"sparsity is of {outputs} outputs, but the function gives {len(slopes)} tensors of {sizes} numbers: "
                "return one tensor, with a number for each row of the pattern"
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
        return (shares / weighted(_wide(moved.unsqueeze(0)), moves.block.x[0], weights)[0]).unsqueeze(0)

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
class RandomMoves(Moves):
    """Directions that move every element of the block; drawn again, from their seeds, whenever they are needed."""

    block: Block
    stencil: Stencil
    drawn: Callable[[int], Tensor]
    """A direction by its number, (rows, width)."""
    numbers: range
    sizes: Tensor
    """The step of every element, (rows, width)."""
    total: int
    """How many directions there are in all."""

    @property
    def count(self) -> int:
        """Number of moves."""
        return len(self.numbers)

    def _displacement(self, move: int) -> Tensor:
        return self.drawn(self.numbers[move]).to(self.sizes).mul_(self.sizes)

    def points(self, start: int, stop: int) -> Tensor:
        """See `Moves.points`."""
        x, offsets = self.block.x, self.stencil.evaluated
        points = x.new_empty((stop - start, len(offsets), *x.shape))
        for move in range(start, stop):
            displacement = self._displacement(move)
            for j, offset in enumerate(offsets):
                torch.add(x, displacement, alpha=offset, out=points[move - start, j])
        return points

    def point(self, move: int, index: int) -> Tensor:
        """See `Moves.point`."""
        return self._displacement(move).mul_(self.stencil.evaluated[index]).add_(self.block.x)

    def realised(self, weights: Sequence[float]) -> Tensor:
        """See `Moves.realised`: the component along the direction, in units of each element's step."""
        found = []
        for move in range(self.count):
            # Arrays of one size, one after the other: with several sizes the memory of millions of elements goes to
            # pieces.
            moved = torch.zeros_like(self.block.x)
            for index, weight in enumerate(weights):
                moved.add_(self.point(move, index).sub_(self.block.x), alpha=weight)
            moved.div_(self.sizes)
            wanted = self.drawn(self.numbers[move]).to(moved)
            share = moved.mul_(wanted).sum(-1, dtype=_wide_type(moved))
            found.append(share / torch.mul(wanted, wanted, out=moved).sum(-1, dtype=_wide_type(moved)))
        return torch.stack(found)

    def added(self, slopes: Tensor, before: Any) -> tuple[Tensor, Tensor]:
        """See `Moves.added`: the sum so far, since small tensors kept between large ones would break up the memory."""
        total = None if before is None else before[0]
        for number, slope in zip(self.numbers, slopes.unbind(0), strict=True):
            share = (slope / self.total).to(_sum_type(self.sizes)).unsqueeze(-1)
            more = self.drawn(number).to(share).mul_(share)
            total = more if total is None else total.add_(more)
        assert total is not None
        return total, self.sizes

    @staticmethod
    def gradient(total: tuple[Tensor, Tensor]) -> Tensor:
        """See `Moves.gradient`."""
        return total[0].div_(total[1])

    def mirrored(self, chosen: Sequence[int]) -> RandomMoves:
        """See `Moves.mirrored`."""
        numbers = [self.numbers[move] for move in chosen]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "moves are mirrored one by one"
        whole = range(numbers[0], numbers[0] + len(numbers))
        return RandomMoves(self.block, self.stencil.mirrored(), self.drawn, whole, self.sizes, self.total)

    def describe(self, move: int, offset: int) -> str:
        """See `Moves.describe`."""
        names = ", ".join(self.block.names[member] for member in self.block.members)
        largest = abs(offset) * float(self._displacement(move).abs().max())
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
            draw: seeds what is random: another number for every blackbox, call, gradient and rank.
        """
        ...


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
        sparsity: which outputs depend on which inputs: a bool tensor (outputs, inputs), a matrix of scipy.sparse,
            `banded(k)` or "elementwise"; see `detect_sparsity`. For functions that return one tensor; it is verified at
            the first gradient and at gradients 2, 4, 8, ...
    """

    sparsity: Any = None

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
    def _drawn(self, rows: int, width: int, dtype: torch.dtype, seed: int) -> tuple[int, Callable[[int], Tensor]]:
        """How many directions there are, and a function that gives one, (rows, width), by its number.

        The mean of direction x direction is the identity.
        """

    def moves(
        self, block: Block, stencil: Stencil, step_size: StepSize, eps: float, points: int, draw: int
    ) -> Iterator[Moves]:
        """See `Directions.moves`."""
        rows, width = block.x.shape
        total, drawn = self._drawn(rows, width, block.x.dtype, (self.seed * 0x9E3779B97F4A7C15 + draw) % 2**63)
        sizes = self._sizes(block, stencil, step_size, eps, total, drawn)
        # unlike those of coordinates, moves are as large as the points themselves
        points = min(points, _POINTS_BYTES // block.x.nbytes)
        some = max(1, points // len(stencil.evaluated))
        for start in range(0, total, some):
            yield RandomMoves(block, stencil, drawn, range(start, min(start + some, total)), sizes, total)

    def _sizes(
        self,
        block: Block,
        stencil: Stencil,
        step_size: StepSize,
        eps: float,
        total: int,
        drawn: Callable[[int], Tensor],
    ) -> Tensor:
        """The step of every element; where there are bounds, short enough for the longest of all directions."""
        if isinstance(step_size, (AbsoluteStep, RelativeStep)):
            return block.steps(step_size, stencil, eps).sizes
        scale = max(float(drawn(number).abs().max()) for number in range(total))
        return block.together(
            [
                steps_around(step_size, x, stencil, eps, scale, position)
                for x, position in zip(block.apart(block.x), block.positions, strict=True)
            ]
        )


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed + number * 0xD1B54A32D192ED03) % 2**63)


@dataclass(frozen=True)
class Rademacher(_Random):
    """n directions of random signs: SPSA (Spall 1992), relative variance (D - 1) / n."""

    def _drawn(self, rows: int, width: int, dtype: torch.dtype, seed: int) -> tuple[int, Callable[[int], Tensor]]:
        def direction(number: int) -> Tensor:
            signs = torch.empty(rows, width, dtype=dtype).random_(0, 2, generator=_generator(seed, number))
            return signs.mul_(2).sub_(1)

        return self.n, direction


@dataclass(frozen=True)
class Gaussian(_Random):
    """n directions of normal numbers: Gaussian smoothing (Nesterov and Spokoiny 2017), variance (D + 1) / n."""

    def _drawn(self, rows: int, width: int, dtype: torch.dtype, seed: int) -> tuple[int, Callable[[int], Tensor]]:
        def direction(number: int) -> Tensor:
            return torch.randn(rows, width, generator=_generator(seed, number), dtype=dtype)

        return self.n, direction


@dataclass(frozen=True)
class Orthogonal(_Random):
    """n random directions at right angles (Choromanski et al. 2018): relative variance D / n - 1.

    Exact up to the error of the stencil once n reaches the number of elements D; more are not drawn.
    """

    def _drawn(self, rows: int, width: int, dtype: torch.dtype, seed: int) -> tuple[int, Callable[[int], Tensor]]:
        n = min(self.n, width)
        normal = torch.randn(rows, width, n, generator=_generator(seed, 0), dtype=torch.float64)
        # which of q and -q comes out is not random, but direction x dual is the same for both
        q = torch.linalg.qr(normal)[0]
        directions = q.permute(2, 0, 1) * math.sqrt(width)
        return n, lambda number: directions[number].clone()


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


def _wide_type(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


def _sum_type(tensor: Tensor) -> torch.dtype:
    """A sum over directions needs digits of its own in half precision alone, which would not hold its parts."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _wide(tensor: Tensor) -> Tensor:
    """In double precision, where the device has it: differences keep the digits that the evaluations had."""
    return tensor if tensor.device.type == "mps" else tensor.double()
