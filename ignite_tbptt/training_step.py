"""The trainer: runs the windows of a policy through forward, backward and step, and fires an event at each turn.

It executes what others decide: a truncation policy lays out the windows, an accumulation says which of them share an
optimizer step, a splitter cuts the batch. None of them is known here by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine, Events

from ignite_tbptt import ranks
from ignite_tbptt.checkpoint import TimeEngine, TimeState, track_position
from ignite_tbptt.events import Tbptt_Events, fire, fire_and_ask, has_listeners, register_time_events, stop_requested
from ignite_tbptt.forward import ChunkForward
from ignite_tbptt.hidden import HiddenCarry, HiddenThroughBatch, scale_gradient
from ignite_tbptt.optimization import Accumulation, OptimizerStep, checked_loss, zero_through
from ignite_tbptt.policies import as_policy
from ignite_tbptt.ranks import REFUSED
from ignite_tbptt.recompute import Recompute
from ignite_tbptt.sequence import Cut, SplitBatch
from ignite_tbptt.truncation import (
    TruncationPolicy,
    Window,
    plan_windows,
)


def loss_item(x: Any, y: Any, y_pred: Any, loss: Any) -> Any:
    """Return the loss as a number: the default of `output_transform`."""
    return loss.item()


@dataclass
class _Chunks:
    """The batch in hand: where its chunks come from, the state they start from, the loss that they left behind.

    `mode_may_have_changed` says that a handler may have called Module.eval() since the batch began; Module.train() for
    every chunk would cost a small model more than all events together.
    """

    cut: Cut
    hidden: HiddenThroughBatch
    total: Any = 0.0
    steps: float = 0.0
    has_target: bool = False
    mode_may_have_changed: bool = True

    def mean_loss(self) -> float:
        return float(self.total) / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class TbpttTrainingStep:
    """The process function of the trainer: one batch, window by window. See `supervised_tbptt_training_step`."""

    forward: ChunkForward
    step: OptimizerStep
    accumulation: Accumulation
    tbtt_step: int | TruncationPolicy
    loss_fn: Callable[[Any, Any], Any]
    loss_weight: Callable[[Any, Any], Any] | None
    output_transform: Callable[[Any, Any, Any, Any], Any]
    split_batch: SplitBatch
    carry: HiddenCarry
    recompute: Recompute | None = None

    def attach(self, engine: Engine) -> None:
        """Give `engine`, whose process function this is, the events, the counters and the carried state."""
        if self.carry.stateful and not isinstance(engine, TimeEngine):
            warnings.warn(
                f"checkpoints of a plain {type(engine).__name__} do not hold the carried hidden state: the run cannot "
                "be resumed inside an epoch. create_supervised_tbptt_trainer makes an engine whose checkpoints do.",
                UserWarning,
                stacklevel=2,
            )
        register_time_events(engine, *Tbptt_Events)
        engine.state.tbtt_step = self.tbtt_step  # type: ignore[attr-defined]
        track_position(engine, self.carry.stateful).step = self
        engine.add_event_handler(Events.STARTED, _require_one_epoch_length)

    def __call__(self, engine: Engine, batch: Any) -> float:
        """Train on one batch and return its mean loss over the time steps that count."""
        state: Any = engine.state
        if not isinstance(getattr(state, "tbptt", None), TimeState):
            raise RuntimeError("the engine has no time events: call attach(engine) on the training step before a run.")
        cut, windows = self._plan(state, batch)
        state.time_iterations_per_sequence = len(windows)
        chunks = _Chunks(cut, self.carry.through(state, windows, cut))
        state.tbptt.inside_batch = True
        try:
            for group in self.accumulation.groups(windows):
                if self._run_group(engine, group, chunks):
                    return chunks.mean_loss()
        finally:
            chunks.hidden.leave()
        state.tbptt.inside_batch = False
        if not chunks.has_target:
            raise ValueError(
                "no chunk of the batch had a target: prepare_batch returned y=None for all of them, so there is no "
                "loss to train on."
            )
        return chunks.mean_loss()

    def _plan(self, state: Any, batch: Any) -> tuple[Cut, list[Window]]:
        try:
            length, cut = self.split_batch(batch, self.carry.dim)
            windows = plan_windows(as_policy(state.tbtt_step), length, state.iteration)
        except Exception:
            ranks.gather(REFUSED)  # the others wait for this rank's number, and must not wait for ever
            raise
        ranks.require_same(f"time iterations in iteration {state.iteration}", len(windows))
        return cut, windows

    def _run_group(self, engine: Engine, group: Sequence[Window], chunks: _Chunks) -> bool:
        """Run windows that share an optimizer step, and take it.

        Returns:
            Whether the batch was cut short: a handler asked to stop and there are windows left.
        """
        state: Any = engine.state
        expected, share = self.accumulation.expected(group), 0.0
        for window in group:
            first = window[0]
            x, y = self.forward.prepare(chunks.cut(first.start, first.stop - first.start))
            if first.start != chunks.hidden.end:
                chunks.hidden.go_back_to(first.start)
            state.time_iteration += 1
            chunks.mode_may_have_changed |= fire(engine, Tbptt_Events.TIME_ITERATION_STARTED)
            # A handler, or a callable of the user's, may have run an evaluator.
            if chunks.mode_may_have_changed or not getattr(self.forward.model, "training", False):
                self.forward.model.train()
                chunks.mode_may_have_changed = False
            if window is group[0]:
                self.step.zero()
            x, y, y_pred, loss, objective, steps = self._run_window(window, x, y, chunks)
            state.counted_steps = steps
            part = self.accumulation.share(steps)
            # Which steps count is known to each rank alone, yet all must take part in the same backward passes.
            joint = part if self.loss_weight is None else ranks.mean_number(part)
            if part:
                self.step.backward(objective if part == expected else objective * (part / expected))
            elif joint:
                self.step.backward(zero_through(y_pred))
            share += joint
            state.output = self.output_transform(x, y, y_pred, loss)
            chunks.steps += steps
            chunks.total += steps * (state.output if self.output_transform is loss_item else _without_sync(loss))
            del x, y, y_pred, loss, objective  # the next chunk does not have to fit beside this one
            if share and window is group[-1]:
                chunks.mode_may_have_changed |= self._take_step(engine, expected / share)
            chunks.mode_may_have_changed |= fire(engine, Tbptt_Events.TIME_ITERATION_COMPLETED)
            if stop_requested(engine):
                return chunks.hidden.windows_left()
        return False

    def _run_window(self, window: Window, x: Any, y: Any, chunks: _Chunks) -> tuple[Any, Any, Any, Any, Any, float]:
        """Run the segments of a window in one graph.

        Returns:
            (x, y, y_pred) of the last segment; the mean loss over the steps that count (a zero without a graph where
            none does); the objective, in which segments have their weights; and how many steps count.
        """
        hidden = chunks.hidden.start(x)
        losses: list[Any] = []
        counts: list[float] = []
        run_segment = self._run_segment if self.recompute is None else self._run_segment_again_in_backward
        for start, stop, carry_scale, loss_weight in window:
            if counts:
                x, y = self.forward.prepare(chunks.cut(start, stop - start))
                hidden = scale_gradient(hidden, carry_scale)
            count: float = 0
            if y is not None:
                chunks.has_target = True
                if loss_weight:
                    count = stop - start if self.loss_weight is None else self._count(x, y)
            if self.forward.amp_mode is None:
                y_pred, hidden, loss = run_segment(x, y, hidden, count)
            else:
                with self.forward.autocast(x):
                    y_pred, hidden, loss = run_segment(x, y, hidden, count)
            losses.append(loss)
            counts.append(count)
            chunks.hidden.reach(stop, hidden)
        if len(window) == 1 and loss_weight == 1.0 and count:
            return x, y, y_pred, loss, loss, count
        steps = sum(counts)
        if not steps:
            return x, y, y_pred, torch.zeros(()), None, 0
        mean = _weighted_sum([count / steps for count in counts], losses)
        return x, y, y_pred, mean, _weighted_sum(self.accumulation.coefficients(window, counts), losses), steps

    def _run_segment_again_in_backward(self, x: Any, y: Any, hidden: Any, count: float) -> tuple[Any, Any, Any]:
        y_pred, hidden, loss = self.recompute(self._run_segment, x, y, hidden, count)  # type: ignore[misc]
        # A copy: on the CPU the scalar of mse_loss lies in a storage of all elements, which would stay till backward.
        return y_pred, hidden, None if loss is None else loss.clone()

    def _run_segment(self, x: Any, y: Any, hidden: Any, count: float) -> tuple[Any, Any, Any]:
        y_pred, hidden = self.forward.predict(x, hidden)
        return y_pred, hidden, checked_loss(self.loss_fn(y_pred, y)) if count else None

    def _count(self, x: Any, y: Any) -> float:
        """Return how many time steps of a chunk count, by the user's `loss_weight`."""
        count = float(self.loss_weight(x, y))  # type: ignore[misc]
        if not (math.isfinite(count) and count >= 0):
            raise ValueError(
                f"loss_weight must return a finite number that is not negative, the steps that count, got {count}."
            )
        return count

    def _take_step(self, engine: Engine, factor: float) -> bool:
        """Step on the gradients, unless a handler that looks at them asks to terminate.

        Returns:
            Whether a handler ran.
        """
        handlers_ran = has_listeners(engine, Tbptt_Events.BACKWARD_COMPLETED)
        look = (lambda: not _stop_before_step(engine)) if handlers_ran or ranks.count() > 1 else None
        if self.step.take(factor, look):
            engine.state.optimizer_step += 1  # type: ignore[attr-defined]
            handlers_ran |= fire(engine, Tbptt_Events.OPTIMIZER_STEP_COMPLETED)
        return handlers_ran


def _stop_before_step(engine: Engine) -> bool:
    """Fire BACKWARD_COMPLETED and return whether the step is to be withheld, on this rank and so on all."""
    asked = fire_and_ask(engine, Tbptt_Events.BACKWARD_COMPLETED)
    if ranks.count() == 1:
        return asked
    # A rank that saw a NaN in its own loss has poisoned the gradients of all by now.
    stop_all, stop_epoch = (any(ranks.gather(bool(flag))) for flag in (engine.should_terminate, asked))
    if stop_epoch and not asked:
        engine.terminate() if stop_all else engine.terminate_epoch()
    return stop_epoch


def _weighted_sum(factors: Sequence[float], losses: Sequence[Any]) -> Any:
    terms = [
        loss if factor == 1.0 else factor * loss
        for factor, loss in zip(factors, losses, strict=True)
        if loss is not None
    ]
    return terms[0] if len(terms) == 1 else sum(terms)


def _without_sync(loss: Any) -> Any:
    """Return the loss as a tensor that adds up: an output_transform without .item() keeps a GPU from waiting."""
    loss = loss.detach()
    return loss if loss.device.type == "mps" else loss.double()


def _require_one_epoch_length(engine: Engine) -> None:
    length = engine.state.epoch_length
    ranks.require_same("batches in an epoch", ranks.REFUSED if length is None else length)
