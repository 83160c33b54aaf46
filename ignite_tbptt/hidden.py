"""The state carried through time: detached, its gradient scaled, its rows reset, kept in a checkpoint.

A hidden state is any nest of tensors (`nest`): the tensor of a GRU, the pair of an LSTM, a dict, a dataclass of a cell
of your own, with None where there is nothing yet. The trainer and the evaluator never look inside; they call these.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ignite_tbptt import nest
from ignite_tbptt.sequence import Cut
from ignite_tbptt.truncation import Window

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


@dataclass(frozen=True)
class HiddenCarry:
    """How hidden states are carried; the arguments are those of the trainer's and the evaluator's factories."""

    stateful: bool
    initial_hidden: Callable[[Any], Any] | None
    dim: int
    amp_mode: str | None
    detach: Callable[[Any], Any] = detach_hidden

    def through(self, state: Any, windows: Sequence[Window], cut: Cut) -> HiddenThroughBatch:
        """Begin the batch that `cut` cuts.

        Raises:
            ValueError: the batch has another number of rows than the one that left the carried state.
        """
        if not self.stateful:
            state.hidden = None
            return HiddenThroughBatch(self, state, windows, None)
        steps = windows[0][0].stop
        rows = count_rows(cut(0, steps), self.dim, steps)
        if state.hidden is not None:
            _check_rows(rows, state.tbptt.rows)
        return HiddenThroughBatch(self, state, windows, rows)


class HiddenThroughBatch:
    """The state through the windows of one batch.

    Where a window starts before the last one ended, as a sliding window does, it starts from the state that was
    reached there; only states that a later window asks for are kept.
    """

    def __init__(self, carry: HiddenCarry, state: Any, windows: Sequence[Window], rows: int | None) -> None:
        self._carry, self._state, self._rows = carry, state, rows
        self._revisited = {later[0].start for window, later in pairwise(windows) if later[0].start != window[-1].stop}
        self._kept = {0: state.hidden} if 0 in self._revisited else {}
        self.end = 0
        self._length = windows[-1][-1].stop

    def windows_left(self) -> bool:
        """Return whether the sequence goes on behind the windows run so far."""
        return self.end < self._length

    def go_back_to(self, start: int) -> None:
        """Set `engine.state.hidden` to the state at an earlier time, at which a window starts."""
        self._state.hidden = self._kept[start]
        self._kept = {time: hidden for time, hidden in self._kept.items() if time >= start}

    def start(self, x: Any) -> Any:
        """Return the state for the window's first chunk: detached, or the initial one with its graph to be learned."""
        hidden = self._state.hidden
        if hidden is None:
            return None if self._carry.initial_hidden is None else self._carry.initial_hidden(x)
        if self._state.tbptt.hidden_restored:  # a checkpoint may have been loaded onto another device
            self._state.tbptt.hidden_restored = False
            hidden = move_hidden(hidden, device_of(x))
        hidden = self._carry.detach(hidden)
        if self._carry.amp_mode is not None:
            hidden = restore_precision(hidden)
        # Also on engine.state, or the last window's graph would live beside this one's.
        self._state.hidden = hidden
        return hidden

    def reach(self, time: int, hidden: Any) -> None:
        """Take the state that the model returned behind the segment that ends at `time`."""
        self._state.hidden = hidden
        self.end = time
        if time in self._revisited:
            self._kept[time] = self._cut(hidden)

    def leave(self) -> None:
        """End the batch, or leave it because of an exception: the state stays, its graph goes."""
        hidden = nest.map_tensors(torch.Tensor.detach, self._state.hidden)
        self._state.hidden = hidden if self._carry.amp_mode is None else restore_precision(hidden)
        self._state.tbptt.rows = self._rows

    def _cut(self, hidden: Any) -> Any:
        hidden = self._carry.detach(hidden)
        return hidden if self._carry.amp_mode is None else restore_precision(hidden)


def count_rows(chunk: Any, dim: int, steps: int) -> int | None:
    """Return the number of rows of a chunk of `steps` time steps, None where its tensors have no other axis than time.

    Tensors without the time axis, which go whole with every chunk, are passed over.
    """
    for tensor in nest.tensors(chunk):
        if tensor.ndim >= 2 and -tensor.ndim <= dim < tensor.ndim and tensor.shape[dim] == steps:
            return tensor.shape[1 if dim % tensor.ndim == 0 else 0]
    return None


def device_of(x: Any) -> torch.device:
    """Return the device of the first tensor of `x`, the CPU where it has none."""
    for tensor in nest.tensors(x):
        return tensor.device
    return torch.device("cpu")


def _check_rows(rows: int | None, carried: int | None) -> None:
    if rows is not None and carried is not None and rows != carried:
        raise ValueError(
            f"the batch has {rows} rows, but the hidden state carried from the batch before has {carried}: with "
            "stateful=True row i of a batch goes on where row i of the one before ended. Keep the number of rows "
            "(ContiguousStreams, or drop_last=True), or set engine.state.hidden = None where new sequences begin."
        )
