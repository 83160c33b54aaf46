"""The state carried through time: detached, its gradient scaled, its rows reset, kept in a checkpoint.

A hidden state is any nest of tensors (`nest`): the tensor of a GRU, the pair of an LSTM, a dict, a dataclass of a cell
of your own, with None where there is nothing yet. The trainer and the evaluator never look inside; they call these.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ignite_tbptt import nest

_REDUCED_PRECISION = (torch.float16, torch.bfloat16)


def detach_hidden(hidden: Any) -> Any:
    """Cut the graph: return the state with every tensor detached.

    Args:
        hidden: nest of tensors; None and other leaves inside it stay.

    Raises:
        TypeError: `hidden` holds no tensor at all, so it cannot be a state of the model.
    """
    if isinstance(hidden, torch.Tensor):
        return hidden.detach()
    if not any(True for _ in nest.tensors(hidden)):
        raise TypeError(
            f"the hidden state must hold tensors (a tensor, tuple, list, dict, dataclass of them), but the model "
            f"returned {hidden!r} of type {type(hidden).__name__}. The model has to return (y_pred, hidden)."
        )
    return nest.map_tensors(torch.Tensor.detach, hidden)


def restore_precision(hidden: Any) -> Any:
    """Return the state with reduced-precision tensors in float32.

    A recurrent layer under autocast returns its state in bfloat16 or float16, and the same layer refuses that state
    outside autocast. The cast loses nothing.
    """
    return nest.map_tensors(lambda tensor: tensor.float() if tensor.dtype in _REDUCED_PRECISION else tensor, hidden)


def move_hidden(hidden: Any, device: torch.device) -> Any:
    """Return the state on `device`; a checkpoint may have been loaded onto another one."""
    return nest.map_tensors(lambda tensor: tensor.to(device), hidden)


def reset_hidden(hidden: Any, mask: torch.Tensor, dim: int = 1) -> Any:
    """Zero the state of the rows where `mask` is True, as where a document ends and the next one begins.

    Example:
        Rows whose chunk starts a new document forget the old one::

            @trainer.on(Tbptt_Events.TIME_ITERATION_STARTED)
            def forget(engine):
                if engine.state.hidden is not None:
                    engine.state.hidden = reset_hidden(engine.state.hidden, starts_document(engine.state))

    Args:
        hidden: nest of tensors.
        mask: bool tensor of shape (B,), True for the rows to reset.
        dim: batch axis of the tensors in `hidden`. The layers of torch.nn have (layers, B, H), so 1.

    Returns:
        A new state; `hidden` is as it was. Zeroed rows also receive no gradient.

    Raises:
        TypeError: `mask` is not a bool tensor.
        ValueError: `mask` is not one-dimensional, or its length is not the size of a tensor along `dim`.
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True for the rows to reset, got {got}: compare first (ids == 0).")
    if mask.ndim != 1:
        raise ValueError(f"mask must have the shape (B,), one entry for each row, got {tuple(mask.shape)}.")

    def zero_rows(tensor: torch.Tensor) -> torch.Tensor:
        if not -tensor.ndim <= dim < tensor.ndim or tensor.shape[dim] != len(mask):
            raise ValueError(
                f"mask has {len(mask)} rows, but a hidden tensor of shape {tuple(tensor.shape)} does not have as many "
                f"along dim={dim}. Name the batch axis of the hidden state with dim."
            )
        rows = [1] * tensor.ndim
        rows[dim] = len(mask)
        return tensor.masked_fill(mask.to(tensor.device).view(rows), 0)

    return nest.map_tensors(zero_rows, hidden)


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant; x * s + (x * (1 - s)).detach() would round x."""

    @staticmethod
    def forward(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.scale, None


def scale_gradient(hidden: Any, scale: float) -> Any:
    """Return the same state, whose gradient is multiplied by `scale` on its way back."""
    if scale == 1.0:
        return hidden
    if scale == 0.0:
        return nest.map_tensors(torch.Tensor.detach, hidden)

    def scaled(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        identity: torch.Tensor = _ScaleGradient.apply(tensor, scale)  # type: ignore[no-untyped-call]
        return identity

    return nest.map_tensors(scaled, hidden)


def warn_if_bidirectional(model: Any) -> None:
    """Warn where a bidirectional recurrent layer would see the future no further than the end of the chunk."""
    modules = getattr(model, "modules", None)
    if not callable(modules):
        return
    for module in modules():
        if isinstance(module, torch.nn.RNNBase) and module.bidirectional:
            warnings.warn(
                f"{type(module).__name__} is bidirectional: its backward direction sees only the chunk in hand, and "
                "the state that it carries into the next chunk comes from that chunk's past, not from its future. The "
                "result depends on the length of the chunk.",
                UserWarning,
                stacklevel=3,
            )
            return


_PLAIN = (bool, int, float, str, type(None))


def pack_hidden(hidden: Any) -> Any:
    """Return the state in the plain types that ``torch.load(weights_only=True)`` accepts.

    Tensors are detached and cloned, so that the view of a last step does not save the storage of all steps. A container
    of a class of its own becomes a dict that names the class; `unpack_hidden` finds it again.

    Raises:
        ValueError: the state holds something that would not come back from a file.
    """
    if isinstance(hidden, torch.Tensor):
        return hidden.detach().clone()
    if type(hidden) in _PLAIN:
        return hidden
    if type(hidden) in (list, tuple):
        return type(hidden)(pack_hidden(child) for child in hidden)
    if type(hidden) is dict and "__class__" not in hidden:
        return {key: pack_hidden(child) for key, child in hidden.items()}
    pairs = nest.children(hidden)
    name = [type(hidden).__module__, type(hidden).__qualname__]
    if pairs is None or _find_class(*name) is not type(hidden):
        raise ValueError(
            f"the carried hidden state holds a {'.'.join(name)}, which would not come back from a checkpoint. It may "
            "hold tensors, numbers, strings and None in dicts, lists, tuples, and named tuples, dataclasses or "
            "subclasses of those that are defined at the top level of a module."
        )
    return {"__class__": name, "children": {key: pack_hidden(child) for key, child in pairs}}


def unpack_hidden(packed: Any) -> Any:
    """Return the state that `pack_hidden` packed.

    Raises:
        ValueError: a class of the state cannot be found under the name that it was saved with.
    """
    if isinstance(packed, (list, tuple)):
        return type(packed)(unpack_hidden(child) for child in packed)
    if not isinstance(packed, dict):
        return packed
    if "__class__" not in packed:
        return {key: unpack_hidden(child) for key, child in packed.items()}
    kind = _find_class(*packed["__class__"])
    if kind is None:
        raise ValueError(
            f"the checkpoint carries a hidden state of the class {'.'.join(packed['__class__'])}, which is not there. "
            "Define it at the top level of its module, and import that module before the checkpoint is loaded."
        )
    values = {key: unpack_hidden(value) for key, value in packed["children"].items()}
    if issubclass(kind, Mapping):
        return kind(values)  # type: ignore[call-arg]
    if hasattr(kind, "_fields"):
        return kind(**values)
    if issubclass(kind, (list, tuple)):
        return kind(values.values())
    # Fields are set as they were, past any __init__: the state is restored, not made anew.
    state = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(state, name, value)
    return state


def _find_class(module: str, name: str) -> type | None:
    # Only what the program has imported itself and what is a plain container is ever looked up: a checkpoint runs no
    # code of its own choice.
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        return None
    return found if dataclasses.is_dataclass(found) or issubclass(found, (Mapping, list, tuple)) else None
