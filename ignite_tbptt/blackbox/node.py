"""What autograd sees of a blackbox: the only torch.autograd.Function of the package, its transforms and tangents.

The idea: a node holds the `Record` of its forward; its backward asks `round` for the gradients, and tells it which
other calls of the same blackbox the running backward will reach.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.forward_ad import unpack_dual

from ignite_tbptt.blackbox.ahead import begin
from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.record import Record
from ignite_tbptt.blackbox.round import HELD_BYTES, gradients, tangents
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["called", "refuse_second_derivatives", "with_known_outputs"]

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

# Which nodes the running backward will execute is known to torch alone; without it every call is a round by itself.
_will_execute = getattr(torch._C, "_will_engine_execute_node", None)


def called(record: Record) -> Any:
    """Call a blackbox in a way that autograd can differentiate; returns the nest that it returned."""
    tensors, record.flat.tensors = record.flat.tensors, []
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    transformed = torch._C._are_functorch_transforms_active()
    if wanted or transformed or any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        record.differentiable = True
        function = _UnderTransforms if transformed else _FiniteDifferences
        flat = function.apply(record, None, *tensors)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            flat = record.forward(tensors)
    return record.outputs.rebuilt(flat)


def with_known_outputs(record: Record, value: Any, streams: RandomStreams) -> Any:
    """Give outputs that were computed already a gradient."""
    tensors, record.flat.tensors = record.flat.tensors, []
    record.differentiable = True
    if torch._C._are_functorch_transforms_active():
        flat = _UnderTransforms.apply(record, None, *tensors)  # type: ignore[no-untyped-call]
    else:
        flat = _FiniteDifferences.apply(record, (value, streams), *tensors)  # type: ignore[no-untyped-call]
    return record.outputs.rebuilt(flat)


class _FiniteDifferences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, record: Record, known: tuple[Any, RandomStreams] | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        output = record.forward(tensors) if known is None else record.known(known[0], known[1], tensors)
        _remember(ctx, record, tensors, output)
        calls, number = record.facts.calls, record.number
        calls[number] = weakref.ref(ctx, lambda _: calls.pop(number, None))
        if record.options.ahead:
            ctx.under_way = begin(record, HELD_BYTES)
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        record: Record = ctx.record
        tensors = ctx.saved_tensors
        if torch._C._are_functorch_transforms_active():
            raise BlackboxError(
                f"gradients of {record.flat.label} cannot be taken inside torch.func or torch.vmap: it would be "
                "handed tensors that hold no numbers; call backward() or torch.autograd.grad outside of them"
            )
        found = _gradients(record, cotangents)
        if torch.is_grad_enabled():
            found = refuse_second_derivatives(record.flat.label, found, [*tensors, *cotangents])
        return (None, None, *found)

    @staticmethod
    def jvp(ctx: Any, record: Any, known: Any, *along: Tensor | None) -> tuple[Tensor | None, ...]:
        """Forward mode: one difference along the tangent."""
        call: Record = ctx.record
        call.needed = [tangent is not None for tangent in along]
        if torch._C._are_functorch_transforms_active():
            # below torch.func.jvp, where tensors hold numbers that numpy can read
            call.tensors = [_below(tensor, call.flat.label) for tensor in call.tensors]
            along = tuple(None if t is None else _below(t, call.flat.label) for t in along)
            with temporarily_clear_interpreter_stack():
                found = tangents(call, along)
        else:
            found = tangents(call, along)
        return tuple(None if t is None else t.to(*kind) for t, kind in zip(found, call.given, strict=True))


def _below(tensor: Tensor, label: str) -> Tensor:
    """A tensor of torch.func.jvp without what the transform adds."""
    plain: Tensor = torch._C._functorch.get_unwrapped(tensor) if _is_wrapped(tensor) else tensor
    if _is_wrapped(plain):
        raise BlackboxError(
            f"torch.func.jvp of {label} inside another transform of torch.func: its tangent comes from one difference, "
            "which other transforms cannot see; call torch.func.jvp by itself, once for each tangent"
        )
    return plain


def _gradients(record: Record, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    if not any(is_batched(v) for v in cotangents if v is not None):
        return gradients(record, [cotangents], lambda: _reachable(record))[0]
    # torch.autograd.grad(..., is_grads_batched=True): many cotangents, and one set of evaluations for them all
    level = torch._C._vmapmode_decrement_nesting() + 1
    try:
        apart = [torch._remove_batch_dim(v, level, 1, 0) if v is not None and is_batched(v) else v for v in cotangents]
        count = next(len(v) for v, was in zip(apart, cotangents, strict=True) if v is not was and v is not None)
        many = [
            [v if v is was or v is None else v[i] for v, was in zip(apart, cotangents, strict=True)]
            for i in range(count)
        ]
        each = gradients(record, many, lambda: [record])
        stacked = [None if same[0] is None else torch.stack(same) for same in zip(*each, strict=True)]
    finally:
        torch._C._vmapmode_increment_nesting()
    return [None if same is None else torch._add_batch_dim(same, 0, level) for same in stacked]


def _reachable(record: Record) -> list[Record]:
    """Records of the same blackbox whose nodes the running backward will execute."""
    if _will_execute is None:
        return []
    nodes = [reference() for reference in list(record.facts.calls.values())]
    return [node.record for node in nodes if node is not None and _will_execute(node)]


class _UnderTransforms(_FiniteDifferences):
    """The same with a forward that torch.func can take apart; torch is slower to call one of these."""

    @staticmethod
    def forward(record: Record, known: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return record.forward(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        record, _, *tensors = inputs
        _remember(ctx, record, tensors, output)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], record: Record, known: Any, *tensors: Tensor
    ) -> tuple[Any, Any]:
        """One call for each entry of the mapped axis."""
        if not info.batch_size:
            raise ValueError(
                f"torch.vmap maps {record.flat.label} over an axis of 0 entries: with no entry to call it for, the "
                "shape of its outputs is unknown; leave empty batches out"
            )
        found = []
        for index in range(info.batch_size):
            entry = [
                tensor if dim is None else tensor.select(dim, index)
                for tensor, dim in zip(tensors, in_dims[2:], strict=True)
            ]
            one = record.again()
            found.append(_UnderTransforms.apply(one, None, *entry))  # type: ignore[no-untyped-call]
            record.outputs, record.given, record.integers = one.outputs, one.given, one.integers
        stacked = tuple(torch.stack(same) for same in zip(*found, strict=True))
        return stacked, (0,) * len(stacked)


def _remember(ctx: Any, record: Record, tensors: Sequence[Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.record = record
    record.remember(tensors)
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    if record.integers:
        ctx.mark_non_differentiable(*[output[k] for k in record.integers])


def refuse_second_derivatives(
    label: str, gradients: Sequence[Tensor | None], depend_on: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Under create_graph=True: whoever differentiates gradients again is told, instead of getting a wrong number."""
    live = [k for k, gradient in enumerate(gradients) if gradient is not None]
    marked = _NoSecondDerivative.apply(  # type: ignore[no-untyped-call]
        label, len(live), *[gradients[k] for k in live], *depend_on
    )
    found = list(gradients)
    for k, gradient in zip(live, marked, strict=True):
        found[k] = gradient
    return found


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(label: str, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count] if tensor is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.label = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise BlackboxError(
            f"second derivative of {ctx.label}: its gradient is made of finite differences, or comes from elsewhere, "
            "and is not differentiated again; leave create_graph out, or detach the gradient before it enters a loss. "
            "For a product of the Jacobian with a vector use torch.func.jvp, not torch.autograd.functional.jvp"
        )
