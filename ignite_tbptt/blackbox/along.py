"""The outputs of a blackbox along one line through x, as a function of one number.

The idea: whoever looks for jumps or measures a step moves one element, or one column of independent rows, and adds up
the outputs with some weights. Values are kept, and those that are asked for together are evaluated together, at the
same time where the executor can. Pairs with `coarse` and `measuring`, which ask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.point import Point, checked
from ignite_tbptt.blackbox.task import Task, run

__all__ = ["Along"]


class Along:
    """The weighted outputs at a distance from x; NaN out of bounds, and where the function raises.

    Args:
        point: x of one call.
        k: which input is moved.
        moves: which of its elements, boolean of its shape.
        weigh: the sum of the outputs.
        why: what the evaluations are for, in messages.
    """

    def __init__(
        self, point: Point, k: int, moves: Tensor, weigh: Callable[[Sequence[Tensor]], float], why: str
    ) -> None:
        self._point, self._k, self._moves, self._weigh, self._why = point, k, moves, weigh, why
        self._values: dict[float, float] = {0.0: weigh(point.first.tensors)}

    def __call__(self, distance: float) -> float:
        """The value at one distance."""
        return self.at([distance])[0]

    def at(self, distances: Sequence[float]) -> list[float]:
        """The values at several distances."""
        values, record = self._values, self._point.record
        places = {t: self._moved(t) for t in dict.fromkeys(distances) if t not in values}
        streams = record.streams if record.draws else None
        inside = {t: points for t, points in places.items() if points is not None}
        tasks = (Task(record.flat, points, streams) for points in inside.values())
        values.update(dict.fromkeys(places, math.nan))
        for t, result in zip(inside, record.options.executor(run, tasks), strict=True):
            try:
                outputs = record.count.taken(result, record.flat.label, lambda: self._why, 1, True)
                values[t] = self._weigh(checked(self._point, outputs, self._why).tensors)
            except BlackboxError:
                values[t] = math.nan  # outside of the domain, as long steps may be
        return [values[t] for t in distances]

    def _moved(self, distance: float) -> list[Tensor] | None:
        """The inputs at a distance, None where bounds are in the way."""
        record, k, x = self._point.record, self._k, self._point.x
        points = [tensor.clone() for tensor in x]
        points[k] = torch.where(self._moves, points[k] + distance, points[k])
        inside = record.estimator.step_size.inside(points[k], sum(record.needed[:k]))
        # an element that is NaN stays NaN, wherever the bounds are
        return points if bool(((inside == points[k]) | points[k].isnan() | ~self._moves).all()) else None
