"""An estimator of gradients: a stencil, directions and a step size, put together.

The idea, for an output cotangent v, with no Jacobian ever formed::

    g = sum_d  < v , sum_j w_j f(x + c_j h_d d) > / h_d  *  d_dual

`Estimator.perturb` says where f is to be evaluated and `Estimator.contract` turns what came out into slopes; f itself
is never called here. Any stencil pairs with any directions and any step size; the named estimators only fill the slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ignite_tbptt.blackbox.blocks import Block
from ignite_tbptt.blackbox.directions import Coordinates, Directions, Gaussian, Moves, Rademacher, weighted
from ignite_tbptt.blackbox.stencil import Stencil, central, forward
from ignite_tbptt.blackbox.step_size import AbsoluteStep, RelativeStep, StepSize, require_positive

__all__ = [
    "SPSA",
    "CentralDifference",
    "Estimator",
    "ForwardDifference",
    "GaussianSmoothing",
    "all_finite",
    "contract",
]


@dataclass(frozen=True)
class Estimator:
    """How a gradient is estimated from values.

    Example:
        >>> from ignite_tbptt.blackbox.directions import Orthogonal
        >>> from ignite_tbptt.blackbox.stencil import central
        >>> Estimator(central(order=4), Orthogonal(8)).stencil.offsets
        (-2, -1, 1, 2)

    Args:
        stencil: the difference formula.
        directions: which way x is moved.
        step_size: how far.
    """

    stencil: Stencil = field(default_factory=central)
    directions: Directions = field(default_factory=Coordinates)
    step_size: StepSize = field(default_factory=RelativeStep)

    def perturb(self, block: Block, eps: float, points: int, draw: int) -> Iterator[Moves]:
        """Yield all moves of a block, in portions of about `points` evaluations; see `Directions.moves`."""
        return self.directions.moves(block, self.stencil, self.step_size, eps, points, draw)

    def contract(
        self,
        moves: Moves,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        first: Sequence[Tensor],
        out_dims: Sequence[int] | None,
    ) -> Tensor:
        """Slopes of <v, f> along each move; see `contract`."""
        return contract(moves, outputs, cotangents, first, out_dims)


def ForwardDifference(step_size: StepSize | None = None) -> Estimator:  # noqa: N802 - reads as a kind of estimator
    """One evaluation for each element, or column of independent rows; error O(h).

    Args:
        step_size: how far; relative to x and to the precision by default.
    """
    return Estimator(forward(), Coordinates(), step_size or RelativeStep())


def CentralDifference(order: int = 2, step_size: StepSize | None = None) -> Estimator:  # noqa: N802
    """Two evaluations for each element with error O(h^2), or four with error O(h^4).

    Args:
        order: 2 or 4.
        step_size: how far; relative to x and to the precision by default.

    Raises:
        ValueError: another order.
    """
    return Estimator(central(order), Coordinates(), step_size or RelativeStep())


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
    return Estimator(central(), Rademacher(n, seed), step_size or RelativeStep())


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


def contract(
    moves: Moves,
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    first: Sequence[Tensor],
    out_dims: Sequence[int] | None,
) -> Tensor:
    """Slopes of <v, f> along each move, each row of the output counting for the row that was moved.

    Where f is NaN or infinite at some of the points, the slope there is taken by the best formula on the points that
    are left and x itself.

    Args:
        moves: which points the outputs belong to.
        outputs: each output tensor at all points, (count * offsets, *shape).
        cotangents: v for each output.
        first: each output at x.
        out_dims: the axis of the rows in each output, None where the block has one row only.

    Returns:
        Tensor (count, rows), in double precision, NaN where no slope could be taken.
    """
    stencil = moves.stencil
    shape = (moves.count, len(stencil.evaluated))
    # in double precision from here on: what is subtracted from these or multiplied with them is promoted
    values = [_wide(output).view(shape + output.shape[1:]) for output in outputs]
    slopes = _slopes(moves, stencil, values, cotangents, first, out_dims)
    if all_finite(slopes):
        return slopes
    finite = _finite(moves, values, out_dims)
    cleaned = [torch.where(torch.isfinite(value), value, 0.0) for value in values]
    broken = ~torch.isfinite(slopes)
    slopes = torch.where(broken, torch.nan, slopes)
    for pattern in torch.unique(finite.movedim(1, -1)[broken], dim=0):
        left = stencil.among(offset for offset, ok in zip(stencil.evaluated, pattern.tolist(), strict=True) if ok)
        if left is None:
            continue
        here = broken & (finite == pattern.view(1, -1, 1)).all(1)
        slopes = torch.where(here, _slopes(moves, left, cleaned, cotangents, first, out_dims), slopes)
    return slopes


def _slopes(
    moves: Moves,
    stencil: Stencil,
    values: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    first: Sequence[Tensor],
    out_dims: Sequence[int] | None,
) -> Tensor:
    """Slopes by a stencil on some of the offsets at which the moves were evaluated."""
    own = stencil is moves.stencil
    weights = stencil.evaluated_weights if own else stencil.weights_at(moves.stencil.evaluated)
    total: Tensor | None = None
    for k, (value, cotangent) in enumerate(zip(values, cotangents, strict=True)):
        difference = weighted(value, first[k], weights)
        share = _by_row(difference.mul_(cotangent), 0 if out_dims is None else out_dims[k])
        if out_dims is None:
            share = share.sum(1, keepdim=True)
        total = share if total is None else total + share
    assert total is not None
    return total / moves.realised(weights)


def _by_row(values: Tensor, dim: int) -> Tensor:
    """(count, *shape) -> (count, rows), summed over all axes but the one of the rows.

    Where rows are shared this comes before the sum over them all: so that moving one row alone and moving all rows at
    once add the same numbers in the same order.
    """
    if values.dim() <= 2:
        return values.view(len(values), -1)
    moved = values.movedim(dim + 1, 1) if dim else values
    return moved.reshape(moved.shape[0], moved.shape[1], -1).sum(-1)


def _finite(moves: Moves, values: Sequence[Tensor], out_dims: Sequence[int] | None) -> Tensor:
    """(count, offsets, rows): whether all outputs of the row are finite there."""
    finite: Tensor | None = None
    for k, value in enumerate(values):
        flat = torch.isfinite(value).flatten(0, 1).logical_not().double()
        bad = _by_row(flat, 0 if out_dims is None else out_dims[k])
        if out_dims is None:
            bad = bad.sum(1, keepdim=True)
        good = (bad == 0).unflatten(0, value.shape[:2])
        finite = good if finite is None else finite & good
    assert finite is not None
    return finite


def all_finite(values: Tensor) -> bool:
    """Whether all values are; their sum is, unless it overflows, and is looked at first because it costs less."""
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "mps" else tensor.double()
