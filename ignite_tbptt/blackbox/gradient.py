"""One gradient of a blackbox, from the moves of an estimator through an evaluator to the inputs; and what may go wrong.

The idea: everything that makes a difference wrong without an error is looked for here: a value that is not finite,
rows that were said to be independent and are not, evaluations that draw other random numbers, outputs that do not move
at all. Pairs with `function`, which holds a `Differences` for every forward call and asks it in backward.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ignite_tbptt.blackbox.directions import Block, Moves, Rows
from ignite_tbptt.blackbox.errors import BlackboxError, UntrustedGradientWarning
from ignite_tbptt.blackbox.estimator import Estimator
from ignite_tbptt.blackbox.evaluation import Call, Evaluator, Points
from ignite_tbptt.blackbox.outputs import Outputs
from ignite_tbptt.blackbox.random_streams import RandomStreams

__all__ = ["Differences", "have_drawn"]

_T = TypeVar("_T")

# How often one input is searched for a step that moves the outputs: it costs some ten evaluations.
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
        before = RandomStreams.now()
        try:
            with torch.no_grad(), _autocast_off({tensor.device.type for tensor in points}):
                self.call.replay = self.streams if self.draws else None
                found = self._estimated(points, needed, cotangents)
                if not self.draws and have_drawn(before, RandomStreams.now()):
                    # Away from x the blackbox drew numbers, each evaluation its own: once more, with the same for all.
                    self.draws, self.call.replay = True, self.streams
                    found = self._estimated(points, needed, cotangents)
        finally:
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
        first = self.call.first
        if first is None:
            first = self.call([point.clone() for point in points], "at x itself")
        used = [
            k for k, v in enumerate(cotangents) if v is not None and first.tensors[k].is_floating_point() and v.numel()
        ]
        found: list[Tensor | None] = [
            _zeros(point) if need else None for point, need in zip(points, needed, strict=True)
        ]
        wanted = [k for k, need in enumerate(needed) if need and points[k].numel()]
        if not used or not wanted:
            return found
        task = _Task(self, points, first, used, [_there(cotangents[k]).to(first.tensors[k].device) for k in used])
        task.check_finite()
        in_dims = self.call.in_dims or [None] * len(points)
        by_row = [k for k in wanted if in_dims[k] is not None]
        if by_row:
            task.probe_rows(by_row)
        positions = {k: position for position, k in enumerate(k for k, need in enumerate(needed) if need)}
        for members, rows_move in ((by_row, True), ([k for k in wanted if in_dims[k] is None], False)):
            if not members:
                continue
            layouts = tuple(Rows(points[k].shape, in_dims[k]) for k in members)
            xs = tuple(layout.split(points[k]) for layout, k in zip(layouts, members, strict=True))
            names = tuple(self.names[k] for k in members)
            block = Block(xs, layouts, names, tuple(positions[k] for k in members))
            for k, layout, gradient in zip(members, layouts, task.along(block, members, rows_move), strict=True):
                found[k] = layout.join(gradient)
        return found


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

    def check_finite(self) -> None:
        """Refuse a point at which no difference can be taken."""
        for k, value in zip(self.used, self.values, strict=True):
            if not bool(torch.isfinite(value).all()):
                index = tuple((~torch.isfinite(value)).nonzero()[0].tolist())
                raise BlackboxError(
                    f"{self.call.label} is {float(value[index])} at x itself (output {k}, element {index}): there is "
                    "no difference to take; keep x inside the domain of the function, or mask such outputs before they "
                    "are returned"
                )

    def along(self, block: Block, members: list[int], rows_move: bool) -> list[Tensor]:
        """Gradients, as (rows, width), for the tensors of a block."""
        owner = self.owner
        size = max(_bytes(self.points), _bytes(self.first.tensors))
        portion = owner.evaluator.portion(size)
        draw = self.call.count.gradients
        under_way: deque[Moves] = deque()

        def portions() -> Iterator[Points]:
            for moves in owner.estimator.perturb(block, self.eps, portion, draw):
                under_way.append(moves)
                yield self._points_of(moves, members, rows_move)

        gradients = [_zeros(x) for x in block.xs]
        stirred: set[int] = set()
        for outputs in owner.evaluator.evaluate(self.call, portions()):
            moves = under_way.popleft()
            slopes = self._contracted(moves, outputs, rows_move)
            if not bool(torch.isfinite(slopes).all()):
                slopes = self._from_the_other_side(moves, slopes, members, rows_move)
            moves.add(slopes, gradients)
            if any(bool((outputs[k] != value).any()) for k, value in zip(self.used, self.values, strict=True)):
                stirred |= moves.points().keys() if len(members) > 1 else {0}
        for member, k in enumerate(members):
            # A weight whose input happens to be zero, as a first hidden state is, is no reason for doubt.
            moved = f"moved: {k}"
            if member in stirred:
                self.call.count.notes.add(moved)
            elif moved not in self.call.count.notes:
                self._warn_of_no_difference(k)
        return gradients

    def _contracted(self, moves: Moves, outputs: Sequence[Tensor], rows_move: bool) -> Tensor:
        used = [outputs[k] for k in self.used]
        dims = [_there(self.call.out_dims)[k] for k in self.used] if rows_move else None
        return self.owner.estimator.contract(moves, used, self.cotangents, self.values, dims)

    def _points_of(self, moves: Moves, members: list[int], rows_move: bool) -> Points:
        moved = {members[member]: points for member, points in moves.points().items()}
        offsets = moves.stencil.evaluated
        count = moves.count * len(offsets)
        tensors = []
        for k, point in enumerate(self.points):
            if k in moved:
                layout = moves.block.layouts[members.index(k)]
                points = layout.join(moved[k].flatten(0, 1))
                tensors.append(points if points.stride()[1:] == point.stride() else _copied_like(point, points))
            else:
                # always a copy: a single point, expanded, would count as contiguous and be the given one itself
                tensors.append(_copied_like(point, point.expand(count, *point.shape)))
        return Points(
            tensors, rows_move, lambda index: moves.describe(index // len(offsets), offsets[index % len(offsets)])
        )

    def _from_the_other_side(self, moves: Moves, slopes: Tensor, members: list[int], rows_move: bool) -> Tensor:
        """Take the slopes that are missing from points that mirror those which were not finite."""
        broken = (~torch.isfinite(slopes)).any(1).nonzero()[:, 0].tolist()
        if moves.stencil.is_two_sided:
            raise self._not_finite(moves, broken[0], "on both sides")
        mirrored = moves.mirrored(broken)
        points = self._points_of(mirrored, members, rows_move)
        (outputs,) = self.owner.evaluator.evaluate(self.call, [points])
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

    def probe_rows(self, by_row: list[int]) -> None:
        """Verify once that rows are independent: give row 0 the values of row 1 and see who notices."""
        call, note = self.call, "rows are independent"
        in_dims = _there(call.in_dims)
        rows = self.points[by_row[0]].shape[_there(in_dims[by_row[0]])]
        if rows < 2 or note in call.count.notes:
            return
        moved = [point.clone() for point in self.points]
        for k, dim in enumerate(in_dims):
            if dim is not None:
                _give_row_0_another_value(moved[k], dim, self.eps)
        out = call([point.clone() for point in moved], "row 0 moved, to see whether the others notice").tensors
        dims = _there(call.out_dims)
        for k in self.used:
            if not _same_bits(out[k].movedim(dims[k], 0)[1:], self.first.tensors[k].movedim(dims[k], 0)[1:]):
                raise self._coupled()
        if self.owner.evaluator.stacks and call.replay is None:
            self._probe_stack(moved, out)
        call.count.notes.add(note)

    def _coupled(self) -> BlackboxError:
        call = self.call
        again = call([point.clone() for point in self.points], "at x once more").tensors
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
        (stacked,) = self.owner.evaluator.evaluate(self.call, [Points(pair, True, lambda index: "a stack of two")])
        for k in self.used:
            want = torch.stack([out[k], self.first.tensors[k]])
            scale = float(want.abs().amax())
            if not torch.allclose(stacked[k], want, rtol=0, atol=scale * self.eps**0.5, equal_nan=True):
                raise BlackboxError(
                    f"{self.call.label} gives other rows in a batch of twice the size, so that its points cannot be "
                    "stacked; use SerialEvaluation()"
                )

    def _warn_of_no_difference(self, k: int) -> None:
        """Say once for each input that nothing moved although it would have at a larger step.

        Where no step moves anything the zero is right: the weight of a state that is still zero, say.
        """
        call, name = self.call, self.owner.names[k]
        searched = [note for note in call.count.notes if note.startswith(f"no difference: {name}: ")]
        if len(searched) >= _SEARCHES:
            return
        call.count.notes.add(f"no difference: {name}: {len(searched)}")
        found = self._step_that_moves(k)
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

    def _step_that_moves(self, k: int) -> tuple[float, float] | None:
        """The step at which outputs change, to a factor of 2, and the smallest change; None where none was found."""
        reach = max(1.0, float(self.points[k].abs().max()))
        h = reach * self.eps**0.5
        while h < 1e3 * reach:
            change = self._change_at(k, h)
            if change is not None:
                smaller = self._change_at(k, h / 2)
                return (h, change) if smaller is None else (h / 2, smaller)
            h *= 4
        return None

    def _change_at(self, k: int, h: float) -> float | None:
        """The smallest change of an output when all elements of an input move by h, None where nothing changes."""
        points = [point.clone() for point in self.points]
        points[k] += h
        try:
            out = self.call(points, f"{self.owner.names[k]}: all elements moved by {h:.3g}").tensors
        except BlackboxError:
            return None
        pairs = zip((out[used] for used in self.used), self.values, strict=True)
        changes = torch.cat([(now - was).abs().flatten() for now, was in pairs])
        changes = changes[torch.isfinite(changes) & (changes > 0)]
        return float(changes.min()) if len(changes) else None


def have_drawn(before: RandomStreams, after: RandomStreams) -> bool:
    """Whether any of the global random streams moved between two moments."""
    if not torch.equal(before.torch_cpu, after.torch_cpu) or before.python != after.python:
        return True
    if len(before.torch_cuda) != len(after.torch_cuda):
        return True
    if not all(torch.equal(was, now) for was, now in zip(before.torch_cuda, after.torch_cuda, strict=True)):
        return True
    was, now = before.numpy_legacy, after.numpy_legacy
    return not (np.array_equal(was[1], now[1]) and was[0] == now[0] and was[2:] == now[2:])


@contextlib.contextmanager
def _autocast_off(devices: set[str]) -> Iterator[None]:
    """Evaluate in the precision of the points: autocast would round what differences are taken of."""
    with contextlib.ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _give_row_0_another_value(tensor: Tensor, dim: int, eps: float) -> None:
    rows = tensor.movedim(dim, 0)
    other = rows[1].clone()
    if tensor.is_floating_point():
        step = other.abs().clamp(min=1.0) * eps**0.5
        other = torch.where(other == rows[0], other + step, other)
    rows[0] = other


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _copied_like(point: Tensor, points: Tensor) -> Tensor:
    """Points in memory of their own, each with the strides of the given one."""
    strides = (point.numel(), *point.stride())
    return torch.empty_strided(points.shape, strides, dtype=point.dtype, device=point.device).copy_(points)


def _zeros(x: Tensor) -> Tensor:
    dtype = x.dtype if x.device.type == "mps" else torch.float64
    return torch.zeros(x.shape, dtype=dtype, device=x.device)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _there(value: _T | None) -> _T:
    assert value is not None
    return value
