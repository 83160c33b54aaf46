"""What makes a difference wrong without an error, looked for at the point where a gradient is taken.

Values that are not finite, rows that were said to be independent and are not, outputs that do not move at all: each is
asked about with as few evaluations as can tell, and what was answered is remembered with the count. Pairs with
`gradient`, which asks, and with every estimator and evaluator.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ignite_tbptt.blackbox.errors import BlackboxError, UntrustedGradientWarning
from ignite_tbptt.blackbox.estimator import Estimator
from ignite_tbptt.blackbox.evaluation import Call, Evaluator, Points
from ignite_tbptt.blackbox.outputs import Outputs

__all__ = ["BasePoint"]

_T = TypeVar("_T")

# How often it is asked whether an input with a zero gradient matters at all, at one evaluation each time.
_SEARCHES = 3


class BasePoint:
    """The point of one backward, what came out there, and the cotangents of the outputs that were used.

    Args:
        call: the blackbox.
        estimator: how the gradient is estimated.
        evaluator: where the points are evaluated.
        names: what each tensor is called in messages.
        points: all arguments of the blackbox; only to be looked at.
        used: which outputs were used.
        cotangents: v for each of these.
    """

    def __init__(
        self,
        call: Call,
        estimator: Estimator,
        evaluator: Evaluator,
        names: Sequence[str],
        points: list[Tensor],
        used: list[int],
        cotangents: list[Tensor],
    ) -> None:
        self.call, self.estimator, self.evaluator, self.names = call, estimator, evaluator, names
        self.points, self.used, self.cotangents = points, used, cotangents
        self.first: Outputs = there(call.first)
        self.values = [self.first.tensors[k] for k in used]
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

    def probe_rows(self) -> None:
        """Verify once that rows are independent: give row 0 the values of row 1 and see who notices."""
        call, note = self.call, "rows are independent"
        in_dims = there(call.in_dims)
        rows = next(point.shape[dim] for point, dim in zip(self.points, in_dims, strict=True) if dim is not None)
        if rows < 2 or note in call.count.notes:
            return
        self.check_finite()
        moved = [point.clone() for point in self.points]
        for k, dim in enumerate(in_dims):
            if dim is not None:
                _give_row_0_another_value(moved[k], dim, self.eps)
        out = call([point.clone() for point in moved], "row 0 moved, to see whether the others notice")
        dims = there(call.out_dims)
        for k in self.used:
            if not _same_bits(out[k].movedim(dims[k], 0)[1:], self.first.tensors[k].movedim(dims[k], 0)[1:]):
                raise self._coupled()
        if self.evaluator.stacks and call.replay is None:
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
            f"in_dims={list(there(call.in_dims))} says that the rows of {call.label} are independent, but moving row "
            "0 changed the outputs of other rows (as BatchNorm in training does); leave in_dims out, at one evaluation "
            "for each element instead of each column, or uncouple the rows"
        )

    def _probe_stack(self, moved: list[Tensor], out: list[Tensor]) -> None:
        """Verify once that a batch of twice the size gives the same rows, up to rounding."""
        pair = [torch.stack([m, point]) for m, point in zip(moved, self.points, strict=True)]
        (stacked,) = self.evaluator.evaluate(self.call, [Points.of(pair, True, lambda index: "a stack of two")])
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
        call, name = self.call, self.names[k]
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
        x, estimator = self.points[k], self.estimator
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
        points[k] = self.estimator.step_size.inside(points[k] + h, position)
        out = self.call(points, f"all elements of {self.names[k]} moved")
        pairs = zip((out[used] for used in self.used), self.values, strict=True)
        changes = torch.cat([(now - was).abs().flatten() for now, was in pairs])
        changes = torch.nan_to_num(changes, nan=math.inf, posinf=math.inf)
        changes = changes[changes > 0]
        return float(changes.min()) if len(changes) else None


def _give_row_0_another_value(tensor: Tensor, dim: int, eps: float) -> None:
    rows = tensor.movedim(dim, 0)
    other = rows[1].clone()
    if tensor.is_floating_point():
        step = other.abs().clamp(min=1.0) * eps**0.5
        other = torch.where(other == rows[0], other + step, other)
    rows[0] = other


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def there(value: _T | None) -> _T:
    """A value that is known to be there."""
    assert value is not None
    return value
