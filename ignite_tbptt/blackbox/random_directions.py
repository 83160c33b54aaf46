"""Random directions: every element is moved at once, and the expectation of dual x direction is the identity.

The cost is the number of directions, whatever the size of x; where rows are independent each has directions of its own.
They are never kept, but drawn again from their seeds. Pairs with any stencil and any step size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ignite_tbptt.arguments import require_seed
from ignite_tbptt.blackbox.block import Block
from ignite_tbptt.blackbox.moves import Moves, wide_type
from ignite_tbptt.blackbox.stencil import Stencil
from ignite_tbptt.blackbox.step_size import AbsoluteStep, RelativeStep, StepSize, steps_around

__all__ = [
    "Gaussian",
    "Orthogonal",
    "Rademacher",
    "RandomDirections",
    "RandomMoves",
    "generator_of",
    "portions",
    "require_directions",
    "sizes_of",
]

# Moves are made, and compared with what they came out as, so many bytes at a time.
_POINTS_BYTES = 2**20


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

    def _share(self, number: int, slopes: Tensor) -> Tensor:
        """How much of a direction goes into the gradient, (rows,)."""
        return slopes / self.total

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
            share = moved.mul_(wanted).sum(-1, dtype=wide_type(moved))
            found.append(share / torch.mul(wanted, wanted, out=moved).sum(-1, dtype=wide_type(moved)))
        return torch.stack(found)

    def added(self, slopes: Tensor, before: Any) -> tuple[Tensor, Tensor]:
        """See `Moves.added`: the sum so far, since small tensors kept between large ones would break up the memory."""
        total = None if before is None else before[0]
        for number, slope in zip(self.numbers, slopes.unbind(0), strict=True):
            share = self._share(number, slope).to(_sum_type(self.sizes)).unsqueeze(-1)
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
        return replace(self, stencil=self.stencil.mirrored(), numbers=range(numbers[0], numbers[0] + len(numbers)))

    def describe(self, move: int, offset: int) -> str:
        """See `Moves.describe`."""
        names = ", ".join(self.block.names[member] for member in self.block.members)
        largest = abs(offset) * float(self._displacement(move).abs().max())
        return f"{names}: all elements moved along a random direction, by {largest:.3g} at most"


@dataclass(frozen=True)
class RandomDirections(ABC):
    """What random directions have in common: their number, their seed and one step for all elements.

    Args:
        n: number of directions.
        seed: directions are drawn from a stream of their own, by this seed and the number of gradients before.

    Raises:
        TypeError: seed is no int.
        ValueError: n below 1.
    """

    n: int
    seed: int = 0

    def __post_init__(self) -> None:
        require_directions("n", self.n)
        require_seed(self.seed)

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
        sizes = sizes_of(block, step_size, stencil, eps, total, drawn)
        for numbers in portions(block, stencil, points, total):
            yield RandomMoves(block, stencil, drawn, numbers, sizes, total)


def require_directions(name: str, n: int) -> None:
    """Refuse what is no number of directions."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(
            f"{name} must be a whole number of directions, at least 1, got {n!r}: without any there is no gradient; "
            f"give {name}=1 for the cheapest, or Coordinates() for an exact one"
        )


def portions(block: Block, stencil: Stencil, points: int, total: int) -> Iterator[range]:
    """The numbers of directions, so many at a time as `points` evaluations allow, and memory."""
    # unlike those of coordinates, moves are as large as the points themselves
    points = min(points, _POINTS_BYTES // block.x.nbytes)
    some = max(1, points // len(stencil.evaluated))
    for start in range(0, total, some):
        yield range(start, min(start + some, total))


def sizes_of(
    block: Block, step_size: StepSize, stencil: Stencil, eps: float, total: int, drawn: Callable[[int], Tensor]
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


def generator_of(seed: int, number: int) -> torch.Generator:
    """The stream that a direction is drawn from."""
    return torch.Generator().manual_seed((seed + number * 0xD1B54A32D192ED03) % 2**63)


@dataclass(frozen=True)
class Rademacher(RandomDirections):
    """n directions of random signs: SPSA (Spall 1992), relative variance (D - 1) / n."""

    def _drawn(self, rows: int, width: int, dtype: torch.dtype, seed: int) -> tuple[int, Callable[[int], Tensor]]:
        def direction(number: int) -> Tensor:
            signs = torch.empty(rows, width, dtype=dtype).random_(0, 2, generator=generator_of(seed, number))
            return signs.mul_(2).sub_(1)

        return self.n, direction


@dataclass(frozen=True)
class Gaussian(RandomDirections):
    """n directions of normal numbers: Gaussian smoothing (Nesterov and Spokoiny 2017), variance (D + 1) / n."""

    def _drawn(self, rows: int, width: int, dtype: torch.dtype, seed: int) -> tuple[int, Callable[[int], Tensor]]:
        def direction(number: int) -> Tensor:
            return torch.randn(rows, width, generator=generator_of(seed, number), dtype=dtype)

        return self.n, direction


@dataclass(frozen=True)
class Orthogonal(RandomDirections):
    """n random directions at right angles (Choromanski et al. 2018): relative variance D / n - 1.

    Exact up to the error of the stencil once n reaches the number of elements D; more are not drawn.
    """

    def _drawn(self, rows: int, width: int, dtype: torch.dtype, seed: int) -> tuple[int, Callable[[int], Tensor]]:
        n = min(self.n, width)
        normal = torch.randn(rows, width, n, generator=generator_of(seed, 0), dtype=torch.float64)
        # which of q and -q comes out is not random, but direction x dual is the same for both
        q = torch.linalg.qr(normal)[0]
        directions = q.permute(2, 0, 1) * math.sqrt(width)
        return n, lambda number: directions[number].clone()


def _sum_type(tensor: Tensor) -> torch.dtype:
    """A sum over directions needs digits of its own in half precision alone, which would not hold its parts."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
