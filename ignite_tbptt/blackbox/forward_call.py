"""One forward call of a blackbox: checked, evaluated on copies, and remembered for the backward that may follow.

The idea: everything that can be known at the call is settled here, in which precision the function is evaluated, where
its rows are, what its outputs become for the caller, and whether it drew random numbers; so that backward only has to
take differences. Pairs with `gradient`, which takes them, and with `function`, which ties both to autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ignite_tbptt.blackbox.estimator import CentralDifference, Estimator
from ignite_tbptt.blackbox.evaluation import Call, EvaluationCount, Evaluator, SerialEvaluation
from ignite_tbptt.blackbox.gradient import Differences, autocast_off
from ignite_tbptt.blackbox.outputs import Outputs
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["ForwardCall", "Known", "Options", "make_options"]


@dataclass(frozen=True)
class Options:
    """What stays the same from call to call; see `function.blackbox` for each."""

    estimator: Estimator
    evaluator: Evaluator
    out_dims: int | Sequence[int]
    dtype: torch.dtype | None
    label: str
    device: str | None


@dataclass(frozen=True, eq=False)
class Known:
    """Outputs that were computed before, and the random streams from before they were."""

    outputs: Any
    streams: RandomStreams | None


def make_options(
    estimator: Estimator | None,
    evaluator: Evaluator | None,
    out_dims: int | Sequence[int],
    dtype: torch.dtype | None,
    label: str,
    device: str | None,
) -> Options:
    """Options with their defaults, checked.

    Raises:
        TypeError: an estimator or evaluator that is none, or a dtype that is not of floating point.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a torch dtype of floating point, got {dtype!r}: differences need small steps")
    for name, value, method in (("estimator", estimator, "perturb"), ("evaluator", evaluator, "evaluate")):
        if value is not None and (isinstance(value, type) or not hasattr(value, method)):
            raise TypeError(
                f"{name} must have a method {method!r}, got {value!r}: make one by calling it, say CentralDifference() "
                "or SerialEvaluation()"
            )
    estimator = CentralDifference() if estimator is None else estimator
    evaluator = SerialEvaluation() if evaluator is None else evaluator
    return Options(estimator, evaluator, out_dims, dtype, label, device)


class ForwardCall:
    """One forward call, and what its backward needs.

    Args:
        fn: called with one tensor for each argument.
        options: what stays the same from call to call.
        count: where evaluations are counted.
        in_dims: the batch axis of each tensor, or None.
        names: what each tensor is called in messages; None numbers them.
        known: what fn gives, where that is known already.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        options: Options,
        count: EvaluationCount,
        in_dims: Sequence[int | None] | None = None,
        names: Sequence[str] | None = None,
        known: Known | None = None,
    ) -> None:
        self.fn, self.options, self.count, self.known = fn, options, count, known
        self.in_dims, self.names = in_dims, names
        self.differentiable = False
        self.differences: Differences | None = None
        self.outputs: Outputs | None = None

    def named(self, k: int) -> str:
        """What a tensor is called in messages."""
        return f"input {k}" if self.names is None else self.names[k]

    def again(self) -> ForwardCall:
        """A session for another entry of a vmapped call."""
        session = ForwardCall(self.fn, self.options, self.count, self.in_dims, self.names)
        session.differentiable = self.differentiable
        return session

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Evaluate at x, or take what is known; returns the numbers in the output."""
        options = self.options
        in_dims = self._checked_in_dims(tensors)
        # what is evaluated with autocast off differs from what the module itself computed under it
        autocast = any(torch.is_autocast_enabled(kind) for kind in {tensor.device.type for tensor in tensors})
        cast = functools.partial(_cast, dtype=options.dtype, device=options.device, autocast=autocast)
        if self.known is None:
            streams = RandomStreams.now() if self.differentiable else None
            with autocast_off(tensors):
                outputs = Outputs.of(self.fn(*[_copied(tensor, cast(tensor)) for tensor in tensors]), options.label)
        else:
            streams = self.known.streams or RandomStreams.now()
            outputs = Outputs.of(self.known.outputs, options.label)
        self.outputs = outputs
        out_dims = None if in_dims is None else _checked_out_dims(options, outputs, in_dims, tensors)
        if streams is not None:
            call = Call(self.fn, options.label, self.count, in_dims, out_dims)
            if self.known is None or not (autocast or options.dtype or options.device):
                call.first = outputs
            names = self.names or [f"input {k}" for k in range(len(tensors))]
            draws = streams.have_moved()
            self.differences = Differences(call, options.estimator, options.evaluator, names, cast, streams, draws)
        return self._as_arguments(outputs, tensors)

    def _checked_in_dims(self, tensors: Sequence[Tensor]) -> list[int | None] | None:
        """Batch axes, none of them negative, all of one size."""
        if self.in_dims is None:
            return None
        label = self.options.label
        if len(self.in_dims) != len(tensors):
            raise ValueError(
                f"in_dims has {len(self.in_dims)} entries for {len(tensors)} tensors of {label}; give one for "
                "each, None where all rows share it"
            )
        dims: list[int | None] = []
        rows: int | None = None  # of the first tensor that has any
        for k, (dim, tensor) in enumerate(zip(self.in_dims, tensors, strict=True)):
            if dim is None:
                dims.append(None)
                continue
            if not -tensor.dim() <= dim < tensor.dim():
                raise ValueError(
                    f"in_dims gives axis {dim} for {self.named(k)} of {label}, whose shape is {tuple(tensor.shape)}: "
                    "there is no such axis; give None where all rows share it"
                )
            size = tensor.shape[dim]
            if rows is not None and size != rows:
                first = self.named(next(k for k, dim in enumerate(dims) if dim is not None))
                raise ValueError(
                    f"in_dims: {first} has {rows} rows and {self.named(k)} has {size}; the batch axes of all arguments "
                    f"of {label} must be of one size"
                )
            rows = size
            dims.append(dim % tensor.dim())
        if rows is None:
            raise ValueError(f"in_dims names a batch axis for none of the tensors of {label}; leave it out")
        return dims

    def _as_arguments(self, outputs: Outputs, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Output tensors in the precision and on the device that the caller uses, in memory of their own."""
        if self.options.dtype is None and self.options.device is None and not any(outputs.foreign):
            return tuple(tensor.clone() for tensor in outputs.tensors)
        floats = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        dtype = functools.reduce(torch.promote_types, floats) if floats else torch.get_default_dtype()
        device = tensors[0].device if tensors else torch.device("cpu")
        recast = self.options.dtype is not None or self.options.device is not None
        return tuple(
            tensor.to(
                device=device if foreign or recast else tensor.device,
                dtype=dtype if tensor.is_floating_point() and (foreign or recast) else tensor.dtype,
                copy=True,
            )
            for tensor, foreign in zip(outputs.tensors, outputs.foreign, strict=True)
        )

    def rebuilt(self, flat: Sequence[Tensor]) -> Any:
        """The nest that the function returned, with these tensors."""
        assert self.outputs is not None
        return self.outputs.rebuilt(flat)


def _checked_out_dims(
    options: Options, outputs: Outputs, in_dims: list[int | None], tensors: Sequence[Tensor]
) -> list[int]:
    """The axis of the rows in each output tensor, not negative, of the size that the inputs have."""
    given = options.out_dims
    dims = [given] * len(outputs.tensors) if isinstance(given, int) else list(given)
    if len(dims) != len(outputs.tensors):
        raise ValueError(
            f"out_dims has {len(dims)} entries for {len(outputs.tensors)} outputs of {options.label}; give an int, or "
            "one entry for each"
        )
    rows = next(tensor.shape[dim] for tensor, dim in zip(tensors, in_dims, strict=True) if dim is not None)
    for k, (dim, tensor) in enumerate(zip(dims, outputs.tensors, strict=True)):
        if not -tensor.dim() <= dim < tensor.dim() or tensor.shape[dim] != rows:
            raise ValueError(
                f"in_dims says that {options.label} works on {rows} independent rows, but output {k} of shape "
                f"{tuple(tensor.shape)} does not have them at axis {dim}; set out_dims, or leave in_dims out where "
                "rows are summed up"
            )
        dims[k] = dim % tensor.dim()
    return dims


def _cast(tensor: Tensor, dtype: torch.dtype | None, device: str | None, autocast: bool) -> Tensor:
    """A tensor as the blackbox gets it, maybe the same one."""
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor if device is None else tensor.to(device)
    if dtype is None and autocast and tensor.dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    return tensor if dtype is None and device is None else tensor.to(device=device, dtype=dtype)


def _copied(tensor: Tensor, cast: Tensor) -> Tensor:
    return cast.clone() if cast.data_ptr() == tensor.data_ptr() else cast
