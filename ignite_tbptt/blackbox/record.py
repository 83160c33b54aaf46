"""One forward call of a blackbox, and what its backward needs.

The idea: everything that can be known at the call is settled here, in which precision the function is evaluated, where
its rows are, what its outputs become for the caller, and whether it drew random numbers. A record keeps aliases of its
inputs with their versions, because the backward of another call may have to read them. Pairs with `round`, which
evaluates the records that a backward reaches, and with `node`, which ties both to autograd.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ignite_tbptt.blackbox.estimator import Estimator
from ignite_tbptt.blackbox.facts import Facts
from ignite_tbptt.blackbox.flat import FlatCall, Outputs
from ignite_tbptt.blackbox.options import Options
from ignite_tbptt.blackbox.task import ALONE, EvaluationCount, Result, Task
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["Record", "autocast_off"]


class _Inputs(NamedTuple):
    """What calls have in common whose tensors are of the same kinds.

    Attributes:
        kinds: of the tensors, None where more than these counts.
        in_dims: the batch axis of each, where rows are independent.
        needed: whether each needs a gradient.
        casts: whether one of them is evaluated in another precision, or elsewhere.
    """

    kinds: Any
    in_dims: tuple[int | None, ...] | None
    needed: list[bool]
    casts: bool


class _Outputs(NamedTuple):
    """What the outputs of such calls have in common.

    Attributes:
        kinds: of the tensors that came in and out, None where more than these counts.
        out_dims: the batch axis of each output, where rows are independent.
        given: the device and precision of each output as the caller gets it.
        casts: whether these are not those in which it came.
        integers: which outputs cannot be differentiated.
    """

    kinds: Any
    out_dims: list[int] | None
    given: list[tuple[torch.device, torch.dtype]]
    casts: list[bool]
    integers: list[int]


class Record:
    """One forward call.

    Args:
        flat: the call as a function of a flat list of tensors.
        options: what stays the same from call to call.
        count: where evaluations are counted.
        facts: what was verified of this blackbox.
    """

    outputs: Outputs  # as the forward gave them
    first: Outputs | None = None  # in the precision of the evaluations
    streams: RandomStreams | None = None
    differentiable = draws = False
    by_hook = False  # the forward was not one of the evaluations
    number = times = 0
    held: Any = None  # slopes of outputs that an earlier backward has left here

    def __init__(self, flat: FlatCall, options: Options, count: EvaluationCount, facts: Facts) -> None:
        self.flat, self.options, self.count, self.facts = flat, options, count, facts

    def again(self) -> Record:
        """A record for another entry of a vmapped call."""
        record = Record(self.flat, self.options, self.count, self.facts)
        record.differentiable = self.differentiable
        return record

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Evaluate at x; returns the numbers in the output."""
        self._settle(tensors)
        if not self.differentiable:
            return self._finish(self._evaluated(tensors)[0], tensors)
        with ALONE:
            streams = RandomStreams.latest()
            outputs, result = self._evaluated(tensors)
            self._drew(streams, result.drew_since(streams))
        self.first = outputs
        return self._finish(outputs, tensors)

    def known(self, value: Any, streams: RandomStreams, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Take outputs that were computed already, and the random streams from before they were."""
        self._settle(tensors)
        self.by_hook = True
        outputs = Outputs.of(value, self.flat.label)
        self._drew(streams, streams.have_moved())
        if not self._casts:
            self.first = outputs
        return self._finish(outputs, tensors)

    @property
    def inputs_key(self) -> Any:
        """What facts about the inputs that need a gradient depend on."""
        return self.flat.in_dims, self.flat.flags, tuple(self.needed)

    @property
    def draw(self) -> int:
        """What the random directions of the next gradient are drawn from."""
        return self.facts.draw(self.number, self.times, self.options.rank)

    @functools.cached_property
    def asked(self) -> Estimator:
        """The estimator that was asked for, or that "auto" stands for with these inputs."""
        found = self.options.estimator.suited(self.flat.label, lambda: self.columns, self.facts.told)
        self.facts.suited = found
        return found

    @property
    def columns(self) -> int:
        """How many elements are differentiated, each column of independent rows counted once."""
        dims = self.flat.in_dims or [None] * len(self.tensors)
        return sum(
            tensor.numel() // (1 if dim is None else max(1, tensor.shape[dim]))
            for tensor, need, dim in zip(self.tensors, self.needed, dims, strict=True)
            if need
        )

    @property
    def estimator(self) -> Estimator:
        """The estimator, with steps that were measured where they were to be."""
        found = self.measured_steps
        return self.asked if found is None else replace(self.asked, step_size=found)

    @property
    def measured_steps(self) -> Any:
        """The steps that were measured for these inputs, None where none were."""
        measured = self.facts.step_sizes
        return measured.get(self.inputs_key) if measured else None

    @property
    def held_bytes(self) -> int:
        """Bytes of the slopes of all outputs."""
        return self.columns * 8 * sum(tensor.numel() for tensor in self.outputs.tensors)

    def _drew(self, streams: RandomStreams, draws: bool) -> None:
        """Hold the streams as they were before an evaluation, and whether it drew from them."""
        self.streams, self.draws = streams, draws

    def _settle(self, tensors: Sequence[Tensor]) -> None:
        """Settle what depends on the kinds of the tensors alone, as it was in the last call of the same kinds."""
        facts, flat, options = self.facts, self.flat, self.options
        # what is evaluated with autocast off differs from what the module itself computed under it
        self.autocast = _any_autocast(tensors)
        kinds, known = flat.kinds(tensors, self.autocast), facts.inputs
        if known is None or kinds is None or known.kinds != kinds:
            self._refuse_complex(tensors)
            dtype, device = options.dtype, options.device
            known = facts.inputs = _Inputs(
                kinds,
                None if options.in_dims is None else flat.bound(options.in_dims, tensors),
                [tensor.requires_grad for tensor in tensors],
                self.autocast
                or (dtype is not None and any(tensor.dtype != dtype for tensor in tensors))
                or (device is not None and any(tensor.device.type != device for tensor in tensors)),
            )
        self.kinds, flat.in_dims, self.needed, self._casts = known

    def _refuse_complex(self, tensors: Sequence[Tensor]) -> None:
        for k, tensor in enumerate(tensors):
            if tensor.is_complex() and tensor.requires_grad:
                raise TypeError(
                    f"{self.flat.name(k)} of {self.flat.label} is complex and requires grad: steps are taken along "
                    "real numbers; pass torch.view_as_real(input) and put the parts together inside the function"
                )

    def _evaluated(self, tensors: Sequence[Tensor]) -> tuple[Outputs, Result]:
        with autocast_off(tensors) if self.autocast else contextlib.nullcontext():
            result = self.options.first(Task(self.flat, self.points(tensors), first=True))
        if result.error is not None:
            raise result.error
        assert result.outputs is not None
        return result.outputs, result

    def points(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors as the function gets them, in memory of their own; made where no gradients are recorded."""
        if not self._casts:
            return [tensor.clone() for tensor in tensors]
        return [_cast(tensor, self.options.dtype, self.options.device, self.autocast) for tensor in tensors]

    def remember(self, tensors: Sequence[Tensor]) -> None:
        """Keep what a backward needs."""
        self.tensors = [tensor.detach() for tensor in tensors]
        try:
            self.versions = [tensor._version for tensor in tensors]
        except RuntimeError as error:
            raise RuntimeError(
                f"an argument of {self.flat.label} was made under torch.inference_mode(), and autograd cannot hold it: "
                "pass its clone(), or make it under torch.no_grad()"
            ) from error
        self.number = self.facts.next_number()

    @property
    def unchanged(self) -> bool:
        """Whether the inputs are as they were."""
        return all(t._version == version for t, version in zip(self.tensors, self.versions, strict=True))

    def _checked_out_dims(self, tensors: Sequence[Tensor]) -> list[int]:
        """The axis of the rows in each output tensor, not negative, of the size that the inputs have."""
        given, label, outputs = self.options.out_dims, self.flat.label, self.outputs.tensors
        found = [given] * len(outputs) if given is None or isinstance(given, int) else list(given)
        if len(found) != len(outputs):
            raise ValueError(
                f"out_dims has {len(found)} entries for {len(outputs)} outputs of {label}; give an int, or one entry "
                "for each"
            )
        in_dims = self.flat.in_dims or ()
        rows = next(tensor.shape[dim] for tensor, dim in zip(tensors, in_dims, strict=True) if dim is not None)
        dims: list[int] = []
        for k, (dim, tensor) in enumerate(zip(found, outputs, strict=True)):
            if not tensor.is_floating_point() and (dim is None or tensor.dim() == 0 or isinstance(given, int)):
                dims.append(-1 if dim is None or tensor.dim() <= dim else dim)
                continue
            if dim is None:
                raise ValueError(
                    f"out_dims is None for output {k} of {label}, which has numbers to differentiate: an output that "
                    "all rows share makes them depend on one another; leave in_dims out, or do not return it"
                )
            if not -tensor.dim() <= dim < tensor.dim() or tensor.shape[dim] != rows:
                raise ValueError(
                    f"in_dims says that {label} works on {rows} independent rows, but output {k} of shape "
                    f"{tuple(tensor.shape)} does not have them at axis {dim}; set out_dims, or leave in_dims out where "
                    "rows are summed up"
                )
            dims.append(dim % tensor.dim())
        return dims

    def _finish(self, outputs: Outputs, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Output tensors in the precision and on the device that the caller uses, in memory of their own."""
        self.outputs, facts = outputs, self.facts
        if outputs.passed:
            facts.name_passed(self.flat.label, outputs.passed)
        kinds = self.kinds and (self.kinds, outputs.foreign, [(t.shape, t.dtype, t.device) for t in outputs.tensors])
        known = facts.outputs
        if known is None or kinds is None or known.kinds != kinds:
            given = self._given(outputs, tensors)
            known = facts.outputs = _Outputs(
                kinds,
                None if self.flat.in_dims is None else self._checked_out_dims(tensors),
                given,
                [(t.device, t.dtype) != kind for t, kind in zip(outputs.tensors, given, strict=True)],
                [k for k, tensor in enumerate(outputs.tensors) if not tensor.is_floating_point()],
            )
        _, self.out_dims, self.given, casts, self.integers = known
        return tuple(
            [
                tensor.to(device=device, dtype=dtype, copy=True) if cast else tensor.clone()
                for tensor, (device, dtype), cast in zip(outputs.tensors, self.given, casts, strict=True)
            ]
        )

    def _given(self, outputs: Outputs, tensors: Sequence[Tensor]) -> list[tuple[torch.device, torch.dtype]]:
        """The device and precision of each output as the caller gets it."""
        recast = self.options.dtype is not None or self.options.device is not None
        floats = [dtype for dtype in {tensor.dtype for tensor in tensors} if dtype.is_floating_point]
        dtype = functools.reduce(torch.promote_types, floats) if floats else torch.get_default_dtype()
        device = tensors[0].device if tensors else torch.device("cpu")
        return [
            (device, dtype if t.is_floating_point() else t.dtype) if recast or foreign else (t.device, t.dtype)
            for t, foreign in zip(outputs.tensors, outputs.foreign, strict=True)
        ]


def _cast(tensor: Tensor, dtype: torch.dtype | None, device: str | None, autocast: bool) -> Tensor:
    """A tensor as the blackbox gets it, in memory of its own."""
    if not tensor.is_floating_point():
        return tensor.to(device=device or tensor.device, copy=True)
    if dtype is None and autocast and tensor.dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    if dtype is None or dtype == tensor.dtype:
        return tensor.clone() if device is None or tensor.device.type == device else tensor.to(device)
    return tensor.to(device=device or tensor.device, dtype=dtype)


def _any_autocast(tensors: Sequence[Tensor]) -> bool:
    return torch._C._is_any_autocast_enabled() and any(torch.is_autocast_enabled(t.device.type) for t in tensors)


def autocast_off(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[object]:
    """Evaluate in the precision of the tensors: autocast would round what differences are taken of."""
    on = {tensor.device.type for tensor in tensors if torch.is_autocast_enabled(tensor.device.type)}
    if not on:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for device in on:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack
