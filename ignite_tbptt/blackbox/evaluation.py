"""Where the moved points are evaluated, and what one evaluation is.

The idea: an evaluator is a map. It is given a call and portions of points, and yields the outputs in the same order; in
what order, where and how many at once it calls is its own affair. `SerialEvaluation` calls once a point;
`StackedEvaluation` puts the points of a portion on top of one another along the batch axis and calls once. Pairs with
every estimator, which neither knows nor cares.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.outputs import Outputs, check_same_kind
from ignite_tbptt.blackbox.random_streams import RandomStreams

Where = str | tuple[Callable[[int], str], int]
"""Which evaluation: a text, or a function and the index that it is to be asked for."""

__all__ = ["Call", "EvaluationCount", "Evaluator", "Points", "SerialEvaluation", "StackedEvaluation"]


@dataclass
class EvaluationCount:
    """What a blackbox has cost so far, and what was already verified or said about it.

    Attributes:
        nfev: evaluations spent on gradients; the forward call is not one of them.
        seconds: time spent in those evaluations.
        gradients: gradients estimated.
    """

    nfev: int = 0
    seconds: float = 0.0
    gradients: int = 0
    notes: set[str] = field(default_factory=set, repr=False)


class Points(NamedTuple):
    """A portion of points, every tensor with a leading axis over them and memory of its own.

    Attributes:
        tensors: all arguments of the blackbox at these points, each (count, *shape).
        rows_move: only tensors with independent rows differ between the points, so that they may be stacked.
        describe: says which evaluation the one with the given index is.
    """

    tensors: list[Tensor]
    rows_move: bool
    describe: Callable[[int], str]


class Call:
    """One evaluation of a blackbox: timed, counted, with the random numbers of the first, and checked against it.

    Args:
        fn: the blackbox, called with one tensor for each argument.
        label: what to call it in messages.
        count: where evaluations and seconds are counted.
        in_dims: the batch axis of each argument where rows are independent.
        out_dims: the batch axis of each output tensor, or None.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        label: str,
        count: EvaluationCount,
        in_dims: Sequence[int | None] | None = None,
        out_dims: Sequence[int] | None = None,
    ) -> None:
        self.fn = fn
        self.label = label
        self.count = count
        self.in_dims = in_dims
        self.out_dims = out_dims
        self._first: Outputs | None = None
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None
        self.replay: RandomStreams | None = None

    def __call__(self, tensors: Sequence[Tensor], where: Where, copies: int = 1) -> list[Tensor]:
        """Evaluate at tensors that the blackbox may keep; returns the numbers among the outputs. Under no_grad.

        Args:
            tensors: the arguments of the blackbox.
            where: says which evaluation this is, should it fail; or a function that does, with its argument.
            copies: how many points are stacked in it.

        Raises:
            BlackboxError: the blackbox raised, or returned another structure, shape or dtype than before.
        """
        if self.replay is not None:
            self.replay.restore()
        count = self.count
        count.nfev += 1
        start = time.perf_counter()
        try:
            value = self.fn(*tensors)
        except Exception as error:
            raise BlackboxError(
                f"{self.label} raised {type(error).__name__}: {error}\n"
                f"in evaluation {count.nfev}, {_text(where)}; it must bear such a move, so choose a smaller step, "
                "or BoundedStep to keep x inside its domain"
            ) from error
        finally:
            count.seconds += time.perf_counter() - start
        usual = copies == 1 and isinstance(value, Tensor)
        if usual and value.shape == self._shape and value.dtype == self._dtype:
            return [value.clone()]
        outputs = Outputs.of(value, self.label)
        remedy = "return the same structure for every input"
        if copies > 1:
            remedy = f"it got {copies} batches in one; if it needs the size it was written for, use SerialEvaluation()"
        if self._first is None:
            self.first = outputs
        else:
            check_same_kind(self._first, outputs, self.label, remedy, lambda: _text(where), copies, self.out_dims)
        return outputs.tensors

    @property
    def first(self) -> Outputs | None:
        """What came out at x; every later output has to be of its kind."""
        return self._first

    @first.setter
    def first(self, outputs: Outputs) -> None:
        self._first = outputs
        if outputs.is_tensor:
            self._shape, self._dtype = outputs.tensors[0].shape, outputs.tensors[0].dtype


class Evaluator(Protocol):
    """Evaluates points; a frozen dataclass of what it needs to know."""

    @property
    def stacks(self) -> bool:
        """Whether one call may get the rows of several points, which is verified before it is relied on."""
        ...

    def portion(self, point_bytes: int) -> int:
        """How many points are best prepared at a time, one of them being so large."""
        ...

    def evaluate(self, call: Call, portions: Iterable[Points]) -> Iterator[list[Tensor]]:
        """Yield, for each portion and in order, each output tensor with a leading axis over the points."""
        ...


@dataclass(frozen=True)
class SerialEvaluation:
    """One call a point, one after the other, in the caller's thread.

    Args:
        portion_bytes: points are prepared together up to this size.

    Raises:
        ValueError: a size below 1.
    """

    portion_bytes: int = 2**20
    stacks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_bytes("portion_bytes", self.portion_bytes)

    def portion(self, point_bytes: int) -> int:
        """See `Evaluator.portion`."""
        return max(1, min(256, self.portion_bytes // max(1, point_bytes)))

    def evaluate(self, call: Call, portions: Iterable[Points]) -> Iterator[list[Tensor]]:
        """See `Evaluator.evaluate`."""
        for portion in portions:
            yield _one_by_one(call, portion)


# Of fewer points in one call little is gained, and what a function keeps between its own steps leaves the cache.
_WORTH_STACKING = 4


@dataclass(frozen=True)
class StackedEvaluation:
    """Several points in one call, along the batch axis: for functions of independent rows, declared with in_dims.

    Evaluated one after the other are points that move an argument shared by all rows, points so large that fewer than 4
    make a stack, and a blackbox that draws random numbers, because stacked rows could not share them.

    Args:
        stack_bytes: a stack is no larger than this in inputs or in outputs. Past the size of the cache stacking loses
            more than it gains.

    Raises:
        ValueError: a size below 1; when used, that no in_dims were declared.
    """

    stack_bytes: int = 2**19
    stacks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_bytes("stack_bytes", self.stack_bytes)

    def portion(self, point_bytes: int) -> int:
        """See `Evaluator.portion`."""
        fitting = self.stack_bytes // max(1, point_bytes)
        return fitting if fitting >= _WORTH_STACKING else SerialEvaluation().portion(point_bytes)

    def evaluate(self, call: Call, portions: Iterable[Points]) -> Iterator[list[Tensor]]:
        """See `Evaluator.evaluate`."""
        if call.in_dims is None or call.out_dims is None:
            raise ValueError(
                f"StackedEvaluation needs to know which axis of the arguments of {call.label} is the batch: pass "
                "in_dims, as in torch.vmap, or use SerialEvaluation()"
            )
        for portion in portions:
            count = len(portion.tensors[0])
            size = max(_bytes(portion.tensors), count * _bytes(call.first.tensors if call.first else ()))
            if count == 1 or size > self.stack_bytes or not portion.rows_move or call.replay is not None:
                yield _one_by_one(call, portion)
                continue
            stacked = [
                tensor[0] if dim is None else _stacked(tensor, dim)
                for tensor, dim in zip(portion.tensors, call.in_dims, strict=True)
            ]
            outputs = call(stacked, (_describe_stack(portion), count), copies=count)
            yield [_unstacked(tensor, dim, count) for tensor, dim in zip(outputs, call.out_dims, strict=True)]


def _describe_stack(portion: Points) -> Callable[[int], str]:
    return lambda count: f"{count} points stacked, the first {portion.describe(0)}"


def _one_by_one(call: Call, portion: Points) -> list[Tensor]:
    points = zip(*(tensor.unbind(0) for tensor in portion.tensors), strict=True)
    outputs = [call(point, (portion.describe, index)) for index, point in enumerate(points)]
    return [torch.stack(same) for same in zip(*outputs, strict=True)]


def _stacked(tensor: Tensor, dim: int) -> Tensor:
    """(count, ..., B, ...) -> (..., count * B, ...), point after point."""
    shape = list(tensor.shape[1:])
    shape[dim] *= len(tensor)
    return tensor.movedim(0, dim).reshape(shape)


def _unstacked(tensor: Tensor, dim: int, count: int) -> Tensor:
    """(..., count * B, ...) -> (count, ..., B, ...)."""
    apart: Tensor = tensor.unflatten(dim, (count, tensor.shape[dim] // count))
    return apart.movedim(dim, 0)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _text(where: Where) -> str:
    return where if isinstance(where, str) else where[0](where[1])


def _check_bytes(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}: a portion holds at least one point")
