"""Where an engine is in its data, and where the sequences begin whose state it carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ignite.engine import Engine, Events
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from ignite_tbptt.optimization import SharedStep
from ignite_tbptt.warn import warn


@dataclass
class Resume:
    """Where a loaded checkpoint wants a run to go on.

    Attributes:
        iteration: of Ignite; a run that begins at another one is a new run.
        position: batches drawn since the data began; None if the checkpoint does not tell, but for its iteration.
        hidden: the carried state.
        fingerprint: of the data.
        epoch_was_left: all batches of an epoch were done, and its EPOCH_COMPLETED was not fired.
    """

    iteration: int
    position: int | None
    hidden: Any
    fingerprint: dict[str, Any] | None = None
    epoch_was_left: bool = False


@dataclass
class TimeState:
    """What an engine over time keeps for itself, as ``engine.state.tbptt``; handlers have no business here.

    Attributes:
        step: the process function, None for an evaluator.
        stateful: False, True or "data", as the factories take it; None for an engine without events of time.
        rows: rows of the batch that left the carried state, None where they are not known.
        hidden_restored: the carried state comes from a checkpoint, perhaps of another device.
        left: the carried state as the last batch left it, to be told from one that was set since.
        is_fresh: no batch was drawn since the run or the epoch began.
        data_are_new: the next batch does not go on where the one before ended.
        data_position: batches drawn since the data began.
        batch_in_epoch: batches drawn in an epoch that has not been completed.
        inside_batch: some windows of a batch have been run, and some have not.
        shared_step: the windows that share the next optimizer step.
        layout_is_unknown: no chunk has shown yet whether the model takes the time axis for time.
        weighs_losses: chunks have a `loss_weight`.
        run_failed: the run before ended in an exception, and not before it began.
        gradients_were_seen: a first backward has been looked at for parameters without a gradient.
        resume: what a loaded checkpoint asks of the next run.
    """

    step: Any = None
    stateful: bool | str | None = None
    rows: int | None = None
    hidden_restored: bool = False
    left: Any = None
    is_fresh: bool = True
    data_are_new: bool = False
    data_position: int = 0
    batch_in_epoch: int = 0
    inside_batch: bool = False
    shared_step: SharedStep = field(default_factory=SharedStep)
    layout_is_unknown: bool = True
    weighs_losses: bool = False
    run_failed: bool = False
    gradients_were_seen: bool = False
    resume: Resume | None = None

    def begin_data(self, hidden: Any) -> None:
        """Let the next batch be the first of its data."""
        if not self.is_fresh:
            self.left = hidden
        self.data_are_new, self.data_position = True, 0


def track_position(engine: Engine, stateful: bool | str) -> TimeState:
    """Reset the carried state where sequences begin, and count the batches since then.

    Sequences begin with every batch; with stateful=True where an epoch or the data begin; with stateful="data" where
    the data begin. A state that is set after the batch before was left is kept: it is what the sequence begins with.
    """
    state: Any = engine.state
    if not isinstance(getattr(state, "tbptt", None), TimeState):
        state.tbptt = TimeState()
    place: TimeState = state.tbptt
    place.stateful, state.hidden = stateful, None
    engine.add_event_handler(Events.STARTED, _begin_run)
    engine.add_event_handler(Events.EPOCH_STARTED, _begin_epoch)
    engine.add_event_handler(Events.GET_BATCH_STARTED, _before_batch)
    engine.add_event_handler(Events.GET_BATCH_COMPLETED, _begin_batch)
    engine.add_event_handler(Events.ITERATION_STARTED, _begin_batch_without_data)
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, _begin_data)
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, _begin_data)
    for event in (Events.EPOCH_COMPLETED, Events.TERMINATE_SINGLE_EPOCH):
        engine.add_event_handler(event, _end_epoch)
    for event in (Events.INTERRUPT, Events.TERMINATE, Events.COMPLETED):
        engine.add_event_handler(event, _leave_run)
    return place


def _begin_run(engine: Any) -> None:
    state, place = engine.state, engine.state.tbptt
    if place.resume is not None and place.resume.iteration != state.iteration:
        place.resume = None
    if place.resume is not None:
        engine.check_data(place.resume)
        if place.resume.epoch_was_left:
            _warn_of_epoch_left(engine)
    elif state.hidden is place.left:
        state.hidden = place.rows = None
    place.data_position = place.batch_in_epoch = 0
    place.is_fresh, place.data_are_new, place.inside_batch = True, False, False
    if place.stateful and _is_shuffled(state.dataloader):
        warn(
            f"stateful={place.stateful!r} carries the hidden state from batch to batch, but the DataLoader shuffles: "
            "row i of a batch does not go on where row i of the one before ended. Give ContiguousStreams, or "
            "shuffle=False."
        )


def _begin_epoch(engine: Any) -> None:
    state, place = engine.state, engine.state.tbptt
    if place.resume is not None:
        place.resume.hidden = state.hidden  # or what was set since
    elif place.stateful != "data" and not (place.is_fresh and state.hidden is not place.left):
        state.hidden = None
    if not place.is_fresh:
        place.left = state.hidden
    place.is_fresh, place.batch_in_epoch = True, 0


def _before_batch(engine: Any) -> None:
    place = engine.state.tbptt
    if not place.data_are_new:
        place.data_are_new = not place.stateful
        if not place.is_fresh:
            place.left = engine.state.hidden


def _begin_batch(engine: Any) -> None:
    state, place = engine.state, engine.state.tbptt
    if place.data_are_new and state.hidden is place.left:
        state.hidden = None
    place.is_fresh, place.data_are_new, place.inside_batch = False, False, True
    place.data_position += 1
    place.batch_in_epoch += 1


def _begin_batch_without_data(engine: Any) -> None:
    if engine.state.dataloader is None:  # Ignite fires no GET_BATCH events then
        _before_batch(engine)
        _begin_batch(engine)


def _begin_data(engine: Any, iter_counter: int = 0) -> None:
    engine.state.tbptt.begin_data(engine.state.hidden)


def _end_epoch(engine: Any, iter_counter: int = 0) -> None:
    engine.state.tbptt.batch_in_epoch = 0


def _leave_run(engine: Any) -> None:
    engine.state.tbptt.left, engine.state.tbptt.is_fresh = engine.state.hidden, True


def _warn_of_epoch_left(engine: Any) -> None:
    handlers = [handler for handler, *_ in engine._event_handlers.get(Events.EPOCH_COMPLETED, [])]
    names = [
        getattr(handler, "__qualname__", type(handler).__name__)
        for handler in handlers
        if not str(handler.__module__).startswith(__package__)
    ]
    if names:
        warn(
            f"the checkpoint was saved after the last batch of epoch {engine.state.epoch} and before its "
            f"EPOCH_COMPLETED: {', '.join(names)} did not run for that epoch, and will not. Save at EPOCH_COMPLETED as "
            "well, or call them."
        )


def _is_shuffled(data: Any) -> bool:
    if not isinstance(data, DataLoader):
        return False
    samplers = data.sampler, getattr(data.batch_sampler, "sampler", None)
    random = RandomSampler, SubsetRandomSampler, WeightedRandomSampler
    return any(isinstance(sampler, random) or getattr(sampler, "shuffle", False) is True for sampler in samplers)
