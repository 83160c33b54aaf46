"""The events of time iterations, their counters on `engine.state`, and metric usages that live on them.

A time iteration is one window of a truncation policy: a chunk of the sequence. Every Ignite handler that takes an
event takes these, with ``every``, ``once``, ``before``, ``after`` and ``event_filter`` too.
"""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, EventEnum, Events
from ignite.metrics.metric import MetricUsage


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
    """The gradients of the coming optimizer step are there, unscaled: clip, inspect, or call `engine.terminate()` and
    the step is not taken. `engine.state.output` is the window's. Counts time iterations."""
    OPTIMIZER_STEP_COMPLETED = "optimizer_step_completed"
    """The parameters have been stepped: the place for learning-rate schedulers. Counts optimizer steps."""


_EVENT_TO_ATTR: dict[Any, str] = {
    Tbptt_Events.TIME_ITERATION_STARTED: "time_iteration",
    Tbptt_Events.TIME_ITERATION_COMPLETED: "time_iteration",
    Tbptt_Events.BACKWARD_COMPLETED: "time_iteration",
    Tbptt_Events.OPTIMIZER_STEP_COMPLETED: "optimizer_step",
}


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
