"""What makes a difference wrong without an error, looked for with as few evaluations as can tell.

A function that gives other outputs for the same inputs, rows that were said to be independent and are not, stacks that
give other rows, outputs that do not move at all: each is asked about at the first gradient and again at gradients 2,
4, 8, ... Pairs with `facts`, which remember the answers, and with `round`, which asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ignite_tbptt.blackbox.coordinates import ColoredMoves, Coordinates
from ignite_tbptt.blackbox.errors import BlackboxError, LostEvaluationError
from ignite_tbptt.blackbox.flat import Outputs, same_bits
from ignite_tbptt.blackbox.point import Point, _stacked, _unstacked, evaluate_all, evaluate_at, key_of
from ignite_tbptt.blackbox.record import Record

__all__ = ["verify", "verify_pattern"]

# A slope that differs by less than this share from what a pattern foretells is truncation; so many of those that differ
# most are looked at. Other inputs refute a pattern where they make up this part of a difference.
_PATTERN_TOLERANCE, _PATTERN_ROWS, _PATTERN_PART = 1e-4, 4, 1e-3

# A function that is noisy by nature is evaluated so often at x. Rows notice where they change by so many times more
# than it scatters; that they do not says something where their own moves change them by so many times more.
_REPEATED, _SCATTERED, _SHOWS = 4, 3, 1000


def verify(record: Record, gradients: int) -> Point | None:
    """Verify what is due at so many gradients more; returns x of the call where anything was.

    Raises:
        BlackboxError: the function gives other outputs for the same inputs, or its rows are not independent.
    """
    key = key_of(record)
    first = record.facts.is_first(key)
    if not record.facts.due(key, gradients):
        return None
    try:
        point = Point([record])
        try:
            _ask(point, first)
        except LostEvaluationError:
            record.facts.forget(key)  # it is asked again at the next gradient
    except BaseException:
        record.facts.forget(key)
        raise
    return point


def _ask(point: Point, first: bool) -> None:
    record = point.record
    if record.options.repeatable and point.floats:
        _repeat(point)
    if record.flat.in_dims is not None:
        _rows(point)
    elif first and point.floats:
        _look_for_rows(point)


def _repeat(point: Point) -> None:
    """Evaluate at x once more."""
    record = point.record
    again = evaluate_at(record, [x.clone() for x in point.x], "at x once more", 1, point)
    pairs = [(again.tensors[k], point.first.tensors[k]) for k in point.floats]
    if all(same_bits(now, was) for now, was in pairs):
        return
    if record.by_hook and all(_near(point, now, was) for now, was in pairs):
        # compiled code adds up in another order than the function itself
        point.first = record.first = again
        again = evaluate_at(record, [x.clone() for x in point.x], "at x once more", 1, point)
    for k in point.floats:
        if same_bits(again.tensors[k], point.first.tensors[k]):
            continue
        shared = [name for state in record.flat.states for name in state.shared]
        kept = f" (attributes that could not be copied: {', '.join(shared)})" if shared else ""
        off = float((again.tensors[k] - point.first.tensors[k]).abs().max())
        raise BlackboxError(
            f"{point.flat.label} gives other outputs for the same inputs, by {off:.3g}: no difference of two can be "
            "trusted. If it keeps a state or a generator of its own, pass the state as an argument and seed the "
            "generator at every call, or draw from the global streams of torch, numpy or random, which are replayed"
            f"{kept}; if it is noisy by nature, say repeatable=False and choose a step that is wide enough for the "
            "noise"
        )


def _rows(point: Point) -> None:
    """Move row 0 alone, and all rows but row 0, and see who notices."""
    record = point.record
    in_dims = record.flat.in_dims or ()
    rows = next(x.shape[dim] for x, dim in zip(point.x, in_dims, strict=True) if dim is not None)
    key = key_of(record)
    serial = not hasattr(record.options.executor, "stack_bytes")
    if rows < 2:
        record.facts.forget(key)
        return
    moved, one = _with_rows_moved(point, "row 0", slice(0, 1)), None
    scatter = {} if record.options.repeatable else _scatter(point)
    for what, which, points in (
        ("row 0 moved", slice(1, None), moved),
        ("all rows but row 0 moved", slice(0, 1), _with_rows_moved(point, "the others", slice(1, None))),
    ):
        out = evaluate_at(record, [x.clone() for x in points], f"{what}, to see whether others notice", 1, point)
        one = one or out
        for k, dim in zip(point.floats, point.out_dims or (), strict=True):
            now, was = (tensors[k].movedim(dim, 0)[which] for tensors in (out.tensors, point.first.tensors))
            if not same_bits(now, was):
                if record.options.repeatable:
                    _repeat(point)
                elif _are_near(now, was, _SCATTERED * scatter[k]):
                    _refuse_lost_in_noise(point, scatter[k], out.tensors[k] - point.first.tensors[k])
                    continue
                raise BlackboxError(
                    f"in_dims={list(in_dims)} says that the rows of {point.flat.label} are independent, but moving "
                    f"row 0 changed the outputs of other rows, or theirs that of row 0 (as BatchNorm in training "
                    "does); leave in_dims out, at one evaluation for each element instead of each column, or uncouple "
                    "the rows"
                )
    if not serial and not record.draws and one is not None:
        record.facts.stackable[key] = _stack(point, moved, one)


def _refuse_lost_in_noise(point: Point, scatter: float, change: Tensor) -> None:
    """Refuse rows of which noise may hide that they notice one another."""
    moved = float(change.abs().nan_to_num(0, 0, 0).max())
    if moved < _SHOWS * scatter:
        raise BlackboxError(
            f"in_dims says that the rows of {point.flat.label} are independent, and its noise hides whether they are: "
            f"outputs scatter by {scatter:.2g}, and change by {moved:.2g} when their own row is moved. Leave in_dims "
            "out, or draw the noise from the global streams of torch, numpy or random, which are replayed, and leave "
            "repeatable=False out"
        )


def _scatter(point: Point) -> dict[int, float]:
    """How far outputs of a function that is noisy by nature lie apart at x."""
    again = [[x.clone() for x in point.x] for _ in range(_REPEATED)]
    found = [each.tensors for each in evaluate_all(point, again, "at x once more, to see its noise")]
    values = {k: torch.stack([point.first.tensors[k], *(each[k] for each in found)]) for k in point.floats}
    return {k: float((same.amax(0) - same.amin(0)).nan_to_num(0, 0, 0).max()) for k, same in values.items()}


def _are_near(one: Tensor, other: Tensor, distance: float) -> bool:
    same = (one == other) | (one.isnan() & other.isnan())
    return bool((same | ((one - other).abs() <= distance)).all())


def verify_pattern(point: Point, colored: Sequence[tuple[ColoredMoves, Tensor]]) -> None:
    """Compare the slope of every output along one random direction with what its colours foretell.

    Where these differ most, all inputs are moved but those that the pattern names, and an output that notices refutes
    it. A function that is said to be noisy notices by itself and is not asked.

    Args:
        point: x of the call.
        colored: all colours, and the slopes of the output, (colours, *shape).

    Raises:
        BlackboxError: an output depends on more inputs than the pattern says.
    """
    record, moves = point.record, colored[0][0]
    coloring, block, steps, step_size = moves.coloring, moves.block, moves.steps.cpu(), record.estimator.step_size
    if not record.options.repeatable or len(point.values) != 1 or point.values[0].numel() != coloring.owners.shape[1]:
        return
    generator = torch.Generator().manual_seed(record.draw % 2**63)
    random = _spread(coloring.colors, generator)
    x = block.x[0].cpu()

    def displaced(along: Tensor) -> list[Tensor]:
        points = [x.clone() for x in point.x]
        parts = block.apart((x + along * steps).to(block.x).unsqueeze(0))
        for k, position, part in zip(block.members, block.positions, parts, strict=True):
            points[k] = step_size.inside(part.clone(), position)
        return points

    def outputs(places: Sequence[list[Tensor]]) -> list[Tensor]:
        found = evaluate_all(point, places, "all inputs moved, to see whether the pattern holds")
        return [each.tensors[point.floats[0]].flatten().double().cpu() for each in found]

    places = [displaced(random), displaced(-random)]
    ahead, behind = (block.together([points[k] for k in block.members])[0].double().cpu() for points in places)
    along = torch.cat([(ahead - behind) / steps, torch.zeros(1, dtype=torch.float64)])
    shares = torch.cat([slopes.flatten(1).cpu() * along[coloring.owners[some.numbers]] for some, slopes in colored])
    first = point.values[0].flatten().double().cpu()
    over, under = outputs(places)
    missed = (over - under - shares.sum(0)).abs()
    rounding = 64 * point.eps * float(first.abs().nan_to_num(0, 0, 0).amax())
    usual = _PATTERN_TOLERANCE * shares.abs().sum(0) + rounding
    doubt = (missed / usual).nan_to_num(0, 0, torch.finfo(torch.float64).max)
    for row in doubt.topk(min(_PATTERN_ROWS, len(doubt))).indices.tolist():
        if not doubt[row] > 1:
            return
        # both ways, since a bound may be in one; and not equally far, since what others add may cancel in one
        ways = [random.clone(), -random.sign() * _spread(coloring.colors, generator).abs()]
        for way in ways:
            way[coloring.inputs_of(row)] = 0
        changes = [abs(float(value[row] - first[row])) for value in outputs([displaced(way) for way in ways])]
        if max(changes) > max(float(missed[row]) * _PATTERN_PART, rounding):
            raise BlackboxError(
                f"sparsity says that output {row} of {point.flat.label} depends on the inputs "
                f"{coloring.inputs_of(row)[:8]} alone, but it changed when others were moved; "
                "detect_sparsity(fn, *inputs) finds the pattern, or leave sparsity out"
            )


def _spread(colors: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction, the inputs of each colour apart from one another.

    What an input adds to an output that it should not depend on is taken for the slope of the one input of its colour
    that the output does depend on. It shows by as much as the two move differently: each has an interval of its own,
    in half of which it lies. Where it lies there is random, since at equal distances x[0] - 2 x[1] + x[2] may cancel.
    """
    shuffled = torch.randperm(len(colors), generator=generator)
    order = shuffled[colors[shuffled].argsort(stable=True)]
    counts = colors.bincount()
    place = torch.arange(len(colors)) - (counts.cumsum(0) - counts)[colors[order]]
    along = torch.empty(len(colors), dtype=torch.float64)
    within = torch.rand(len(colors), generator=generator, dtype=torch.float64) / 2
    along[order] = (place + within) / counts[colors[order]] * 2 - 1
    return (along + along.sign()) / 2  # none stays where it is


def _look_for_rows(point: Point) -> None:
    """Note what in_dims=0 would save, where moving row 0 changes no other row."""
    record = point.record
    parameters = {k for k, _ in enumerate(point.x) if point.flat.name(k).startswith("parameter ")}
    inputs = [k for k, x in enumerate(point.x) if k not in parameters and x.is_floating_point() and x.dim()]
    sizes = {point.x[k].shape[0] for k in inputs} | {value.shape[0] if value.dim() else 0 for value in point.values}
    moved = sum(point.x[k].numel() for k in inputs if record.needed[k])
    rows = sizes.pop() if len(sizes) == 1 else 0
    shared = sum(point.x[k].numel() for k in parameters if record.needed[k])
    if rows < 2 or not isinstance(record.asked.directions, Coordinates) or moved <= shared / 2:
        return
    points = [x.clone() for x in point.x]
    for k in inputs:
        points[k][0] += points[k][0].abs().clamp(min=1.0) * point.eps**0.5
        points[k] = record.asked.step_size.inside(points[k], sum(record.needed[:k]))
    try:
        out = evaluate_at(record, points, "row 0 moved, to see whether others notice", 1, point).tensors
    except BlackboxError:
        return
    if all(same_bits(out[k][1:], point.first.tensors[k][1:]) for k in point.floats):
        less = (moved + shared) / (moved / rows + shared)
        record.count.hint = (
            f"its {rows} rows look independent: in_dims=0 would take 1/{less:.0f} of the evaluations, several of them "
            "in one call"
        )


def _with_rows_moved(point: Point, what: str, which: slice) -> list[Tensor]:
    """The inputs with other values in some rows, inside the bounds: those of other rows, moved a little."""
    moved = [x.clone() for x in point.x]
    step_size = point.record.asked.step_size
    position = -1
    for k, (dim, need) in enumerate(zip(point.flat.in_dims or (), point.record.needed, strict=True)):
        position += need
        if dim is None:
            continue
        rows, values = moved[k].movedim(dim, 0), point.x[k].movedim(dim, 0)
        others = values.roll(-1, 0)[which]
        if moved[k].is_floating_point():
            others = others + others.abs().clamp(min=1.0) * point.eps**0.5
        rows[which] = others
        if need:
            # from the other side where a bound is in the way
            inside = step_size.inside(moved[k], position)
            moved[k] = inside.clone() if inside is moved[k] else inside
    return moved


def _stack(point: Point, moved: Sequence[Tensor], out: Outputs) -> bool:
    """Whether a batch of twice the size gives the same rows, up to rounding."""
    record = point.record
    pair = [
        x.clone() if dim is None else _stacked(torch.stack([m, x]), dim)
        for m, x, dim in zip(moved, point.x, point.flat.in_dims or (), strict=True)
    ]
    try:
        both = evaluate_at(record, pair, "a stack of two points", 2, point).tensors
        for k, dim in zip(point.floats, point.out_dims or (), strict=True):
            want = torch.stack([out.tensors[k], point.first.tensors[k]])
            if not _near(point, _unstacked(both[k], dim, 2), want):
                raise BlackboxError(
                    f"{point.flat.label} gives other rows in a batch of twice the size, so that its points cannot be "
                    "stacked; use SerialEvaluation()"
                )
    except BlackboxError:
        if record.options.must_stack:
            raise
        return False
    return True


def _near(point: Point, found: Tensor, wanted: Tensor) -> bool:
    """Whether two outputs are the same up to what rounding may do."""
    scale = float(wanted.abs().nan_to_num(0, 0, 0).amax())
    return torch.allclose(found, wanted, rtol=0, atol=scale * point.eps**0.5, equal_nan=True)
