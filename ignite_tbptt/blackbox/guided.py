"""Directions that remember: the last gradients, and what a surrogate guesses, are looked along exactly.

A gradient turns little from one optimizer step to the next. So its last estimate is a better direction than a random
one: it is kept, and what random directions at right angles to it find is added (Meier et al. 2019, Improving
gradient estimation in evolutionary strategies with past descent directions, arXiv 1910.05268; guides from elsewhere:
Maheswaranathan et al. 2019, Guided evolutionary strategies, arXiv 1806.10230). The estimate is the projection of the
gradient onto all of them. Pairs with any stencil and any step size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ignite_tbptt.arguments import require_seed
from ignite_tbptt.blackbox.block import Block
from ignite_tbptt.blackbox.moves import Moves, all_finite
from ignite_tbptt.blackbox.random_directions import (
    RandomMoves,
    generator_of,
    portions,
    require_directions,
    sizes_of,
)
from ignite_tbptt.blackbox.stencil import Stencil
from ignite_tbptt.blackbox.step_size import StepSize

__all__ = ["GuidedDirections"]

# Directions move no element by more of its steps than this, as normal numbers hardly do.
_LONGEST = 4.0


@dataclass(frozen=True)
class GuidedMoves(RandomMoves):
    """Directions at right angles to one another, of which the first are guides."""

    lengths: Tensor
    """Of the directions, (total, rows)."""
    guides: int

    def _share(self, number: int, slopes: Tensor) -> Tensor:
        return slopes / self.lengths[number].to(slopes).square()

    def learn(self, gradient: Tensor) -> None:
        """See `Moves.learn`."""
        if self.block.memory is not None and all_finite(gradient) and bool(gradient.any()):
            self.block.memory[:] = [gradient.clone(), *self.block.memory][: self.guides]


@dataclass(frozen=True)
class GuidedDirections:
    """n directions: the last gradients, a surrogate's if there is one, and random ones at right angles to them.

    Example:
        >>> import torch
        >>> from ignite_tbptt.blackbox import Estimator, blackbox, central
        >>> f = blackbox(lambda x: (x**2).detach(), estimator=Estimator(central(), GuidedDirections(20)))
        >>> x = torch.linspace(-1, 1, 1000).requires_grad_()
        >>> cosines = []
        >>> for _ in range(50):
        ...     (found,) = torch.autograd.grad(f(x).sum(), x)
        ...     cosines.append(torch.cosine_similarity(found, x, dim=0).item())
        >>> cosines[0] < 0.3 and cosines[-1] > 0.7, f.nfev
        (True, 2000)

    The estimate is the projection of the gradient onto the span of the directions, each element in units of its step.
    In these units it is never longer than the gradient and never points uphill. It is exact once n reaches the number
    of elements, and too short before, at first by ``n / D``: an optimizer like Adam, which divides by the size, does
    not notice. Where the mean has to be right, take `Orthogonal`. With one guide, of cosine r to the gradient of D
    elements, ``cos^2 = r^2 + (1 - r^2) (n - 1) / (D - 1)``.

    What is remembered belongs to a blackbox and is in its state: ``state_dict()`` of a decorated function and of
    `FiniteDifferenceGradients`, that of the model for `Blackbox`. Where rows are independent each remembers its own;
    another number of rows begins anew. The directions of one gradient are held in double precision, n times the input,
    and a few times over while they are made.

    Args:
        n: number of directions, the guides among them.
        guides: how many of the last gradients are kept.
        surrogate: a guess of the gradient, from a cheaper model say: ``surrogate(x, position)`` gives a tensor like x,
            the differentiated input of that position. Its length and sign do not matter.
        seed: of the random directions.

    Raises:
        ValueError: n or guides below 1; n that the guides use up; when gradients are taken: a surrogate's guess of
            another shape.
        TypeError: surrogate is not callable, or seed no int.
    """

    n: int
    guides: int = 1
    surrogate: Callable[[Tensor, int], Tensor] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_directions("n", self.n)
        require_directions("guides", self.guides)
        require_seed(self.seed)
        if self.surrogate is not None and not callable(self.surrogate):
            raise TypeError(
                f"surrogate must be a function of an input and its position, got {self.surrogate!r}; give "
                "lambda x, position: guess, with a tensor like x"
            )
        if self.n <= self.guides + (self.surrogate is not None):
            raise ValueError(
                f"n={self.n} directions are used up by the guides, so that nothing new would be looked at; give n of "
                f"{self.guides + (self.surrogate is not None) + 1} or more, or fewer guides"
            )

    def moves(
        self, block: Block, stencil: Stencil, step_size: StepSize, eps: float, points: int, draw: int
    ) -> Iterator[Moves]:
        """See `Directions.moves`."""
        directions, lengths = self._drawn(block, block.steps(step_size, stencil, eps).sizes, draw)
        total = len(directions)

        def drawn(number: int) -> Tensor:
            return directions[number].clone()

        sizes = sizes_of(block, step_size, stencil, eps, total, drawn)
        for numbers in portions(block, stencil, points, total):
            yield GuidedMoves(block, stencil, drawn, numbers, sizes, total, lengths, self.guides)

    def _drawn(self, block: Block, sizes: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """The directions, (total, rows, width), and their lengths, (total, rows)."""
        rows, width = block.x.shape
        total = min(self.n, width)
        seed = (self.seed * 0x9E3779B97F4A7C15 + draw) % 2**63
        columns = torch.randn(rows, width, total, generator=generator_of(seed, 0), dtype=torch.float64)
        scale = sizes.abs().double().cpu()
        for k, guide in enumerate(self._guides(block)[:total]):
            along = guide.double().cpu() * scale
            known = along.isfinite().all(1, keepdim=True) & (along != 0).any(1, keepdim=True)
            columns[:, :, k] = torch.where(known, along / along.abs().amax(1, keepdim=True), columns[:, :, k])
        directions = torch.linalg.qr(columns)[0].permute(2, 0, 1)
        lengths = (_LONGEST / directions.abs().amax(2)).clamp(max=math.sqrt(width))
        return directions * lengths.unsqueeze(-1), lengths

    def _guides(self, block: Block) -> list[Tensor]:
        found = [guide for guide in block.memory or () if guide.shape == block.x.shape]
        if self.surrogate is None:
            return found
        guesses = []
        for x, position in zip(block.apart(block.x), block.positions, strict=True):
            guess = self.surrogate(x.clone(), position)
            if not isinstance(guess, Tensor) or guess.shape != x.shape:
                what = tuple(guess.shape) if isinstance(guess, Tensor) else type(guess).__name__
                raise ValueError(
                    f"surrogate gave {what} for the differentiated input {position} of shape {tuple(x.shape)}; it must "
                    "give a tensor like that input, a guess of its gradient"
                )
            guesses.append(guess.detach().to(x))
        return [block.together(guesses), *found]
