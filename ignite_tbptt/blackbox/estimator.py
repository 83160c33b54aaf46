"""An estimator of gradients: a stencil, directions and a step size, put together.

The idea, for an output cotangent v, with no Jacobian ever formed::

    g = sum_d  < v , sum_j w_j f(x + c_j h_d d) > / h_d  *  d_dual

`Estimator.plan` says where f is to be evaluated, `quotients` turns what came out into slopes of every output, and
`contract` turns these into slopes of <v, f>; f itself is never called here. Any stencil pairs with any directions and
any step size; the named estimators only fill the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ignite_tbptt.blackbox.block import Block
from ignite_tbptt.blackbox.coloring import Sparsity
from ignite_tbptt.blackbox.coordinates import Coordinates
from ignite_tbptt.blackbox.moves import Directions, Moves, all_finite, weighted, wide
from ignite_tbptt.blackbox.random_directions import Gaussian, Rademacher
from ignite_tbptt.blackbox.stencil import Stencil, central, forward
from ignite_tbptt.blackbox.step_size import AbsoluteStep, RelativeStep, StepSize, require_positive, require_step_size

__all__ = [
    "SPSA",
    "CentralDifference",
    "Estimator",
    "ForwardDifference",
    "GaussianSmoothing",
    "quotients",
]


@dataclass(frozen=True)
class Estimator:
    """How a gradient is estimated from values.

    Example:
        >>> from ignite_tbptt.blackbox.random_directions import Orthogonal
        >>> from ignite_tbptt.blackbox.stencil import central
        >>> Estimator(central(order=4), Orthogonal(8)).stencil.offsets
        (-2, -1, 1, 2)

    Args:
        stencil: the difference formula.
        directions: which way x is moved.
        step_size: how far.

    Raises:
        TypeError: one of these is something else.
    """

    stencil: Stencil = field(default_factory=central)
    directions: Directions = field(default_factory=Coordinates)
    step_size: StepSize = field(default_factory=RelativeStep)

    def __post_init__(self) -> None:
        if not isinstance(self.stencil, Stencil):
            raise TypeError(f"stencil must be a Stencil, got {self.stencil!r}: take one, central() or forward() say")
        if isinstance(self.directions, type) or not hasattr(self.directions, "moves"):
            raise TypeError(
                f"directions must be Directions, got {self.directions!r}: make them, Coordinates() or Orthogonal(8) say"
            )
        require_step_size("step_size", self.step_size)

    def plan(self, block: Block, eps: float, points: int, draw: int) -> Iterator[Moves]:
        """Yield all moves of a block, in portions of about `points` evaluations; see `Directions.moves`."""
        return self.directions.moves(block, self.stencil, self.step_size, eps, points, draw)

    def suited(self, label: str, columns: Callable[[], int], told: set[Any]) -> Estimator:
        """The estimator to be used for some inputs: itself, unless it is one that chooses.

        Args:
            label: what the function is called.
            columns: gives how many columns, or elements, are to be moved.
            told: what was logged already.
        """
        return self


def ForwardDifference(  # noqa: N802 - reads as a kind of estimator
    step_size: StepSize | None = None, *, sparsity: Sparsity = None
) -> Estimator:
    """One evaluation for each element, or column of independent rows; error O(h).

    Args:
        step_size: how far; relative to x and to the precision by default.
        sparsity: which outputs depend on which inputs, as in `Coordinates`: one evaluation for each colour.
    """
    return Estimator(forward(), Coordinates(sparsity), RelativeStep() if step_size is None else step_size)


def CentralDifference(  # noqa: N802
    order: int = 2, step_size: StepSize | None = None, *, sparsity: Sparsity = None
) -> Estimator:
    """Two evaluations for each element with error O(h^2), or four with error O(h^4).

    Args:
        order: 2 or 4.
        step_size: how far; relative to x and to the precision by default.
        sparsity: which outputs depend on which inputs, as in `Coordinates`: the evaluations are those of one element,
            for each colour.

    Raises:
        ValueError: another order.
    """
    return Estimator(central(order), Coordinates(sparsity), RelativeStep() if step_size is None else step_size)


def SPSA(n: int = 1, step_size: StepSize | None = None, seed: int = 0) -> Estimator:  # noqa: N802
    """Simultaneous perturbation: 2 n evaluations, whatever the size of x; unbiased up to O(h^2).

    Averages n estimates along directions of random signs (Spall 1992, Multivariate stochastic approximation using a
    simultaneous perturbation gradient approximation, eq. 2.2); E||g' - g||^2 / ||g||^2 = (D - 1) / n.

    Args:
        n: number of directions, new ones for each gradient.
        step_size: how far; relative to the largest x by default.
        seed: of the directions.

    Raises:
        ValueError: n below 1.
    """
    return Estimator(central(), Rademacher(n, seed), RelativeStep() if step_size is None else step_size)


def GaussianSmoothing(n: int, sigma: float, seed: int = 0) -> Estimator:  # noqa: N802
    """Gradient of f smoothed by a normal density of width sigma: for functions with jumps. 2 n evaluations.

    Antithetic pairs (Nesterov and Spokoiny 2017, Random gradient-free minimization of convex functions, eq. 26, in its
    two-sided form); for linear f, E||g' - g||^2 / ||g||^2 = (D + 1) / n.

    Args:
        n: number of directions, new ones for each gradient.
        sigma: width of the smoothing, in the units of x.
        seed: of the directions.

    Raises:
        ValueError: n below 1, or a sigma that is not positive and finite.
    """
    require_positive("sigma", sigma, "choose the width over which jumps are to be smoothed; SPSA(n) needs none")
    return Estimator(central(), Gaussian(n, seed), AbsoluteStep(sigma))


def quotients(
    moves: Moves, values: Sequence[Tensor], first: Sequence[Tensor], dims: Sequence[int] | None
) -> list[Tensor]:
    """The slope of every output along each move.

    Where an output is NaN or infinite at some of the points, its slope is taken by the best formula on the points that
    are left and x itself.

    Args:
        moves: which points the values belong to.
        values: each output tensor at all points, (count * offsets, *shape).
        first: each output at x.
        dims: the axis of the rows in each output, None where the block has one row only.

    Returns:
        Tensors (count, *shape), in double precision, NaN where no slope could be taken.
    """
    stencil = moves.stencil
    offsets = len(stencil.evaluated)
    weights = stencil.evaluated_weights
    realised = moves.realised(weights)
    found = []
    for k, (value, y) in enumerate(zip(values, first, strict=True)):
        dim = None if dims is None else dims[k]
        # in double precision from here on: what is subtracted from these or multiplied with them is promoted
        points = wide(value).view((moves.count, offsets, *value.shape[1:]))
        slope = weighted(points, y, weights).div_(_along(realised, dim, y.dim()))
        if not all_finite(slope):
            slope = _where_finite(moves, points, y, dim, slope)
        found.append(slope)
    return found


def _where_finite(moves: Moves, points: Tensor, y: Tensor, dim: int | None, slope: Tensor) -> Tensor:
    """Take slopes that are missing by the best formula on the points that are finite."""
    stencil = moves.stencil
    broken = ~torch.isfinite(slope)
    slope = torch.where(broken, torch.nan, slope)
    finite = torch.isfinite(points)
    cleaned = torch.where(finite, points, 0.0)
    for pattern in torch.unique(finite.movedim(1, -1)[broken], dim=0):
        left = stencil.among(offset for offset, ok in zip(stencil.evaluated, pattern.tolist(), strict=True) if ok)
        if left is None:
            continue
        shape = (1, len(stencil.evaluated), *[1] * (points.dim() - 2))
        here = broken & (finite == pattern.view(shape)).all(1)
        weights = left.weights_at(stencil.evaluated)
        other = weighted(cleaned, y, weights).div_(_along(moves.realised(weights), dim, y.dim()))
        slope = torch.where(here & torch.isfinite(y), other, slope)
    return slope


def _along(realised: Tensor, dim: int | None, axes: int) -> Tensor:
    """(count, rows) in the shape of outputs that have their rows at an axis, (count, 1, .., rows, .., 1)."""
    shape = [len(realised), *[1] * axes]
    if dim is not None:
        shape[dim + 1] = realised.shape[1]
    return realised.view(shape)
