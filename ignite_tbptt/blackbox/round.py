"""The gradients of all calls that one backward reaches.

The idea: where a function is to be evaluated depends on x alone, not on the cotangent. So the first backward through
any call of a blackbox evaluates the points of all calls that this backward will reach, with their rows under one
another where these are independent; the slopes of their outputs wait in the records until each cotangent arrives. Where
they would take more memory than `HELD_BYTES`, and where nothing is gained by it, a record is evaluated by itself and
contracted portion by portion. Pairs with `node`, which knows what a backward reaches.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ignite_tbptt.blackbox.ahead import UnderWay, is_under_way, take
from ignite_tbptt.blackbox.block import Group, rows_of
from ignite_tbptt.blackbox.certificate import certify
from ignite_tbptt.blackbox.coarse import compare_steps
from ignite_tbptt.blackbox.coordinates import Coordinates
from ignite_tbptt.blackbox.errors import BlackboxError, LostEvaluationError
from ignite_tbptt.blackbox.estimator import quotients
from ignite_tbptt.blackbox.measuring import measure_steps
from ignite_tbptt.blackbox.moves import Moves, all_finite
from ignite_tbptt.blackbox.point import Evaluations, Job, Point, evaluate_at, jobs_of, key_of
from ignite_tbptt.blackbox.probes import verify, verify_pattern
from ignite_tbptt.blackbox.record import Record, autocast_off
from ignite_tbptt.blackbox.task import ALONE, SerialEvaluation, runs_elsewhere, size_of
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["HELD_BYTES", "gradients", "tangents"]

# Slopes of outputs that wait for their cotangents take no more memory than this in one round.
HELD_BYTES = 2**26


class _Slopes(NamedTuple):
    """Slopes of outputs along some moves.

    Attributes:
        moves: of a block of the point.
        outputs: (count, *shape) for each differentiable output.
        broken: whether some of them are NaN.
        sides: where the function was looked at, for a message.
    """

    moves: Moves
    outputs: Sequence[Tensor]
    broken: bool
    sides: str


@dataclass(frozen=True, eq=False)
class _Held:
    """Slopes that wait for the cotangent of a record."""

    point: Point
    slopes: list[tuple[Group, list[_Slopes]]]


Cotangents = Sequence[Tensor | None]


def gradients(
    record: Record, many: Sequence[Cotangents], reachable: Callable[[], Sequence[Record]]
) -> list[list[Tensor | None]]:
    """The gradients for each tensor that needs one, by one set of evaluations for all cotangents.

    Args:
        record: the call.
        many: cotangents, v for each output, None where it was not used.
        reachable: gives the records of the same blackbox that this backward will reach, this one among them.

    Raises:
        BlackboxError: the blackbox raised, changed its kind of output, is not finite, or couples rows.
    """
    start = time.perf_counter()
    held, record.held = record.held, None
    if held is not None:
        with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
            found = _contracted(record, held, held.slopes, many)
        return _counted(record, held.point, many, found, start)
    with ALONE, record.options.shown, torch.no_grad(), autocast_off(record.tensors):
        before, drawn, moved = RandomStreams.latest(), record.count.drawn, True
        try:
            held, slopes = _evaluate(record, reachable(), many[0])
            found = _contracted(record, held, slopes, many)
            moved = record.draws or record.count.drew_since(drawn, before)
            if moved and not record.draws:
                # Away from x the blackbox drew numbers, each evaluation its own: once more, with the same for all, x
                # included.
                record.draws, record.first, record.held = True, None, None
                record.facts.keeps_to_backward = True
                held, slopes = _evaluate(record, [record], many[0])
                found = _contracted(record, held, slopes, many)
        finally:
            if moved:
                before.restore()
    return _counted(record, held.point, many, found, start)


def _counted(
    record: Record, point: Point, many: Sequence[Cotangents], found: list[list[Tensor | None]], start: float
) -> list[list[Tensor | None]]:
    record.times += 1
    record.count.gradients += 1
    asked = record.options.certify
    if asked is not None and record.facts.certificate_due(asked.every):
        with ALONE, record.options.shown, torch.no_grad(), autocast_off(record.tensors):
            before = RandomStreams.latest()
            try:
                certify(point if len(point.records) == 1 else Point([record]), many[0], found[0])
            finally:
                before.restore()
    record.count.wall_seconds += time.perf_counter() - start
    return found


def tangents(record: Record, along: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The change of every output along a tangent of the inputs, from one difference; None for integers.

    Raises:
        BlackboxError: the blackbox raised, changed its kind of output, or is not finite.
    """
    start = time.perf_counter()
    with ALONE, torch.no_grad(), autocast_off(record.tensors):
        before = RandomStreams.latest()
        try:
            measure_steps(record, False)
            point = Point([record])
            moved = {k: t.to(point.x[k]) for k, t in enumerate(along) if t is not None}
            scale = max((float((t.abs() / point.sizes(k)).max()) for k, t in moved.items() if t.numel()), default=0.0)
            found: list[Tensor | None] = [
                torch.zeros_like(y) if y.is_floating_point() else None for y in point.first.tensors
            ]
            if not 0 < scale < math.inf:
                return found
            stencil = record.estimator.stencil
            for offset, weight in zip(stencil.offsets, stencil.weights, strict=True):
                h = offset / scale
                points = [x + h * moved[k] if k in moved else x.clone() for k, x in enumerate(point.x)]
                tensors = point.first.tensors
                if offset:
                    tensors = evaluate_at(record, points, f"along a tangent, by {h:.3g}", 1, point, False).tensors
                for total, now, y in zip(found, tensors, point.first.tensors, strict=True):
                    if total is not None:
                        total.add_(now - y, alpha=weight * scale)
            if not all(bool(torch.isfinite(t).all()) for t in found if t is not None):
                raise BlackboxError(
                    f"{record.flat.label} is NaN or infinite along the tangent; choose a smaller step, or BoundedStep "
                    "to keep x inside the domain"
                )
        finally:
            before.restore()
            record.count.wall_seconds += time.perf_counter() - start
    return found


def _evaluate(record: Record, reachable: Sequence[Record], cotangents: Sequence[Tensor | None]) -> tuple[_Held, Any]:
    """Evaluate the records together that can be, and leave the slopes of the others with them."""
    key = key_of(record)
    others = [other for other in reachable if other is not record and other.held is None and other.unchanged]
    others = [other for other in others if key_of(other) == key and other.draws == record.draws]
    first = record.facts.is_first(key)
    point = verify(record, 1 + len(others))
    due = point is not None
    measure_steps(record, due)
    if point is not None:
        compare_steps(point, cotangents, first)
    begun = take(record)
    if begun is not None:
        slopes = _begun(begun)
        return _Held(begun.point, []), _with_pattern(begun.point, slopes) if due else slopes
    others = [other for other in others if is_under_way(other) is None]
    alike = _merged(record, others)
    if point is None or len(alike) > 1:
        point = Point(alike)
    if len(alike) > 1:
        (slopes,) = _slopes_at_once([point])
        for each, apart in zip(alike, _by_record(point, slopes), strict=True):
            each.held = _Held(point, apart)
    else:
        together = _side_by_side(record, others)
        if len(together) == 1:
            streamed = _streamed(point)
            return _Held(point, []), _with_pattern(point, streamed) if due else streamed
        points = [point, *(Point([other]) for other in together[1:])]
        for each, own, slopes in zip(together, points, _slopes_at_once(points), strict=True):
            each.held = _Held(own, slopes)
    held, record.held = record.held, None
    return held, _with_pattern(held.point, held.slopes) if due else held.slopes


def _with_pattern(point: Point, slopes: Any) -> Any:
    """The same slopes, with which the pattern that they rest on, if any, was verified."""
    if getattr(point.record.asked.directions, "sparsity", None) is None:
        return slopes
    slopes = [(group, list(some)) for group, some in slopes]
    try:
        for _, some in slopes:
            verify_pattern(point, [(slope.moves, slope.outputs[0]) for slope in some])
    except BlackboxError as error:
        point.record.facts.forget(key_of(point.record))
        if not isinstance(error, LostEvaluationError):
            raise
    return slopes


def _slopes_at_once(points: Sequence[Point]) -> list[list[tuple[Group, list[_Slopes]]]]:
    """The slopes at several points, whose evaluations go out together."""
    found: list[dict[Group, list[_Slopes]]] = [{group: [] for group in point.groups} for point in points]
    jobs = [
        (slopes[group], job)
        for point, slopes in zip(points, found, strict=True)
        for group in slopes
        for job in jobs_of(point, group)
    ]
    for (slopes_of_group, job), value in zip(jobs, Evaluations([job for _, job in jobs]).values(), strict=True):
        slopes_of_group.append(_slopes_of(job, value))
    return [list(slopes.items()) for slopes in found]


def _begun(begun: UnderWay) -> list[tuple[Group, list[_Slopes]]]:
    """The slopes of a record whose evaluations are under way, those of the others are left to their own backward."""
    found: dict[Group, list[_Slopes]] = {}
    for group, job, values in begun.values():
        found.setdefault(group, []).append(_slopes_of(job, values))
    return list(found.items())


def _by_record(point: Point, slopes: Sequence[tuple[Group, list[_Slopes]]]) -> list[list[tuple[Group, list[_Slopes]]]]:
    """The slopes of each record of a point, those of the rows of its own outputs."""
    rows = [_rows(record) for record in point.records]
    found: list[list[tuple[Group, list[_Slopes]]]] = [[(group, []) for group, _ in slopes] for _ in rows]
    for number, (_, some) in enumerate(slopes):
        for moves, outputs, broken, sides in some:
            parts = [out.split_with_sizes(rows, d + 1) for out, d in zip(outputs, point.out_dims or (), strict=True)]
            for own, *apart in zip(found, *parts, strict=True):
                own[number][1].append(_Slopes(moves, apart, broken, sides))
    return found


def _side_by_side(record: Record, others: Sequence[Record]) -> list[Record]:
    """The records whose evaluations go out together to the workers of a pool, within the budget."""
    options = record.options
    if not runs_elsewhere(options.executor) or not isinstance(record.asked.directions, Coordinates):
        return [record]
    together, room = [record], HELD_BYTES - record.held_bytes
    for other in others:
        room -= other.held_bytes
        if room < 0:
            break
        measure_steps(other, False)
        together.append(other)
    return together


def _rows(record: Record) -> int:
    dims = record.flat.in_dims or ()
    return next(t.shape[dim] for t, dim in zip(record.tensors, dims, strict=True) if dim is not None)


def _merged(record: Record, others: Sequence[Record]) -> list[Record]:
    """The records whose rows may be evaluated in one batch with those of the first, within the budget."""
    options, flat = record.options, record.flat
    if isinstance(options.executor, SerialEvaluation) or record.draws or flat.in_dims is None:
        return [record]
    if not record.facts.stackable.get(key_of(record), False) or not isinstance(record.asked.directions, Coordinates):
        return [record]
    key = flat.key
    if key is None or any(t.numel() == 0 for t in record.tensors):
        return [record]
    stack_bytes = getattr(options.executor, "stack_bytes", 2**19)
    each = record.held_bytes
    size = max(size_of(record.tensors), size_of(record.outputs.tensors), 1)
    room = min(HELD_BYTES // max(1, each), stack_bytes // size)
    alike = [record]
    for other in others:
        if len(alike) >= room:
            break
        if other.needed == record.needed and other.flat.key == key and _fits(record, other):
            alike.append(other)
    return alike


def _fits(record: Record, other: Record) -> bool:
    """Whether what all rows share is the same, and rows are of one shape."""
    in_dims = record.flat.in_dims or ()
    shared = [k for k, dim in enumerate(in_dims) if dim is None]
    for one, two in ((record.tensors[k], other.tensors[k]) for k in shared):
        if one.data_ptr() != two.data_ptr() or one.shape != two.shape or one.stride() != two.stride():
            return False
    if any(record.versions[k] != other.versions[k] for k in shared):
        return False
    if record.given is other.given:  # inputs and outputs of the same kinds, as it was settled
        return True
    for dim, one, two in zip(in_dims, record.tensors, other.tensors, strict=True):
        if one.dtype != two.dtype or one.device != two.device:
            return False
        if dim is not None and (one.shape[:dim] != two.shape[:dim] or one.shape[dim + 1 :] != two.shape[dim + 1 :]):
            return False
    if record.autocast != other.autocast:
        return False
    first, second = record.outputs.tensors, other.outputs.tensors
    return len(first) == len(second) and all(a.dtype == b.dtype for a, b in zip(first, second, strict=True))


def _streamed(point: Point) -> Iterator[tuple[Group, Iterator[_Slopes]]]:
    """Slopes of a record by itself, portion by portion."""
    for group in point.groups:
        yield group, (_slopes_of(job, Evaluations([job]).values()[0]) for job in jobs_of(point, group))


def _slopes_of(job: Job, values: Sequence[Tensor]) -> _Slopes:
    """Slopes of all outputs, those that are missing from the other side of x."""
    point, moves = job.point, job.moves
    dims = point.out_dims if job.rows_move else None
    slopes = quotients(moves, values, point.values, dims)
    if all(map(all_finite, slopes)):
        return _Slopes(moves, slopes, False, "")
    missing = torch.zeros(moves.count, dtype=torch.bool)
    for slope, y in zip(slopes, point.values, strict=True):
        lost = slope.isnan()
        if bool(lost.any()):
            missing |= (lost & y.isfinite()).flatten(1).any(1).cpu() if y.dim() else (lost & y.isfinite()).cpu()
    broken = [move for move in range(moves.count) if missing[move]]
    if not broken or moves.stencil.is_two_sided:
        return _Slopes(moves, slopes, any(bool(s.isnan().any()) for s in slopes), "on both sides")
    sides = "and on the other side of x as well"
    for move in broken:
        mirrored = moves.mirrored([move])
        if not _inside(point, mirrored):
            sides = "and the other side is out of bounds,"
            continue
        (again,) = Evaluations([Job(point, mirrored, job.rows_move)]).values()
        for slope, other in zip(slopes, quotients(mirrored, again, point.values, dims), strict=True):
            slope[move] = torch.where(slope[move].isnan(), other[0], slope[move])
    return _Slopes(moves, slopes, any(bool(s.isnan().any()) for s in slopes), sides)


def _inside(point: Point, moves: Moves) -> bool:
    step_size, block = point.record.estimator.step_size, moves.block
    parts = zip(block.positions, block.apart(moves.points(0, moves.count)), strict=True)
    return all(bool(((step_size.inside(part, at) == part) | part.isnan()).all()) for at, part in parts)


def _contracted(record: Record, held: _Held, slopes: Any, many: Sequence[Cotangents]) -> list[list[Tensor | None]]:
    """The gradient of every tensor that needs one, for each of the cotangents."""
    if len(many) > 1:
        slopes = [(group, list(some)) for group, some in slopes]
    return [_contracted_once(record, held, slopes, cotangents) for cotangents in many]


def _contracted_once(record: Record, held: _Held, slopes: Any, cotangents: Cotangents) -> list[Tensor | None]:
    point, tensors = held.point, record.tensors
    found: list[Tensor | None] = [None] * len(tensors)
    used = [(n, k) for n, k in enumerate(point.floats) if cotangents[k] is not None]
    first = record.first
    if used and first is not None:
        v = [cotangents[k].to(first.tensors[k].device) for _, k in used]  # type: ignore[union-attr]
        dims = None if point.out_dims is None else [point.out_dims[n] for n, _ in used]
        for group, some in slopes:
            total, moves = None, None
            for slope in some:
                outputs = [slope.outputs[n] for n, _ in used]
                if slope.broken:
                    _check_finite(record, slope, outputs, [k for _, k in used], v)
                moves = slope.moves
                rows = dims if group.rows_move else None
                total = moves.added(moves.contracted(outputs, v, rows, slope.broken), total)
            if moves is not None:
                gradient = moves.gradient(total)
                moves.learn(gradient)
                _put(found, tensors, group, gradient)
    for k, need in enumerate(record.needed):
        if need and found[k] is None:
            found[k] = torch.zeros_like(tensors[k])
    return found


def _put(found: list[Tensor | None], tensors: Sequence[Tensor], group: Group, gradient: Tensor) -> None:
    """The gradient of a block, in the shapes, precisions and on the devices of its tensors."""
    if gradient.shape[-1] == len(group.members):  # one column each: as many numbers as rows
        for k, piece in zip(group.members, gradient.unbind(-1), strict=True):
            tensor = tensors[k]
            found[k] = (piece if piece.shape == tensor.shape else piece.reshape(tensor.shape)).to(tensor)
        return
    layouts = [rows_of(tensors[k].shape, dim) for k, dim in zip(group.members, group.dims, strict=True)]
    pieces = gradient.split_with_sizes([layout.width for layout in layouts], -1)
    for k, layout, piece in zip(group.members, layouts, pieces, strict=True):
        found[k] = layout.join(piece).to(tensors[k])


def _check_finite(
    record: Record, slope: _Slopes, outputs: Sequence[Tensor], used: Sequence[int], cotangents: Sequence[Tensor]
) -> None:
    """Refuse slopes that could not be taken of outputs that count."""
    assert record.first is not None
    label = record.flat.label
    for k, cotangent in zip(used, cotangents, strict=True):
        y = record.first.tensors[k]
        wrong = ~torch.isfinite(y) & (cotangent != 0)
        if bool(wrong.any()):
            index = tuple(wrong.nonzero()[0].tolist())
            raise BlackboxError(
                f"{label} is {float(y[index])} at x itself (output {k}, element {index}): there is no difference to "
                "take; keep x inside the domain of the function, or mask such outputs before they are returned"
            )
    for out, cotangent in zip(outputs, cotangents, strict=True):
        lost = out.isnan() & (cotangent != 0)
        if bool(lost.any()):
            _refuse_infinite_inputs(record)
            moves = slope.moves
            text = moves.describe(int(lost.nonzero()[0, 0]), moves.stencil.evaluated[-1])
            raise BlackboxError(
                f"{label} is NaN or infinite {slope.sides} with {text}; choose a smaller step, or BoundedStep to keep "
                "x inside the domain"
            )


def _refuse_infinite_inputs(record: Record) -> None:
    for k in [k for k, need in enumerate(record.needed) if need]:
        x = record.tensors[k]
        wrong = ~torch.isfinite(x)
        if bool(wrong.any()):
            index = tuple(wrong.nonzero()[0].tolist())
            raise BlackboxError(
                f"{record.flat.name(k)} of {record.flat.label} is {float(x[index])} at element {index}, and no step "
                "leads away from there: there is no difference to take; mask such elements before the call, or detach "
                "them"
            )
