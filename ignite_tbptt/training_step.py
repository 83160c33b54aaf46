"""The process function of the trainer: one batch, window by window, with an event at each turn.

It executes what others decide: a truncation policy lays out the windows, an accumulation says which of them share an
optimizer step, a reduction how their losses are put together, a splitter cuts the batch. None is known here by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine, Events

from ignite_tbptt.arguments import require_callable
from ignite_tbptt.checkpoint import TimeEngine
from ignite_tbptt.events import Tbptt_Events, fire, fire_and_ask, has_listeners, register_time_events, stop_requested
from ignite_tbptt.forward import ChunkForward, check_layout, count_steps
from ignite_tbptt.hidden import HiddenCarry, HiddenThroughBatch, scale_gradient
from ignite_tbptt.model_state import ModelState
from ignite_tbptt.optimization import Accumulation, OptimizerStep, Reduction, SharedStep, checked_loss, zero_through
from ignite_tbptt.output import BatchOutput
from ignite_tbptt.policies import as_policy
from ignite_tbptt.position import TimeState, track_position
from ignite_tbptt.ranks import REFUSED, Ballot, Ranks, Stop
from ignite_tbptt.recompute import Recompute, RerunCheck
from ignite_tbptt.sequence import Cut, SplitBatch
from ignite_tbptt.truncation import TruncationPolicy, Window, plan_windows
from ignite_tbptt.warn import warn


def loss_item(x: Any, y: Any, y_pred: Any, loss: Any) -> Any:
    """Return the loss as a number: the default of `output_transform`."""
    return loss.item()


@dataclass
class _Batch:
    """The batch in hand.

    Attributes:
        cut: cuts its chunks.
        length: its time steps.
        hidden: the state on its way through it.
        output: its output.
        targets: chunks that had a target.
        mode_may_have_changed: a handler may have called Module.eval() since the batch began; Module.train() for every
            chunk would cost a small model more than all events together.
    """

    cut: Cut
    length: int
    hidden: HiddenThroughBatch
    output: BatchOutput
    targets: int = 0
    mode_may_have_changed: bool = True


@dataclass
class _Result:
    """What the forward passes of a window gave: (x, y, y_pred) of its last segment, and its loss.

    Attributes:
        loss: mean loss over the steps that count; None where none does.
        objective: the loss that is back-propagated, in which segments have their weights.
        steps: how many time steps count.
        scale: factor on the step that the policy asks for.
    """

    x: Any
    y: Any
    y_pred: Any
    loss: Any = None
    objective: Any = None
    steps: float = 0
    scale: float = 1.0


@dataclass(frozen=True)
class TbpttTrainingStep:
    """The process function of the trainer: one batch, window by window. See `supervised_tbptt_training_step`."""

    forward: ChunkForward
    step: OptimizerStep
    accumulation: Accumulation
    reduction: Reduction
    ranks: Ranks
    tbtt_step: int | TruncationPolicy
    loss_fn: Callable[[Any, Any], Any]
    loss_weight: Callable[[Any, Any], Any] | None
    output_transform: Callable[[Any, Any, Any, Any], Any]
    split_batch: SplitBatch
    carry: HiddenCarry
    check_rerun: RerunCheck
    recompute: Recompute | None = None

    def __post_init__(self) -> None:
        require_callable("loss_fn", self.loss_fn, "loss_fn(y_pred, y) -> loss")
        require_callable("output_transform", self.output_transform, "output_transform(x, y, y_pred, loss) -> output")
        require_callable("split_batch", self.split_batch, "split_batch(batch, dim) -> (length, cut)")
        if self.loss_weight is not None:
            require_callable("loss_weight", self.loss_weight, "loss_weight(x, y) -> steps that count")

    def attach(self, engine: Engine) -> None:
        """Give `engine`, whose process function this is, the events, the counters and the carried state."""
        if self.carry.stateful and not isinstance(engine, TimeEngine):
            warn(
                f"checkpoints of a plain {type(engine).__name__} do not hold the carried hidden state: the run cannot "
                "be resumed inside an epoch. create_supervised_tbptt_trainer makes an engine whose checkpoints do."
            )
        register_time_events(engine, *Tbptt_Events)
        engine.state.tbtt_step = self.tbtt_step  # type: ignore[attr-defined]
        place = track_position(engine, self.carry.stateful)
        place.step = self
        place.weighs_losses = self.loss_weight is not None
        for event in (Events.STARTED, Events.TERMINATE, Events.TERMINATE_SINGLE_EPOCH):
            engine.add_event_handler(event, _forget_shared_step)
        engine.add_event_handler(Events.COMPLETED, _warn_of_windows_left)
        if self.ranks.count > 1:
            engine.add_event_handler(Events.STARTED, self._begin_run)
            engine.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)
            engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, self._leave, Stop.END_EPOCH)
            engine.add_event_handler(Events.TERMINATE, self._leave, Stop.TERMINATE)
            engine.add_event_handler(Events.INTERRUPT, self._leave, Stop.INTERRUPT)
            engine.add_event_handler(Events.COMPLETED, self._leave, Stop.DONE)

    def __call__(self, engine: Engine, batch: Any) -> Any:
        """Train on one batch and return its output: its mean loss over the time steps that count, by default."""
        if not isinstance(getattr(engine.state, "tbptt", None), TimeState):
            raise RuntimeError("the engine has no time events: call attach(engine) on the training step before a run.")
        try:
            return self._run_batch(engine, batch)
        except Exception as error:
            self.ranks.fail(error, engine.state.iteration)
            raise

    def _run_batch(self, engine: Engine, data: Any) -> Any:
        state: Any = engine.state
        place: TimeState = state.tbptt
        length, cut = self.split_batch(data, self.carry.dim)
        plan = plan_windows(as_policy(state.tbtt_step), length, state.iteration)
        state.time_iterations_per_sequence = count = len(plan)
        batch = _Batch(cut, length, self.carry.through(state, plan, cut), BatchOutput())
        try:
            for number, window in enumerate(plan, 1):
                if self._run_window(engine, batch, window, number == count):
                    state.iteration -= number == 1  # the others have not begun this batch
                    return batch.output.result()
                if stop_requested(engine) and number < count:
                    return batch.output.result()
        finally:
            batch.hidden.leave()
            state.counted_steps = batch.output.weight
        place.inside_batch = False
        if not batch.targets:
            raise ValueError(
                "no chunk of the batch had a target: prepare_batch returned y=None for all of them, so there is no "
                "loss to train on."
            )
        return batch.output.result()

    def _run_window(self, engine: Engine, batch: _Batch, window: Window, is_last: bool) -> bool:
        """Run a window through forward, backward and, if it is the last of those that share one, the optimizer step.

        Returns:
            Whether another rank has stopped, so that this window was left.
        """
        state: Any = engine.state
        place: TimeState = state.tbptt
        first = window[0]
        x, y = self.forward.prepare(batch.cut(first.start, first.stop - first.start))
        state.time_iteration += 1
        state.window_start, state.window_stop = batch.hidden.first_step(window), window[-1].stop
        batch.mode_may_have_changed |= fire(engine, Tbptt_Events.TIME_ITERATION_STARTED)
        # A handler, or a callable of the user's, may have run an evaluator.
        if batch.mode_may_have_changed or not getattr(self.forward.model, "training", False):
            self.forward.model.train()
            batch.mode_may_have_changed = False
        window = batch.hidden.begin(window)
        if window[0] != first:  # a handler has set a state behind the window's first steps
            state.window_start, first = window[0].start, window[0]
            x, y = self.forward.prepare(batch.cut(first.start, first.stop - first.start))
        if first.start < batch.hidden.end:
            self.check_rerun(self._run_segment, x, y, batch.hidden.start(x), 0)
        shared: SharedStep = place.shared_step
        shared.windows += 1
        closes = self.accumulation.closes(shared.windows, is_last, is_last and _ends_epoch(state))
        if shared.windows == 1:
            self.step.zero()
            if not closes:
                shared.expected = self.accumulation.expected(window[-1].stop - _first_counted(window), batch.length)
        if closes or self.ranks.count == 1:
            stopped = self._forward_backward_step(engine, batch, window, x, y, closes)
        else:
            with self.ranks.synchronised(False):
                stopped = self._forward_backward_step(engine, batch, window, x, y, closes)
        if stopped:
            state.time_iteration -= 1
            return True
        batch.mode_may_have_changed |= fire(engine, Tbptt_Events.TIME_ITERATION_COMPLETED)
        return False

    def _forward_backward_step(
        self, engine: Engine, batch: _Batch, window: Window, x: Any, y: Any, closes: bool
    ) -> bool:
        state: Any = engine.state
        shared: SharedStep = state.tbptt.shared_step
        result = self._run_segments(window, x, y, batch)
        if state.tbptt.layout_is_unknown:
            state.tbptt.layout_is_unknown = not check_layout(self.forward.model, result.x, state.hidden, self.carry.dim)
        state.counted_steps = steps = result.steps
        shared.steps += steps
        if steps:
            shared.scale += result.scale
            shared.scaled += 1
        mean_steps, scale, look = shared.steps, shared.scale / (shared.scaled or 1), None
        if closes and self.ranks.count > 1:
            ballots = self.ranks.vote(self._ballot(engine))
            if _follow(engine, ballots):
                return True
            mean_steps = sum(ballot.steps for ballot in ballots) / len(ballots)
            scale = sum(ballot.scale for ballot in ballots) / (sum(ballot.scaled for ballot in ballots) or 1)
            if any(ballot.listens for ballot in ballots):
                look = self._look_with_others
        elif closes and has_listeners(engine, Tbptt_Events.BACKWARD_COMPLETED):
            look = _look
        factor = correction = 1.0
        if closes and shared.windows == 1:  # everything is known before backward
            if mean_steps:
                shared.expected = mean_steps
                factor = self.reduction.factor(steps, shared) * self.reduction.correction(mean_steps, scale, shared)
        else:
            factor = self.reduction.factor(steps, shared)
            if closes and mean_steps:
                correction = self.reduction.correction(mean_steps, scale, shared)
        if steps:
            self._backward(result.objective if factor == 1.0 else result.objective * factor)
        elif closes and mean_steps and self.ranks.count > 1:  # the others wait for this rank in theirs
            self._backward(zero_through(result.y_pred))
        output = None
        if steps:
            output = self.output_transform(result.x, result.y, result.y_pred, result.loss)
            batch.output.add(output, steps)
        state.output = output
        if shared.windows > 1 or not closes:
            if shared.outputs is None:
                shared.outputs = BatchOutput()
            if steps:
                shared.outputs.add(output, steps)
        del result  # the next chunk does not have to fit beside this one
        if closes:
            if mean_steps:
                if shared.outputs is not None:
                    state.output = shared.outputs.result()
                batch.mode_may_have_changed |= self._take_step(engine, correction, look)
                state.output = output
            state.tbptt.shared_step = SharedStep()
        return False

    def _run_segments(self, window: Window, x: Any, y: Any, batch: _Batch) -> _Result:
        """Run the segments of a window in one graph."""
        hidden = batch.hidden.start(x)
        losses: list[Any] = []
        counts: list[float] = []
        run_segment = self._run_segment if self.recompute is None else self._run_segment_again_in_backward
        for start, stop, carry_scale, loss_weight in window:
            if counts:
                x, y = self.forward.prepare(batch.cut(start, stop - start))
                hidden = scale_gradient(hidden, carry_scale)
            count: float = 0
            if y is not None:
                batch.targets += 1
                if loss_weight:
                    count = count_steps(self.loss_weight, x, y, stop - start)
            if self.forward.amp_mode is None:
                y_pred, hidden, loss = run_segment(x, y, hidden, count)
            else:
                with self.forward.autocast(x):
                    y_pred, hidden, loss = run_segment(x, y, hidden, count)
            losses.append(loss)
            counts.append(count)
            batch.hidden.reach(stop, hidden)
        if len(window) == 1:
            result = _Result(x, y, y_pred, loss, loss, count)
        elif not (steps := sum(counts)):
            return _Result(x, y, y_pred)
        else:
            weights, shares = self.accumulation.weights(window, counts), [count / steps for count in counts]
            objective = self.reduction.combine(losses, weights)
            loss = objective if weights == shares else self.reduction.combine(losses, shares)
            result = _Result(x, y, y_pred, loss, objective, steps)
        # The loss of a sequence whose only target is at its end needs no balance with others.
        is_only_loss = count and batch.targets == 1 and stop == batch.length and start > 0
        result.scale = 1.0 if is_only_loss else self.accumulation.scale(window)
        return result

    def _run_segment_again_in_backward(self, x: Any, y: Any, hidden: Any, count: float) -> tuple[Any, Any, Any]:
        y_pred, hidden, loss = self.recompute(self._run_segment, x, y, hidden, count)  # type: ignore[misc]
        # A copy: on the CPU the scalar of mse_loss lies in a storage of all elements, which would stay till backward.
        return y_pred, hidden, None if loss is None else loss.clone()

    def _run_segment(self, x: Any, y: Any, hidden: Any, count: float) -> tuple[Any, Any, Any]:
        y_pred, hidden = self.forward.predict(x, hidden)
        return y_pred, hidden, checked_loss(self.loss_fn(y_pred, y)) if count else None

    def _backward(self, loss: Any) -> None:
        try:
            if self.ranks.count == 1:
                self.step.backward(loss)
            else:
                self.ranks.backward(lambda: self.step.backward(loss))
        except RuntimeError as error:
            forward = self.forward
            state = ModelState.of(forward.model, self.loss_fn, forward.model_fn, forward.model_transform)
            if "backward through the graph a second time" not in str(error) or not state.graphs():
                raise
            raise RuntimeError(
                f"the model keeps tensors with the graph of an earlier window: {', '.join(state.graphs())}. The "
                "trainer detaches the hidden state that the model returns, and knows of no other: return it, (y_pred, "
                "hidden), or detach it at Tbptt_Events.TIME_ITERATION_COMPLETED."
            ) from error

    def _take_step(self, engine: Engine, correction: float, look: Callable[[Engine], bool] | None) -> bool:
        """Step on the gradients, unless a handler that looks at them asks to terminate.

        Returns:
            Whether a handler ran.
        """
        place: TimeState = engine.state.tbptt  # type: ignore[attr-defined]
        if not place.gradients_were_seen:
            place.gradients_were_seen = True
            _warn_of_missing_gradients(self.forward.model)
        if self.step.take(correction, None if look is None else lambda: not look(engine)):
            engine.state.optimizer_step += 1  # type: ignore[attr-defined]
            return fire(engine, Tbptt_Events.OPTIMIZER_STEP_COMPLETED) or look is not None
        return True

    # Ranks

    def _begin_run(self, engine: Engine) -> None:
        self.ranks.run_is_over = False
        length = engine.state.epoch_length
        self.ranks.require_same("batches in an epoch", REFUSED if length is None else length)

    def _begin_epoch(self) -> None:
        self.ranks.epoch_is_over = False

    def _leave(self, engine: Engine, stop: Stop, iter_counter: int = 0) -> None:
        """Tell the other ranks that this one leaves the epoch or the run, unless they know."""
        if not (self.ranks.run_is_over or (stop == Stop.END_EPOCH and self.ranks.epoch_is_over)):
            self.ranks.vote(self._ballot(engine)._replace(stop=stop))

    def _ballot(self, engine: Engine) -> Ballot:
        state: Any = engine.state
        shared: SharedStep = state.tbptt.shared_step
        return Ballot(
            Stop.NOT,
            state.epoch,
            state.iteration,
            state.time_iterations_per_sequence or 0,
            shared.steps,
            shared.scale,
            shared.scaled,
            has_listeners(engine, Tbptt_Events.BACKWARD_COMPLETED),
        )

    def _look_with_others(self, engine: Engine) -> bool:
        """Fire BACKWARD_COMPLETED and return whether the step is to be withheld on any rank, and so on all.

        A rank that saw a NaN in its own loss has poisoned the gradients of all by now.
        """
        stop = Stop.NOT
        if _look(engine):
            stop = Stop.TERMINATE if engine.should_terminate else Stop.END_EPOCH
        return _follow(engine, self.ranks.vote(self._ballot(engine)._replace(stop=stop)))


def _look(engine: Engine) -> bool:
    """Fire BACKWARD_COMPLETED and return whether a handler asked to terminate, so that the step is withheld."""
    return fire_and_ask(engine, Tbptt_Events.BACKWARD_COMPLETED)


def _follow(engine: Engine, ballots: list[Ballot]) -> bool:
    """Stop as the first of the ranks does, and return whether one did."""
    stop = max(ballot.stop for ballot in ballots)
    if stop == Stop.END_EPOCH and not engine.should_terminate_single_epoch:
        engine.terminate_epoch()
    elif stop == Stop.TERMINATE and not engine.should_terminate:
        engine.terminate()
    return stop != Stop.NOT


def _ends_epoch(state: Any) -> bool:
    """Return whether the batch in hand is the last of its epoch, as far as that is known."""
    return bool(
        state.tbptt.batch_in_epoch == state.epoch_length or state.iteration == getattr(state, "max_iters", None)
    )


def _first_counted(window: Window) -> int:
    return next((segment.start for segment in window if segment.loss_weight), window[0].start)


def _forget_shared_step(engine: Engine, iter_counter: int = 0) -> None:
    engine.state.tbptt.shared_step = SharedStep()  # type: ignore[attr-defined]


def _warn_of_windows_left(engine: Engine) -> None:
    left = engine.state.tbptt.shared_step.windows  # type: ignore[attr-defined]
    if left:
        warn(
            f"the run ended while {left} windows waited for others to share an optimizer step with: no step was taken "
            "on them. The end of the epoch was not known beforehand; give run(..., epoch_length=...)."
        )


def _warn_of_missing_gradients(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        return
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    if missing:
        names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        warn(
            f"the first backward pass left {names} without a gradient. If the loss should depend on them, the graph is "
            "cut on the way: ignite_tbptt.find_graph_cuts(model, x) names the line. If not, requires_grad_(False) says "
            "so."
        )
