"""The events of time iterations, their counters on `engine.state`, and metrics that live on them.

A time iteration is one window of a truncation policy: a chunk of the sequence. Ignite handlers take these events as
they take its own, with ``every``, ``once``, ``before``, ``after`` and ``event_filter`` too. Two exceptions:
`TbpttProgressBar` stands in for `ProgressBar`, which knows Ignite's own events only, and `Checkpoint` needs a
`score_function` or a `global_step_transform`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ignite.engine import Engine, EventEnum, Events
from ignite.handlers import Checkpoint, TerminateOnNan
from ignite.metrics import Loss
from ignite.metrics.metric import Metric, MetricUsage


class Tbptt_Events(EventEnum):
    """Events of an engine that works through time in chunks.

    Example:
        Clip the gradients; under a gradient scaler they are unscaled already::

            @trainer.on(Tbptt_Events.BACKWARD_COMPLETED)
            def clip():
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    The counters are `engine.state.time_iteration` and `engine.state.optimizer_step`; both run on over batches and
    epochs and are 1 at the first event.
    """

    TIME_ITERATION_STARTED = "time_iteration_started"
    """A window is about to be run; `engine.state.hidden` is the state it will start from. Counts time iterations."""
    TIME_ITERATION_COMPLETED = "time_iteration_completed"
    """A window is done, stepped on or not. Counts time iterations."""
    BACKWARD_COMPLETED = "backward_completed"
    """The gradients of the coming optimizer step are there, unscaled. Clip, inspect, or call `engine.terminate()` and
    the step is not taken. `engine.state.output` is the window's, or the mean over the windows that share the step. The
    place for Ignite's parameter schedulers, which set the value for the step to come. Counts time iterations."""
    OPTIMIZER_STEP_COMPLETED = "optimizer_step_completed"
    """The parameters have been stepped. The place for ``scheduler.step()`` of torch. Counts optimizer steps."""


_EVENT_TO_ATTR: dict[Any, str] = {
    Tbptt_Events.TIME_ITERATION_STARTED: "time_iteration",
    Tbptt_Events.TIME_ITERATION_COMPLETED: "time_iteration",
    Tbptt_Events.BACKWARD_COMPLETED: "time_iteration",
    Tbptt_Events.OPTIMIZER_STEP_COMPLETED: "optimizer_step",
}


class WindowEngine(Engine):
    """An Ignite engine whose handlers take windows for what they are.

    Metrics and `TerminateOnNan` pass over a window or a batch without an output. Where windows have a `loss_weight`,
    the metric `Loss` weighs by it what it gets.
    """

    def add_event_handler(self, event_name: Any, handler: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Attach a handler; see `Engine.add_event_handler`.

        Raises:
            ValueError: a `Checkpoint` at an event of windows would name all files of a batch alike, and keep the first.
        """
        if isinstance(handler, Checkpoint) and event_name in list(Tbptt_Events):
            if handler.score_function is None and handler.global_step_transform is None:
                raise ValueError(
                    f"Checkpoint at {event_name.name} names its files by engine.state.iteration, which is the same for "
                    "all windows of a batch: it would keep the first of them. Give it global_step_transform="
                    "lambda engine, event: engine.state.time_iteration, or attach it at ITERATION_COMPLETED."
                )
        elif isinstance(handler, TerminateOnNan) or handler == getattr(_owner(handler), "iteration_completed", None):
            handler = _Update(handler)
        return super().add_event_handler(event_name, handler, *args, **kwargs)


def _owner(handler: Any) -> Metric | None:
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, Metric) else None


class _Update:
    """The update of a metric on a `WindowEngine`; equal to the method, by which Ignite finds it again."""

    def __init__(self, update: Callable[[Engine], None]) -> None:
        self._update = update

    def __eq__(self, other: object) -> bool:
        return self._update == (other._update if isinstance(other, _Update) else other)

    def __hash__(self) -> int:
        return hash(self._update)

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        metric = _owner(self._update)
        if state.output is None:
            return
        if not (isinstance(metric, Loss) and state.tbptt.weighs_losses):
            self._update(engine)
            return
        batch_size, metric._batch_size = metric._batch_size, lambda y: state.counted_steps
        try:
            self._update(engine)
        finally:
            metric._batch_size = batch_size


def register_time_events(engine: Engine, *events: Tbptt_Events) -> None:
    """Let `engine` fire `events`, and start their counters from 0 at every new run."""
    # Without event_to_attr a filtered handler attaches, and raises at the first event.
    engine.register_events(*events, event_to_attr=_EVENT_TO_ATTR)
    engine.state.time_iteration = 0  # type: ignore[attr-defined]
    engine.state.time_iterations_per_sequence = None  # type: ignore[attr-defined]
    engine.state.window_start = engine.state.window_stop = None  # type: ignore[attr-defined]
    engine.state.optimizer_step = 0  # type: ignore[attr-defined]
    engine.state.counted_steps = 0  # type: ignore[attr-defined]
    engine.add_event_handler(Events.STARTED, _restart_counters)


def _restart_counters(engine: Engine) -> None:
    # STARTED fires again when a run is resumed; Ignite itself zeroes only its own counters at a new run.
    if engine.state.iteration == 0:
        engine.state.time_iteration = 0  # type: ignore[attr-defined]
        engine.state.optimizer_step = 0  # type: ignore[attr-defined]


def has_listeners(engine: Engine, event: Tbptt_Events) -> bool:
    """Return whether a handler is attached to `event`."""
    return bool(engine._event_handlers.get(event._name_))


def fire(engine: Engine, event: Tbptt_Events) -> bool:
    """Fire `event` if anybody listens, and return whether somebody did.

    Four events a window add up: `Engine.fire_event` finds the event among those allowed by comparing names one by one,
    12 microseconds each. Ignite fires its own events by `_fire_event` as well.
    """
    if not engine._event_handlers.get(event._name_):
        return False
    engine._fire_event(event)
    return True


def fire_and_ask(engine: Engine, event: Tbptt_Events) -> bool:
    """Fire `event` and return whether one of its handlers asked the engine to terminate.

    A request from before is kept but not counted: who asked earlier wanted the window to be finished.
    """
    pending = engine.should_terminate, engine.should_terminate_single_epoch
    engine.should_terminate = engine.should_terminate_single_epoch = False
    try:
        fire(engine, event)
        return stop_requested(engine)
    finally:
        # The earlier request goes first: it may also say what to skip.
        engine.should_terminate = pending[0] or engine.should_terminate
        engine.should_terminate_single_epoch = pending[1] or engine.should_terminate_single_epoch


def stop_requested(engine: Engine) -> bool:
    """Return whether the windows end here: after `terminate()` or `terminate_epoch()`, but not after `interrupt()`."""
    return bool(engine.should_terminate or engine.should_terminate_single_epoch)


def _has_loss(engine: Any, _: int) -> bool:
    return bool(engine.state.counted_steps)


def _windows_with_a_loss() -> Any:
    """Return TIME_ITERATION_COMPLETED for windows in which a time step counts: the others have nothing to measure."""
    return Tbptt_Events.TIME_ITERATION_COMPLETED(event_filter=_has_loss)


class EpochTimeWise(MetricUsage):
    """Metric over an epoch, updated at every time iteration that has a target.

    Example:
        >>> from ignite.metrics import Average
        >>> Average().attach(trainer, "loss", usage=EpochTimeWise())  # doctest: +SKIP
    """

    usage_name = "epoch_time_wise"

    def __init__(self) -> None:
        super().__init__(
            started=Events.EPOCH_STARTED,
            completed=Events.EPOCH_COMPLETED,
            iteration_completed=_windows_with_a_loss(),
        )


class SequenceWise(MetricUsage):
    """Metric over the sequence of one batch, updated at every time iteration that has a target."""

    usage_name = "sequence_wise"

    def __init__(self) -> None:
        super().__init__(
            started=Events.ITERATION_STARTED,
            completed=Events.ITERATION_COMPLETED,
            iteration_completed=_windows_with_a_loss(),
        )


class RunningTimeWise(MetricUsage):
    """Metric over the run, updated and computed at every time iteration that has a target, as for `RunningAverage`."""

    usage_name = "running_time_wise"

    def __init__(self) -> None:
        super().__init__(
            started=Events.STARTED,
            completed=_windows_with_a_loss(),
            iteration_completed=_windows_with_a_loss(),
        )
