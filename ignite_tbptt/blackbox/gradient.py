"""One gradient of a blackbox, from the moves of an estimator through an evaluator to the inputs; and what may go wrong.

The idea: everything that makes a difference wrong without an error is looked for here: a value that is not finite,
rows that were said to be independent and are not, evaluations that draw other random numbers, outputs that do not move
at all. Pairs with `function`, which holds a `Differences` for every forward call and asks it in backward.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ignite_tbptt.blackbox.directions import Block, Moves
from ignite_tbptt.blackbox.errors import BlackboxError, UntrustedGradientWarning
from ignite_tbptt.blackbox.estimator import Estimator, all_finite
from ignite_tbptt.blackbox.evaluation import Call, Evaluator, Points, size_of
from ignite_tbptt.blackbox.outputs import Outputs
from ignite_tbptt.blackbox.random_streams import RandomStreams

__all__ = ["Differences", "autocast_off"]

_T = TypeVar("_T")

# Slopes are taken of so many evaluations at a time as leave outputs of this size, or of fewer.
_PORTION_BYTES, _MOST_AT_A_TIME = 2**20, 4096

# How often it is asked whether an input with a zero gradient matters at all, at one evaluation each time.
_SEARCHES = 3


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
        # a clone is dense, whatever the tensor was a slice of
        points = [self.cast(tensor).clone() for tensor in tensors]
        self.call.replay = self.streams if self.draws else None
        before, moved = RandomStreams.now(), True
        try:
            with torch.no_grad(), autocast_off(points):
                found = self._estimated(points, needed, cotangents)
                moved = self.draws or before.have_moved()
                if moved and not self.draws:
                    # Away from x the blackbox drew numbers, each evaluation its own: once more, with the same for all.
                    self.draws, self.call.replay = True, self.streams
                    found = self._estimated(points, needed, cotangents)
        finally:
            if moved:
                before.restore()
        self.call.count.gradients += 1
        return [
            None if gradient is None else gradient.to(device=tensor.device, dtype=tensor.dtype)
            for gradient, tensor in zip(found, tensors, strict=True)
        ]

    def _estimated(
        self, points: list[Tensor], needed: Sequence[bool], cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients in the precision of the evaluation."""
        if self.call.first is None:
            self.call([point.clone() for point in points], "at x itself")
        first = _there(self.call.first)
        used = [
            k for k, v in enumerate(cotangents) if v is not None and first.tensors[k].is_floating_point() and v.numel()
        ]
        in_dims = self.call.in_dims or [None] * len(points)
        kinds = tuple(
            (point.dtype, dim, point.numel() > 0) if need else None
            for point, dim, need in zip(points, in_dims, needed, strict=True)
        )
        groups = _groups(kinds) if used else ()
        found: list[Tensor | None] = [None] * len(points)
        if groups:
            task = _Task(self, points, first, used, [_there(cotangents[k]).to(first.tensors[k].device) for k in used])
            if any(group.rows_move for group in groups):
                task.probe_rows()
        for group in groups:
            members = group.members
            block = Block.of([points[k] for k in members], group.dims, members, group.positions, self.names)
            gradient = task.along(block, group.rows_move).to(block.x.dtype)
            for k, part in zip(members, block.apart(gradient), strict=True):
                found[k] = part
            if not bool(gradient.all()):
                for k, position in zip(members, group.positions, strict=True):
                    task.doubt_if_zero(k, position, _there(found[k]))
        return [
            torch.zeros_like(point) if need and gradient is None else gradient
            for point, need, gradient in zip(points, needed, found, strict=True)
        ]


class _Group(NamedTuple):
    """Tensors that are moved together: in one precision, and all with rows of their own or all without."""

    rows_move: bool
    members: tuple[int, ...]
    dims: tuple[int | None, ...]
    positions: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def _groups(kinds: tuple[tuple[torch.dtype, int | None, bool] | None, ...]) -> tuple[_Group, ...]:
    """The groups among tensors, given the dtype, the axis of the rows and whether there are elements, of each.

    None stands for a tensor that needs no gradient. Positions are counted among those that do.
    """
    needed = [(k, kind) for k, kind in enumerate(kinds) if kind is not None]
    groups: dict[tuple[bool, torch.dtype], list[tuple[int, int | None, int]]] = {}
    for position, (k, (dtype, dim, any_elements)) in enumerate(needed):
        if any_elements:
            groups.setdefault((dim is not None, dtype), []).append((k, dim, position))
    return tuple(_Group(rows_move, *zip(*tensors, strict=True)) for (rows_move, _), tensors in groups.items())


class _Task:
    """One backward: the point, what came out there, and the cotangents of the outputs that were used."""

    def __init__(
        self, owner: Differences, points: list[Tensor], first: Outputs, used: list[int], cotangents: list[Tensor]
    ) -> None:
        self.owner, self.call, self.points, self.used, self.cotangents = owner, owner.call, points, used, cotangents
        self.first = first
        self.values = [first.tensors[k] for k in used]
        x_types = {point.dtype for point in points if point.is_floating_point()}
        self.eps = max(torch.finfo(dtype).eps for dtype in x_types | {value.dtype for value in self.values})

    def along(self, block: Block, rows_move: bool) -> Tensor:
        """The gradient of a block, (rows, width)."""
        owner = self.owner
        portion = max(1, min(_MOST_AT_A_TIME, _PORTION_BYTES // max(1, size_of(self.first.tensors))))
        draw = self.call.count.gradients
        under_way: deque[Moves] = deque()

        def portions() -> Iterator[Points]:
            for moves in owner.estimator.perturb(block, self.eps, portion, draw):
                under_way.append(moves)
                yield self._points_of(moves, rows_move)

        gradient: Tensor | None = None
        for outputs in owner.evaluator.evaluate(self.call, portions()):
            moves = under_way.popleft()
            slopes = self._contracted(moves, outputs, rows_move)
            if not all_finite(slopes):
                self._check_finite_at_x()
                slopes = self._from_the_other_side(moves, slopes, rows_move)
            gradient = moves.added(slopes, gradient)
        return _there(gradient)

    def _check_finite_at_x(self) -> None:
        """Refuse a point at which no difference can be taken."""
        for k, value in zip(self.used, self.values, strict=True):
            if not bool(torch.isfinite(value).all()):
                index = tuple((~torch.isfinite(value)).nonzero()[0].tolist())
                raise BlackboxError(
                    f"{self.call.label} is {float(value[index])} at x itself (output {k}, element {index}): there is "
                    "no difference to take; keep x inside the domain of the function, or mask such outputs before they "
                    "are returned"
                )

    def _contracted(self, moves: Moves, outputs: Sequence[Tensor], rows_move: bool) -> Tensor:
        used = [outputs[k] for k in self.used]
        dims = [_there(self.call.out_dims)[k] for k in self.used] if rows_move else None
        return self.owner.estimator.contract(moves, used, self.cotangents, self.values, dims)

    def _points_of(self, moves: Moves, rows_move: bool) -> Points:
        offsets = moves.stencil.evaluated

        def chunks(some: int) -> Iterator[list[Tensor]]:
            step = max(1, some // len(offsets))
            for start in range(0, moves.count, step):
                yield self._moved(moves, start, min(moves.count, start + step))

        def describe(index: int) -> str:
            return moves.describe(index // len(offsets), offsets[index % len(offsets)])

        return Points(moves.count * len(offsets), size_of(self.points), rows_move, chunks, describe)

    def _moved(self, moves: Moves, start: int, stop: int) -> list[Tensor]:
        """All arguments at all points of some of the moves, each (points, *shape)."""
        block = moves.block
        moved = dict(zip(block.members, block.apart(moves.points(start, stop).flatten(0, 1)), strict=True))
        count = (stop - start) * len(moves.stencil.evaluated)
        tensors = []
        for k, point in enumerate(self.points):
            points = moved.get(k)
            if points is None:
                # always a copy: a single point, expanded, would count as contiguous and be the given one itself
                points = _copied_like(point, point.expand(count, *point.shape))
            elif points.stride()[1:] != point.stride():
                points = _copied_like(point, points)
            tensors.append(points)
        return tensors

    def _from_the_other_side(self, moves: Moves, slopes: Tensor, rows_move: bool) -> Tensor:
        """Take the slopes that are missing from points that mirror those which were not finite."""
        broken = (~torch.isfinite(slopes)).any(1).nonzero()[:, 0].tolist()
        if moves.stencil.is_two_sided:
            raise self._not_finite(moves, broken[0], "on both sides")
        mirrored = moves.mirrored(broken)
        step_size, block = self.owner.estimator.step_size, moves.block
        for position, part in zip(block.positions, block.apart(mirrored.points(0, len(broken))), strict=True):
            if not torch.equal(step_size.inside(part, position), part):
                raise self._not_finite(moves, broken[0], "and the other side is out of bounds,")
        (outputs,) = self.owner.evaluator.evaluate(self.call, [self._points_of(mirrored, rows_move)])
        again = self._contracted(mirrored, outputs, rows_move)
        mended = slopes.clone()
        mended[broken] = torch.where(torch.isfinite(slopes[broken]), slopes[broken], again)
        if not bool(torch.isfinite(mended).all()):
            raise self._not_finite(moves, broken[0], "and on the other side of x as well")
        return mended

    def _not_finite(self, moves: Moves, move: int, sides: str) -> BlackboxError:
        return BlackboxError(
            f"{self.call.label} is NaN or infinite {sides} with {moves.describe(move, moves.stencil.evaluated[-1])}; "
            "choose a smaller step, or BoundedStep to keep x inside the domain"
        )

    def probe_rows(self) -> None:
        """Verify once that rows are independent: give row 0 the values of row 1 and see who notices."""
        call, note = self.call, "rows are independent"
        in_dims = _there(call.in_dims)
        rows = next(point.shape[dim] for point, dim in zip(self.points, in_dims, strict=True) if dim is not None)
        if rows < 2 or note in call.count.notes:
            return
        self._check_finite_at_x()
        moved = [point.clone() for point in self.points]
        for k, dim in enumerate(in_dims):
            if dim is not None:
                _give_row_0_another_value(moved[k], dim, self.eps)
        out = call([point.clone() for point in moved], "row 0 moved, to see whether the others notice")
        dims = _there(call.out_dims)
        for k in self.used:
            if not _same_bits(out[k].movedim(dims[k], 0)[1:], self.first.tensors[k].movedim(dims[k], 0)[1:]):
                raise self._coupled()
        if self.owner.evaluator.stacks and call.replay is None:
            self._probe_stack(moved, out)
        call.count.notes.add(note)

    def _coupled(self) -> BlackboxError:
        call = self.call
        again = call([point.clone() for point in self.points], "at x once more")
        if not all(_same_bits(again[k], self.first.tensors[k]) for k in self.used):
            return BlackboxError(
                f"{call.label} gives other outputs for the same inputs: no difference of two can be trusted, and "
                "in_dims cannot be verified: seed its generator at every call, or draw from the global streams of "
                "torch, numpy or random, which are replayed"
            )
        return BlackboxError(
            f"in_dims={list(_there(call.in_dims))} says that the rows of {call.label} are independent, but moving row "
            "0 changed the outputs of other rows (as BatchNorm in training does); leave in_dims out, at one evaluation "
            "for each element instead of each column, or uncouple the rows"
        )

    def _probe_stack(self, moved: list[Tensor], out: list[Tensor]) -> None:
        """Verify once that a batch of twice the size gives the same rows, up to rounding."""
        pair = [torch.stack([m, point]) for m, point in zip(moved, self.points, strict=True)]
        (stacked,) = self.owner.evaluator.evaluate(self.call, [Points.of(pair, True, lambda index: "a stack of two")])
        for k in self.used:
            want = torch.stack([out[k], self.first.tensors[k]])
            scale = float(want.abs().amax())
            if not torch.allclose(stacked[k], want, rtol=0, atol=scale * self.eps**0.5, equal_nan=True):
                raise BlackboxError(
                    f"{self.call.label} gives other rows in a batch of twice the size, so that its points cannot be "
                    "stacked; use SerialEvaluation()"
                )

    def doubt_if_zero(self, k: int, position: int, gradient: Tensor) -> None:
        """Warn, once for each input, of a zero gradient where a larger step would have moved the outputs.

        Where the steps taken did move them, or no step does, the zero is right: an even function at its centre, or the
        weight of a state that is still zero.
        """
        if bool(gradient.any()) or not any(bool(v.any()) for v in self.cotangents):
            return
        call, name = self.call, self.owner.names[k]
        searched = [note for note in call.count.notes if note.startswith(f"no difference: {name}: ")]
        if len(searched) >= _SEARCHES:
            return
        call.count.notes.add(f"no difference: {name}: {len(searched)}")
        found = self._step_that_moves(k, position)
        if found is None:
            return
        h, quantum = found
        call.count.notes.update(f"no difference: {name}: {search}" for search in range(_SEARCHES))
        warnings.warn(
            f"the gradient of {call.label} with respect to {name} is zero: no step that was taken changed the outputs. "
            f"They do change, by {quantum:.3g} at least, when all elements move by {h:.3g}: if they come in quanta, "
            f"choose a step of several of these, AbsoluteStep({4 * h:.2g}) say, or GaussianSmoothing(n, sigma={h:.2g})",
            UntrustedGradientWarning,
            stacklevel=2,
        )

    def _step_that_moves(self, k: int, position: int) -> tuple[float, float] | None:
        """The step at which outputs change, to a factor of 2, and the smallest change.

        None where no step changes them, or where the one that was taken does already.
        """
        x, estimator = self.points[k], self.owner.estimator
        reach = max(1.0, float(x.abs().max()))
        try:
            if self._change_at(k, position, reach) is None:
                return None
        except BlackboxError:
            pass  # so large a move leads outside the domain, smaller ones may not
        try:
            taken = estimator.step_size.each(x, estimator.stencil, self.eps, position).sizes
            if any(self._change_at(k, position, steps) is not None for steps in (taken, -taken)):
                return None
            h = float(taken.abs().max())
            while h < reach:
                h *= 4
                change = self._change_at(k, position, h)
                if change is not None and math.isfinite(change):
                    smaller = self._change_at(k, position, h / 2)
                    return (h, change) if smaller is None else (h / 2, smaller)
        except BlackboxError:
            pass
        return None

    def _change_at(self, k: int, position: int, h: float | Tensor) -> float | None:
        """The smallest change of an output when all elements of an input move by h.

        None where nothing changes, infinite where all that changed is no number any more.
        """
        points = [point.clone() for point in self.points]
        points[k] = self.owner.estimator.step_size.inside(points[k] + h, position)
        out = self.call(points, f"all elements of {self.owner.names[k]} moved")
        pairs = zip((out[used] for used in self.used), self.values, strict=True)
        changes = torch.cat([(now - was).abs().flatten() for now, was in pairs])
        changes = torch.nan_to_num(changes, nan=math.inf, posinf=math.inf)
        changes = changes[changes > 0]
        return float(changes.min()) if len(changes) else None


def autocast_off(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[object]:
    """Evaluate in the precision of the tensors: autocast would round what differences are taken of."""
    on = {tensor.device.type for tensor in tensors if torch.is_autocast_enabled(tensor.device.type)}
    if not on:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for device in on:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _give_row_0_another_value(tensor: Tensor, dim: int, eps: float) -> None:
    rows = tensor.movedim(dim, 0)
    other = rows[1].clone()
    if tensor.is_floating_point():
        step = other.abs().clamp(min=1.0) * eps**0.5
        other = torch.where(other == rows[0], other + step, other)
    rows[0] = other


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _dense(tensor: Tensor) -> Tensor:
    """The tensor in memory without gaps, as a copy of it is; only looked at, so maybe the same one."""
    return tensor if tensor.is_contiguous() else tensor.clone()


def _like(tensor: Tensor, gradient: Tensor) -> Tensor:
    """The gradient as the tensor itself is: finding out costs a tenth of a `to` that has nothing to do."""
    if gradient.dtype == tensor.dtype and gradient.device == tensor.device:
        return gradient
    return gradient.to(device=tensor.device, dtype=tensor.dtype)


def _copied_like(point: Tensor, points: Tensor) -> Tensor:
    """Points in memory of their own, each with the strides of the given one."""
    strides = (point.numel(), *point.stride())
    return torch.empty_strided(points.shape, strides, dtype=point.dtype, device=point.device).copy_(points)


def _there(value: _T | None) -> _T:
    assert value is not None
    return value
