"""The hidden state: operations on it, and how it is carried from window to window and from batch to batch.

A hidden state is any nest of tensors (`nest`): the tensor of a GRU, the pair of an LSTM, a dict, a dataclass of a cell
of your own, with None where there is nothing yet. The trainer and the evaluator never look inside; they call these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ignite_tbptt import nest
from ignite_tbptt.arguments import require_callable, require_dim
from ignite_tbptt.sequence import Cut
from ignite_tbptt.truncation import Plan, Window
from ignite_tbptt.warn import warn

_REDUCED_PRECISION = (torch.float16, torch.bfloat16)


def detach_hidden(hidden: Any) -> Any:
    """Cut the graph: return the state with every tensor detached.

    Args:
        hidden: nest of tensors; None and other leaves inside it stay.

    Raises:
        TypeError: `hidden` holds no tensor at all, so it cannot be a state of the model; or an object inside it holds a
            tensor with a graph, where it cannot be detached.
    """
    if isinstance(hidden, torch.Tensor):
        return hidden.detach()
    if type(hidden) is tuple and hidden and all(isinstance(part, torch.Tensor) for part in hidden):
        return tuple([part.detach() for part in hidden])  # an LSTM's, at every time iteration
    found = False
    for path, leaf in nest.leaves(hidden):
        if isinstance(leaf, torch.Tensor):
            found = True
        else:
            _refuse_hidden_graph(leaf, path)
    if not found:
        raise TypeError(
            f"the hidden state must hold tensors (a tensor, tuple, list, dict, dataclass of them), but the model "
            f"returned {hidden!r} of type {type(hidden).__name__}. The model has to return (y_pred, hidden)."
        )
    return nest.map_tensors(torch.Tensor.detach, hidden)


def _refuse_hidden_graph(leaf: Any, path: nest.Path) -> None:
    for name, value in getattr(leaf, "__dict__", {}).items():
        if any(tensor.requires_grad and tensor.grad_fn is not None for tensor in nest.tensors(value)):
            raise TypeError(
                f"{nest.spell('hidden', path)} is a {type(leaf).__name__} whose attribute {name!r} holds a tensor with "
                "a graph, which cannot be detached there. Make the class a dataclass, or return its tensors in a "
                "tuple or dict."
            )


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
        Rows whose chunk starts a new document forget the old one; `starts` is a bool tensor (T, B)::

            @trainer.on(Tbptt_Events.TIME_ITERATION_STARTED)
            def forget(engine):
                state = engine.state
                if state.hidden is not None:
                    state.hidden = reset_hidden(state.hidden, starts[state.window_start])

        Where documents end inside of chunks, or windows have several segments, reset in the model's own call, with
        the mask as part of x::

            def model_fn(model, x, hidden):
                signal, starts = x  # starts: (T, B)
                outputs = []
                for x_t, starts_t in zip(signal.split(1), starts):
                    hidden = hidden if hidden is None else reset_hidden(hidden, starts_t)
                    y_t, hidden = model(x_t, hidden)
                    outputs.append(y_t)
                return torch.cat(outputs), hidden

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
            warn(
                f"{type(module).__name__} is bidirectional: its backward direction sees only the chunk in hand, and "
                "the state that it carries into the next chunk comes from that chunk's past, not from its future. The "
                "result depends on the length of the chunk."
            )
            return


@dataclass(frozen=True)
class HiddenCarry:
    """How hidden states are carried; the arguments are those of the trainer's and the evaluator's factories."""

    stateful: bool | str
    initial_hidden: Callable[[Any], Any] | None
    dim: int
    amp_mode: str | None
    detach: Callable[[Any], Any] = detach_hidden

    def __post_init__(self) -> None:
        if self.stateful not in (False, True, "data"):
            raise ValueError(f"stateful must be False, True or 'data', got {self.stateful!r}.")
        require_dim("dim", self.dim)
        if self.initial_hidden is not None:
            require_callable("initial_hidden", self.initial_hidden, "initial_hidden(x) -> hidden")

    def through(self, state: Any, plan: Plan, cut: Cut) -> HiddenThroughBatch:
        """Begin the batch that `cut` cuts.

        Raises:
            ValueError: the batch has another number of rows than the one that left the carried state.
        """
        rows = count_rows(cut, self.dim, plan.length) if self.stateful else None
        if state.hidden is not None and state.hidden is state.tbptt.left:
            _check_rows(rows, state.tbptt.rows)
        return HiddenThroughBatch(self, state, plan, rows)

    def cut(self, hidden: Any) -> Any:
        """Return the state without its graph, in the precision that it is carried in."""
        hidden = self.detach(hidden)
        return hidden if self.amp_mode is None else restore_precision(hidden)


class HiddenThroughBatch:
    """The state through the windows of one batch; it lies on `engine.state.hidden`, where handlers may replace it.

    A window that starts before the last one ended, as those of `SlidingTruncation` do, starts from the state that was
    reached there when the time steps before it were run for the first time. A state that a handler sets is a boundary:
    later windows start there at the earliest.

    Attributes:
        end: time steps that have been run.
    """

    def __init__(self, carry: HiddenCarry, state: Any, plan: Plan, rows: int | None) -> None:
        self._carry, self._state, self._rows = carry, state, rows
        self._restored, state.tbptt.hidden_restored = state.tbptt.hidden_restored, False
        self._kept: dict[int, Any] | None = None
        if plan.outline.overlap:
            self._kept = {0: _copied(state.hidden)}
        self._left: Any = None
        self._boundary = self.end = 0
        self._hand_over(state.hidden)

    def first_step(self, window: Window) -> int:
        """Return the time step that a window starts from, unless a handler sets a state."""
        return max(window[0].start, self._boundary)

    def begin(self, window: Window) -> Window:
        """Bring the state to where `window` starts.

        Returns:
            The segments that are left of the window behind the last boundary.
        """
        if self._kept is None:
            return window
        if self._left != _identity(self._state.hidden):
            self._boundary = self.end
            self._kept = {self.end: _copied(self._state.hidden)}
        start = self.first_step(window)
        if start < self.end:
            self._state.hidden = _copied(self._kept[start])
        self._kept = {time: hidden for time, hidden in self._kept.items() if time >= start}
        if window[0].start == start:
            return window
        return tuple(s._replace(start=max(s.start, start)) for s in window if s.stop > start)

    def start(self, x: Any) -> Any:
        """Return the state for the window's first chunk: detached, or the initial one with its graph to be learned."""
        hidden = self._state.hidden
        if hidden is None:
            return None if self._carry.initial_hidden is None else self._carry.initial_hidden(x)
        if self._restored:  # a checkpoint may have been loaded onto another device
            hidden = move_hidden(hidden, device_of(x))
        hidden = self._carry.cut(hidden)
        # Also on engine.state, or the last window's graph would live beside this one's.
        self._state.hidden = hidden
        return hidden

    def reach(self, time: int, hidden: Any) -> None:
        """Take the state that the model returned behind the segment that ends at `time`."""
        self._hand_over(hidden)
        if time > self.end:
            self.end = time
            if self._kept is not None:
                self._kept[time] = _copied(self._carry.cut(hidden))

    def leave(self) -> None:
        """End the batch, or leave it because of an exception: the state stays, its graph goes."""
        hidden = nest.map_tensors(torch.Tensor.detach, self._state.hidden)
        self._state.hidden = hidden if self._carry.amp_mode is None else restore_precision(hidden)
        self._state.tbptt.left, self._state.tbptt.rows = self._state.hidden, self._rows

    def _hand_over(self, hidden: Any) -> None:
        self._state.hidden = hidden
        if self._kept is not None:
            self._left = _identity(hidden)


def _identity(hidden: Any) -> Any:
    """Return what differs when a state is replaced or written into."""
    return id(hidden), [(id(tensor), tensor._version) for tensor in nest.tensors(hidden)]


def _copied(hidden: Any) -> Any:
    """Return a state with memory of its own: a model may write into the state that it is given."""
    return nest.map_tensors(torch.Tensor.clone, hidden)


def count_rows(cut: Cut, dim: int, length: int) -> int | None:
    """Return the number of rows of the batch that `cut` cuts, None where it cannot be told.

    A tensor has a time axis if chunks of different lengths differ along it; others go whole with every chunk.
    """
    if length < 2:
        return None
    short, long = (nest.tensors(cut(0, steps)) for steps in (1, 2))
    for one, two in zip(short, long, strict=True):
        if one.ndim >= 2 and -one.ndim <= dim < one.ndim and one.shape[dim] == 1 and two.shape[dim] == 2:
            return one.shape[1 if dim % one.ndim == 0 else 0]
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
