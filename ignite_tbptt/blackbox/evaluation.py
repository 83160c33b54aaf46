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
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.outputs import Outputs, check_same_kind, copied
from ignite_tbptt.random_streams import RandomStreams

Where = str | tuple[Callable[[int], str], int]
"""Which evaluation: a text, or a function and the index that it is to be asked for."""

__all__ = ["Call", "EvaluationCount", "Evaluator", "Points", "SerialEvaluation", "StackedEvaluation", "size_of"]


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


@dataclass(frozen=True)
class Points:
    """A portion of points, made a few at a time: what was just written is still in cache when it is read.

    Attributes:
        count: how many they are.
        size: bytes of one point.
        rows_move: only tensors with independent rows differ between the points, so that they may be stacked.
        chunks: given about how many to make at a time, yields all arguments of the blackbox at the next points, each
            (some, *shape) and in memory of its own.
        describe: says which evaluation the one with the given index is.
    """

    count: int
    size: int
    rows_move: bool
    chunks: Callable[[int], Iterator[list[Tensor]]]
    describe: Callable[[int], str]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], rows_move: bool, describe: Callable[[int], str]) -> Points:
        """Points that are there already: all arguments, each (count, *shape)."""

        def chunks(some: int) -> Iterator[list[Tensor]]:
            parts = zip(*(tensor.split(max(1, some)) for tensor in tensors), strict=True)
            return (list(part) for part in parts)

        count = len(tensors[0])
        return cls(count, size_of(tensors) // max(1, count), rows_move, chunks, describe)


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
        self._usual: tuple[Any, ...] = ()
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
        kind = type(value)
        if copies == 1 and kind in (Tensor, np.ndarray) and (kind, value.shape, value.dtype) == self._usual:
            return [copied(value)]
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
    def first(self, outputs: Outputs | None) -> None:
        self._first, self._usual = outputs, ()
        if outputs is not None and outputs.is_leaf:
            # nearly every later value is of this kind, and needs no closer look
            value = outputs.tensors[0].numpy() if outputs.foreign[0] else outputs.tensors[0]
            self._usual = type(value), value.shape, value.dtype


class Evaluator(Protocol):
    """Evaluates points; a frozen dataclass of what it needs to know."""

    @property
    def stacks(self) -> bool:
        """Whether one call may get the rows of several points, which is verified before it is relied on."""
        ...

    def evaluate(self, call: Call, portions: Iterable[Points]) -> Iterator[list[Tensor]]:
        """Yield, for each portion and in order, each output tensor with a leading axis over the points."""
        ...


@dataclass(frozen=True)
class SerialEvaluation:
    """One call a point, one after the other, in the caller's thread.

    Args:
        chunk_bytes: points are made together up to this size, which should fit into the cache.

    Raises:
        ValueError: a size below 1.
    """

    chunk_bytes: int = 2**20
    stacks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_bytes("chunk_bytes", self.chunk_bytes)

    def evaluate(self, call: Call, portions: Iterable[Points]) -> Iterator[list[Tensor]]:
        """See `Evaluator.evaluate`."""
        for portion in portions:
            yield _one_by_one(call, portion, self.chunk_bytes)


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

    def evaluate(self, call: Call, portions: Iterable[Points]) -> Iterator[list[Tensor]]:
        """See `Evaluator.evaluate`."""
        if call.in_dims is None or call.out_dims is None:
            raise ValueError(
                f"StackedEvaluation needs to know which axis of the arguments of {call.label} is the batch: pass "
                "in_dims, as in torch.vmap, or use SerialEvaluation()"
            )
        for portion in portions:
            size = max(portion.size, size_of(call.first.tensors if call.first else ()))
            fitting = min(portion.count, self.stack_bytes // max(1, size))
            if fitting < min(portion.count, _WORTH_STACKING) or not portion.rows_move or call.replay is not None:
                yield _one_by_one(call, portion, SerialEvaluation.chunk_bytes)
            else:
                yield _stacks(call, portion, fitting, call.in_dims, call.out_dims)


def _stacks(
    call: Call, portion: Points, fitting: int, in_dims: Sequence[int | None], out_dims: Sequence[int]
) -> list[Tensor]:
    """Evaluate so many points in each call, of which only the last may get fewer."""
    done, found = 0, []
    for tensors in portion.chunks(fitting):
        count = len(tensors[0])
        stacked = [
            tensor[0] if dim is None else _stacked(tensor, dim) for tensor, dim in zip(tensors, in_dims, strict=True)
        ]
        outputs = call(stacked, (_describe_stack(portion, count), done), copies=count)
        found.append([_unstacked(tensor, dim, count) for tensor, dim in zip(outputs, out_dims, strict=True)])
        done += count
    return found[0] if len(found) == 1 else [torch.cat(same) for same in zip(*found, strict=True)]


def _describe_stack(portion: Points, count: int) -> Callable[[int], str]:
    return lambda first: f"{count} points stacked, the first {portion.describe(first)}"


def _one_by_one(call: Call, portion: Points, chunk_bytes: int) -> list[Tensor]:
    outputs: list[list[Tensor]] = []
    for tensors in portion.chunks(max(1, chunk_bytes // max(1, portion.size))):
        points = zip(*(tensor.unbind(0) for tensor in tensors), strict=True)
        outputs += [call(point, (portion.describe, index)) for index, point in enumerate(points, len(outputs))]
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


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _text(where: Where) -> str:
    return where if isinstance(where, str) else where[0](where[1])


def _check_bytes(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}: a portion holds at least one point")
