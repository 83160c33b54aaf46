"""One gradient of a blackbox, from the moves of an estimator through an evaluator to the inputs.

The idea: an estimator says where to go, an evaluator goes there, the estimator makes slopes of what came out; here is
who carries things from one to the other, takes a value that is missing from the other side of x, replays the random
numbers, and asks the `doubts`. Pairs with `function`, which holds a `Differences` for every forward call and asks it in
backward.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ignite_tbptt.blackbox.blocks import Block, groups_of
from ignite_tbptt.blackbox.directions import Moves
from ignite_tbptt.blackbox.doubts import BasePoint, there
from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.estimator import Estimator, all_finite
from ignite_tbptt.blackbox.evaluation import Call, Evaluator, Points, size_of
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["Differences", "autocast_off"]

# Slopes are taken of so many evaluations at a time as leave outputs of this size, or of fewer.
_PORTION_BYTES, _MOST_AT_A_TIME = 2**20, 4096


@dataclass(eq=False)
class Differences:
    """What backward needs to know about one forward call.

    Attributes:
        call: the blackbox.
        estimator: how the gradient is estimated.
        evaluator: where the points are evaluated.
        names: what each tensor is called in messages.
        cast: brings a tensor into the precision and to the device in which the blackbox is evaluated.
        streams: the random streams before the forward call.
        draws: whether the forward call drew random numbers.
    """

    call: Call
    estimator: Estimator
    evaluator: Evaluator
    names: Sequence[str]
    cast: Callable[[Tensor], Tensor]
    streams: RandomStreams
    draws: bool

    def gradients(
        self, tensors: Sequence[Tensor], needed: Sequence[bool], cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradient for each tensor that needs one.

        Args:
            tensors: all arguments of the blackbox, as they were in the forward call.
            needed: which of them need a gradient.
            cotangents: v for each output, None where it was not used.

        Raises:
            BlackboxError: the blackbox raised, changed its kind of output, is not finite, or couples rows.
        """
        # Copies: a simulator may keep its state in the memory that the caller's tensors look at, and write there when
        # it is evaluated. A clone is dense, too, whatever the tensor was a slice of.
        points = [self.cast(tensor).clone() for tensor in tensors]
        self.call.replay = self.streams if self.draws else None
        before, moved = RandomStreams.now(None if self.draws else self.streams), True
        try:
            with torch.no_grad(), autocast_off(points):
                found = self._estimated(points, needed, cotangents)
                moved = self.draws or before.have_moved()
                if moved and not self.draws:
                    # Away from x the blackbox drew numbers, each evaluation its own: once more, with the same for all,
                    # x included.
                    self.draws, self.call.replay, self.call.first = True, self.streams, None
                    found = self._estimated(points, needed, cotangents)
        finally:
            if moved:
                before.restore()
        self.call.count.gradients += 1
        return [
            None if gradient is None else _like(tensor, gradient)
            for gradient, tensor in zip(found, tensors, strict=True)
        ]

    def _estimated(
        self, points: list[Tensor], needed: Sequence[bool], cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients in the precision of the evaluation."""
        if self.call.first is None:
            self.call([point.clone() for point in points], "at x itself")
        first = there(self.call.first)
        used = [
            k for k, v in enumerate(cotangents) if v is not None and first.tensors[k].is_floating_point() and v.numel()
        ]
        in_dims = self.call.in_dims or [None] * len(points)
        kinds = tuple(
            (point.dtype, dim, point.numel() > 0) if need else None
            for point, dim, need in zip(points, in_dims, needed, strict=True)
        )
        groups = groups_of(kinds) if used else ()
        found: list[Tensor | None] = [None] * len(points)
        if groups:
            v = [there(cotangents[k]).to(first.tensors[k].device) for k in used]
            at = BasePoint(self.call, self.estimator, self.evaluator, self.names, points, used, v)
            if any(group.rows_move for group in groups):
                at.probe_rows()
        for group in groups:
            members = group.members
            block = Block.of([points[k] for k in members], group.dims, members, group.positions, self.names)
            gradient = _along(at, block, group.rows_move).to(block.x.dtype)
            for k, part in zip(members, block.apart(gradient), strict=True):
                found[k] = part
            if not bool(gradient.all()):
                for k, position in zip(members, group.positions, strict=True):
                    at.doubt_if_zero(k, position, there(found[k]))
        return [
            torch.zeros_like(point) if need and gradient is None else gradient
            for point, need, gradient in zip(points, needed, found, strict=True)
        ]


def _along(at: BasePoint, block: Block, rows_move: bool) -> Tensor:
    """The gradient of a block, (rows, width)."""
    portion = max(1, min(_MOST_AT_A_TIME, _PORTION_BYTES // max(1, size_of(at.first.tensors))))
    draw = at.call.count.gradients
    under_way: deque[Moves] = deque()

    def portions() -> Iterator[Points]:
        for moves in at.estimator.perturb(block, at.eps, portion, draw):
            under_way.append(moves)
            yield _points_of(at, moves, rows_move)

    gradient: Tensor | None = None
    for outputs in at.evaluator.evaluate(at.call, portions()):
        moves = under_way.popleft()
        slopes = _contracted(at, moves, outputs, rows_move)
        if not all_finite(slopes):
            at.check_finite()
            slopes = _from_the_other_side(at, moves, slopes, rows_move)
        gradient = moves.added(slopes, gradient)
    return there(gradient)


def _contracted(at: BasePoint, moves: Moves, outputs: Sequence[Tensor], rows_move: bool) -> Tensor:
    used = [outputs[k] for k in at.used]
    dims = [there(at.call.out_dims)[k] for k in at.used] if rows_move else None
    return at.estimator.contract(moves, used, at.cotangents, at.values, dims)


def _points_of(at: BasePoint, moves: Moves, rows_move: bool) -> Points:
    offsets = moves.stencil.evaluated

    def chunks(some: int) -> Iterator[list[Tensor]]:
        step = max(1, some // len(offsets))
        for start in range(0, moves.count, step):
            yield _moved(at, moves, start, min(moves.count, start + step))

    def describe(index: int) -> str:
        return moves.describe(index // len(offsets), offsets[index % len(offsets)])

    return Points(moves.count * len(offsets), size_of(at.points), rows_move, chunks, describe)


def _moved(at: BasePoint, moves: Moves, start: int, stop: int) -> list[Tensor]:
    """All arguments at all points of some of the moves, each (points, *shape)."""
    block = moves.block
    moved = dict(zip(block.members, block.apart(moves.points(start, stop).flatten(0, 1)), strict=True))
    count = (stop - start) * len(moves.stencil.evaluated)
    tensors = []
    for k, point in enumerate(at.points):
        points = moved.get(k)
        if points is None:
            # always a copy: a single point, expanded, would count as contiguous and be the given one itself
            points = _copied_like(point, point.expand(count, *point.shape))
        elif points.stride()[1:] != point.stride():
            points = _copied_like(point, points)
        tensors.append(points)
    return tensors


def _from_the_other_side(at: BasePoint, moves: Moves, slopes: Tensor, rows_move: bool) -> Tensor:
    """Take the slopes that are missing from points that mirror those which were not finite."""
    broken = (~torch.isfinite(slopes)).any(1).nonzero()[:, 0].tolist()
    if moves.stencil.is_two_sided:
        raise _not_finite(at, moves, broken[0], "on both sides")
    mirrored = moves.mirrored(broken)
    step_size, block = at.estimator.step_size, moves.block
    for position, part in zip(block.positions, block.apart(mirrored.points(0, len(broken))), strict=True):
        if not torch.equal(step_size.inside(part, position), part):
            raise _not_finite(at, moves, broken[0], "and the other side is out of bounds,")
    (outputs,) = at.evaluator.evaluate(at.call, [_points_of(at, mirrored, rows_move)])
    again = _contracted(at, mirrored, outputs, rows_move)
    mended = slopes.clone()
    mended[broken] = torch.where(torch.isfinite(slopes[broken]), slopes[broken], again)
    if not bool(torch.isfinite(mended).all()):
        raise _not_finite(at, moves, broken[0], "and on the other side of x as well")
    return mended


def _not_finite(at: BasePoint, moves: Moves, move: int, sides: str) -> BlackboxError:
    return BlackboxError(
        f"{at.call.label} is NaN or infinite {sides} with {moves.describe(move, moves.stencil.evaluated[-1])}; "
        "choose a smaller step, or BoundedStep to keep x inside the domain"
    )


def autocast_off(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[object]:
    """Evaluate in the precision of the tensors: autocast would round what differences are taken of."""
    on = {tensor.device.type for tensor in tensors if torch.is_autocast_enabled(tensor.device.type)}
    if not on:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for device in on:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _like(tensor: Tensor, gradient: Tensor) -> Tensor:
    """The gradient as the tensor itself is: finding out costs a tenth of a `to` that has nothing to do."""
    if gradient.dtype == tensor.dtype and gradient.device == tensor.device:
        return gradient
    return gradient.to(device=tensor.device, dtype=tensor.dtype)


def _copied_like(point: Tensor, points: Tensor) -> Tensor:
    """Points in memory of their own, each with the strides of the given one."""
    strides = (point.numel(), *point.stride())
    return torch.empty_strided(points.shape, strides, dtype=point.dtype, device=point.device).copy_(points)
