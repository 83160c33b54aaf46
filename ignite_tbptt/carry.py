"""The hidden state on its way through the windows of a batch, and from one batch to the next.

What the trainer and the evaluator do to a state between two calls of the model; `hidden` has the operations. The state
in hand lies on `engine.state.hidden`, where handlers read and replace it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ignite_tbptt import nest
from ignite_tbptt.hidden import detach_hidden, move_hidden, restore_precision
from ignite_tbptt.sequence import Cut
from ignite_tbptt.truncation import Window


@dataclass(frozen=True)
class HiddenCarry:
    """How hidden states are carried; the arguments are those of the trainer's and the evaluator's factories."""

    stateful: bool
    initial_hidden: Callable[[Any], Any] | None
    dim: int
    amp_mode: str | None

    def through(
        self, state: Any, windows: Sequence[Window], cut: Cut, detach: Callable[[Any], Any] = detach_hidden
    ) -> HiddenThroughBatch:
        """Begin the batch that `cut` cuts.

        Raises:
            ValueError: the batch has another number of rows than the one that left the carried state.
        """
        if not self.stateful:
            state.hidden = None
            return HiddenThroughBatch(self, state, windows, None, detach)
        steps = windows[0][0].stop
        rows = count_rows(cut(0, steps), self.dim, steps)
        if state.hidden is not None:
            _check_rows(rows, state.hidden_rows)
        return HiddenThroughBatch(self, state, windows, rows, detach)


class HiddenThroughBatch:
    """The state through the windows of one batch.

    Where a window starts before the last one ended, as a sliding window does, it starts from the state that was
    reached there; only states that a later window asks for are kept.
    """

    def __init__(
        self,
        carry: HiddenCarry,
        state: Any,
        windows: Sequence[Window],
        rows: int | None,
        detach: Callable[[Any], Any],
    ) -> None:
        self._carry, self._state, self._rows, self._detach = carry, state, rows, detach
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
        if self._state.hidden_restored:  # a checkpoint may have been loaded onto another device
            self._state.hidden_restored = False
            hidden = move_hidden(hidden, device_of(x))
        hidden = self._detach(hidden)
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
        self._state.hidden_rows = self._rows

    def _cut(self, hidden: Any) -> Any:
        hidden = self._detach(hidden)
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
