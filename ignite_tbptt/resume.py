"""What a checkpoint of an engine over time holds, and where a run goes on.

`engine.state_dict()` gets one more entry, ``"tbptt"``, in plain types that ``torch.load(weights_only=True)`` accepts. A
state dict without it, from contrib's trainer say, loads as well.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from ignite.engine import DeterministicEngine, Engine, Events

from ignite_tbptt import ranks
from ignite_tbptt.hidden import pack_hidden, unpack_hidden

KEY = "tbptt"


class TimeEngine(Engine):
    """An Ignite engine whose state dict also holds the counters of time, the carried state and the settings."""

    state: Any  # Ignite's State, which takes the attributes of time as it takes a user's

    def __init__(self, process_function: Callable[[Engine, Any], Any], settings: Mapping[str, Any]) -> None:
        super().__init__(process_function)
        self._settings = dict(settings)

    def state_dict(self) -> Any:
        """Return Ignite's state dict with the entry "tbptt"; see `Engine.state_dict`.

        Raises:
            ValueError: the carried state would not come back from a file.
        """
        state = self.state
        saved = super().state_dict()
        if "rng_states" in saved:
            saved["rng_states"] = [_plain(rng_state) for rng_state in saved["rng_states"]]
        hidden = state.hidden if self._settings["stateful"] else None
        saved[KEY] = {
            "settings": dict(self._settings),
            "time_iteration": state.time_iteration,
            "optimizer_step": state.optimizer_step,
            # What schedules it sets it again only at its next event.
            "tbtt_step": settled(state.tbtt_step),
            "data_position": state.data_position,
            "batch_in_epoch": state.batch_in_epoch,
            "inside_batch": state.inside_batch,
            "rank": None if hidden is None else ranks.own(),
            "hidden": pack_hidden(hidden),
            "hidden_rows": state.hidden_rows,
        }
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; see `Engine.load_state_dict`.

        Raises:
            ValueError: the checkpoint is of a trainer with other settings, or carries the hidden state of the rows of
                another rank. Nothing has been loaded then.
        """
        own = state_dict.get(KEY)
        if own is not None:
            self._check_settings(own["settings"])
            _check_rank(own["rank"])
        hidden = None if own is None else unpack_hidden(own["hidden"])
        super().load_state_dict(state_dict)
        # What an earlier run left here would make the next one go on there, or do nothing at all after an exception.
        self.should_terminate = self.should_terminate_single_epoch = self.should_interrupt = False
        self._dataloader_iter = self._init_iter = self._internal_run_generator = None
        state = self.state
        state.hidden, state.hidden_rows, state.hidden_restored = hidden, None, hidden is not None
        state.batch_in_epoch = state.data_position = 0
        state.resume_data_at = state.iteration % (state.epoch_length or state.iteration + 1)
        if own is not None:
            state.time_iteration, state.optimizer_step = own["time_iteration"], own["optimizer_step"]
            state.hidden_rows = own["hidden_rows"]
            self._restore_tbtt_step(own["tbtt_step"])
            _warn_of_a_place_between(own, state.resume_data_at)
            state.resume_data_at = own["data_position"]

    def _restore_tbtt_step(self, saved: Any) -> None:
        if not isinstance(saved, str):
            self.state.tbtt_step = saved
        elif saved != settled(self.state.tbtt_step):
            warnings.warn(
                f"the checkpoint was saved while engine.state.tbtt_step was {saved}, here it is "
                f"{settled(self.state.tbtt_step)}: set it as it was, or the run goes on with other windows.",
                UserWarning,
                stacklevel=3,
            )

    def _check_settings(self, saved: Mapping[str, Any]) -> None:
        different = [
            f"{name}={saved.get(name)!r} there and {value!r} here"
            for name, value in self._settings.items()
            if saved.get(name) != value
        ]
        if different:
            raise ValueError(
                f"the checkpoint is of a trainer with other settings: {'; '.join(different)}. Make the trainer as it "
                f"was; or, to go on with the new settings on purpose, leave the entry {KEY!r} out of its state dict "
                "(counters and carried state then start anew)."
            )


class DeterministicTimeEngine(TimeEngine, DeterministicEngine):
    """The same on Ignite's `DeterministicEngine`."""


def _plain(rng_state: Any) -> Any:
    """Return numpy's random state with its array as a list, which numpy takes back and weights_only lets through."""
    if not isinstance(rng_state, tuple):
        return rng_state
    return tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in rng_state)


def settled(tbtt_step: Any) -> int | float | str:
    """Return what of `tbtt_step` a checkpoint holds: a number as Python has it, or how a policy describes itself."""
    if isinstance(tbtt_step, Integral):
        return int(tbtt_step)
    if isinstance(tbtt_step, Real):
        return float(tbtt_step)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(tbtt_step))  # a class without a repr of its own tells its address


def _check_rank(saved: int | None) -> None:
    if saved is not None and saved != ranks.own():
        raise ValueError(
            f"the checkpoint carries the hidden state of the rows of rank {saved}, and this is rank {ranks.own()} with "
            "rows of its own. Let every rank save its own: Checkpoint(to_save, DiskSaver(f'checkpoints/{rank}'), "
            "save_on_rank=rank)."
        )


def _warn_of_a_place_between(saved: Mapping[str, Any], batch_in_epoch: int) -> None:
    if saved["inside_batch"]:
        warnings.warn(
            "the checkpoint was saved inside a batch, which has no place to resume from: the run goes on with the next "
            "batch, and the windows left in this one are not trained on. For an exact resume save at "
            "ITERATION_COMPLETED.",
            UserWarning,
            stacklevel=3,
        )
    elif batch_in_epoch and saved["batch_in_epoch"] != batch_in_epoch:
        warnings.warn(
            f"the checkpoint is of a run in which an epoch was cut short: it was at batch {saved['batch_in_epoch']} of "
            f"its epoch, and Ignite counts {batch_in_epoch}. The data go on where they were, but this epoch ends "
            "elsewhere than it would have.",
            UserWarning,
            stacklevel=3,
        )


def carry_hidden(engine: Engine, stateful: bool) -> None:
    """Put the carried state on `engine.state`, and reset it where an epoch or the data begin.

    After a checkpoint was loaded the data are asked to go on where they were, and inside an epoch the state stays.
    """
    state: Any = engine.state
    state.hidden, state.hidden_rows, state.hidden_restored = None, None, False
    state.data_position, state.batch_in_epoch, state.inside_batch = 0, 0, False
    state.resume_data_at = None

    def begin_data(engine: Engine, iter_counter: int = 0) -> None:
        if state.batch_in_epoch:  # otherwise the epoch has just begun, and its handlers may have set a state
            state.hidden = None
        state.data_position = 0

    def begin_epoch(engine: Engine) -> None:
        state.batch_in_epoch = 0
        if state.resume_data_at is None:
            state.hidden = None
            return
        if state.iteration % (state.epoch_length or state.iteration + 1) == 0:
            state.hidden = None
        else:
            state.batch_in_epoch = state.iteration % (state.epoch_length or state.iteration + 1)
        _resume_data(engine, stateful)

    def draw_batch(engine: Engine) -> None:
        state.data_position += 1
        state.batch_in_epoch += 1

    engine.add_event_handler(Events.STARTED, begin_data)
    engine.add_event_handler(Events.EPOCH_STARTED, begin_epoch)
    engine.add_event_handler(Events.GET_BATCH_COMPLETED, draw_batch)
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, begin_data)
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, begin_data)


def _resume_data(engine: Engine, stateful: bool) -> None:
    state: Any = engine.state
    data, position = state.dataloader, state.resume_data_at
    state.resume_data_at = None
    if hasattr(data, "__len__"):
        position %= len(data)
    state.data_position = position
    if not position or isinstance(engine, DeterministicEngine):  # that one skips what it has seen by itself
        return
    if hasattr(data, "resume_at"):
        data.resume_at(position)
    elif stateful and data is not None and not isinstance(data, Iterator) and not hasattr(data, "load_state_dict"):
        warnings.warn(
            f"a stateful run goes on at iteration {state.iteration}, after batch {position} of its data, but the data "
            f"({type(data).__name__}) begin anew: the carried hidden state meets batches that it does not belong to. "
            "Give data with resume_at(batch), as ContiguousStreams has, an iterator that is already there, or "
            "deterministic=True.",
            UserWarning,
            stacklevel=2,
        )
