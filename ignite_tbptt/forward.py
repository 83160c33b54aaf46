"""One call of the model on one chunk: prepare the batch, run under autocast, take (y_pred, hidden) apart.

What the trainer and the evaluator have in common, and nothing of what they differ in: no loss, no gradient, no event.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ignite_tbptt import nest
from ignite_tbptt.arguments import require_callable
from ignite_tbptt.hidden import device_of
from ignite_tbptt.warn import warn


def prepare_batch(batch: Any, device: str | torch.device | None = None, non_blocking: bool = False) -> tuple[Any, Any]:
    """Take a chunk apart into (x, y) and move its tensors to `device`.

    Raises:
        TypeError: the chunk is not a pair.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise _no_pair(batch, "batch", "(x, y): give prepare_batch(batch, device, non_blocking) -> (x, y)")
    x, y = batch
    if device is None:
        return x, y
    return _moved(x, device, non_blocking), _moved(y, device, non_blocking)


def _moved(node: Any, device: str | torch.device, non_blocking: bool) -> Any:
    return nest.map_tensors(lambda tensor: tensor.to(device=device, non_blocking=non_blocking), node)


# A pair is known by its type and length wherever one is asked for: a tensor of two rows, or a dict of two keys, would
# unpack without a word.
def _no_pair(value: Any, name: str, form: str) -> TypeError:
    size = f" of {len(value)} items" if isinstance(value, (tuple, list)) else ""
    return TypeError(f"{name} is of type {type(value).__name__}{size}, but must be a pair {form}.")


def count_steps(loss_weight: Callable[[Any, Any], Any] | None, x: Any, y: Any, steps: int) -> float:
    """Return how many of the time steps of a chunk count: all that have a target, or what `loss_weight` says.

    Raises:
        TypeError, ValueError: `loss_weight` returned what is no count.
    """
    if y is None:
        return 0
    if loss_weight is None:
        return steps
    weight = loss_weight(x, y)
    try:
        count = float(weight)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"loss_weight must return a number, the steps that count, got {weight!r}.") from error
    if not (math.isfinite(count) and count >= 0):
        raise ValueError(
            f"loss_weight must return a finite number that is not negative, the steps that count, got {count}."
        )
    return count


def call_model(model: Any, x: Any, hidden: Any) -> Any:
    """Call the model as Ignite's contrib trainer did: with a hidden state only where there is one, by position."""
    return model(x) if hidden is None else model(x, hidden)


def unchanged(value: Any) -> Any:
    """Return what came: the default of `model_transform`."""
    return value


_NO_AUTOCAST = nullcontext()


@dataclass(frozen=True)
class ChunkForward:
    """Runs chunks through a model; the arguments are those of the trainer's and the evaluator's factories."""

    model: Any
    device: str | torch.device | None
    non_blocking: bool
    prepare_batch: Callable[..., Any]
    model_fn: Callable[[Any, Any, Any], Any]
    model_transform: Callable[[Any], Any]
    amp_mode: str | None

    def __post_init__(self) -> None:
        if isinstance(self.model, type) or not hasattr(self.model, "train"):
            raise TypeError(f"model must be a torch.nn.Module, got {self.model!r}.")
        require_callable("prepare_batch", self.prepare_batch, "prepare_batch(chunk, device, non_blocking) -> (x, y)")
        require_callable("model_fn", self.model_fn, "model_fn(model, x, hidden) -> (y_pred, hidden)")
        require_callable("model_transform", self.model_transform, "model_transform(y_pred) -> y_pred")
        if self.amp_mode not in (None, "amp"):
            raise ValueError(f"amp_mode must be None or 'amp' (torch.autocast), got {self.amp_mode!r}.")

    def prepare(self, chunk: Any) -> tuple[Any, Any]:
        """Return (x, y) of a chunk, on the device."""
        pair = self.prepare_batch(chunk, device=self.device, non_blocking=self.non_blocking)
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise _no_pair(pair, "the result of prepare_batch", "(x, y), the input of the model and the target")
        x, y = pair
        return x, y

    def autocast(self, x: Any) -> AbstractContextManager[Any]:
        """Return the autocast context for the device of `x`, in the dtype of ``torch.get_autocast_dtype``."""
        if self.amp_mode is None:
            return _NO_AUTOCAST
        return torch.autocast(device_of(x).type)

    def predict(self, x: Any, hidden: Any) -> tuple[Any, Any]:
        """Return (y_pred, hidden) of the model on `x`."""
        output = self.model_fn(self.model, x, hidden)
        if not (isinstance(output, (tuple, list)) and len(output) == 2):
            raise _no_pair(
                output,
                "the output of the model",
                "(y_pred, hidden): return both, or give model_fn(model, x, hidden) -> (y_pred, hidden)",
            )
        y_pred, hidden = output
        return self.model_transform(y_pred), hidden


def warn_if_underflow(amp_mode: str | None, scaler: Any, device: str | torch.device | None, model: Any) -> None:
    """Warn where gradients would be float16 with nothing to keep the small ones from vanishing."""
    if device is not None:
        kind = torch.device(device).type
    else:
        kind = device_of(list(model.parameters()) if isinstance(model, torch.nn.Module) else None).type
    if amp_mode == "amp" and scaler is None and torch.get_autocast_dtype(kind) == torch.float16:
        warn(
            f"amp_mode='amp' computes in float16 on {kind}, where gradients below 6e-8 vanish without a gradient "
            "scaler: give scaler=True, or choose torch.set_autocast_dtype(device_type, torch.bfloat16)."
        )


def check_layout(model: Any, x: Any, hidden: Any, dim: int) -> bool:
    """Compare what the model's recurrent layers say of their layout, and the state that they return, with `dim`.

    A layer that takes the time axis for the rows returns a state of as many rows as the chunk has steps.

    Returns:
        Whether the layout is known: not where the chunk has as many steps as rows.

    Raises:
        ValueError: the layers take the axis `dim` for their rows.
    """
    layers = (
        [module for module in model.modules() if isinstance(module, torch.nn.RNNBase)] if _has_modules(model) else []
    )
    tensor = next((tensor for tensor in nest.tensors(x) if tensor.ndim == 3), None)
    state = next((tensor for tensor in nest.tensors(hidden) if tensor.ndim == 3), None)
    batch_first = {layer.batch_first for layer in layers}
    if len(batch_first) != 1 or tensor is None or state is None or dim % 3 == 2:
        return True
    rows_first = batch_first == {True}
    if (dim % 3 == 1) == rows_first:
        return True
    steps, rows = tensor.shape[dim], tensor.shape[1 - dim % 3]
    if steps == rows and not isinstance(model, torch.nn.RNNBase):
        return False
    if state.shape[1] == steps:
        raise ValueError(
            f"dim={dim} is the time axis of x, of shape {tuple(tensor.shape)}, but {type(layers[0]).__name__} with "
            f"batch_first={rows_first} takes it for the rows: its state is of shape {tuple(state.shape)}. Give "
            f"dim={int(rows_first)}, or make the layer with batch_first={not rows_first}."
        )
    return True


def _has_modules(model: Any) -> bool:
    return isinstance(model, torch.nn.Module)
