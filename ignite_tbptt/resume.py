"""What a checkpoint of an engine over time holds, and where a run goes on.

`engine.state_dict()` gets one more entry, ``"tbptt"``, in plain types that ``torch.load(weights_only=True)`` accepts. A
state dict without it, from contrib's trainer say, loads as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ignite.engine import DeterministicEngine, Engine, Events

from ignite_tbptt.hidden import pack_hidden, unpack_hidden

KEY = "tbptt"


class TimeEngine(Engine):
    """An Ignite engine whose state dict also holds the counters of time, the carried state and the settings."""

    state: Any  # Ignite's State, which takes the attributes of time as it takes a user's

    def __init__(self, process_function: Callable[[Engine, Any], Any], settings: Mapping[str, Any]) -> None:
        super().__init__(process_function)
        self._settings = dict(settings)

    def state_dict(self) -> Any:
        """Return Ignite's state dict with the entry "tbptt"; see `Engine.state_dict`."""
        state = self.state
        saved = super().state_dict()
        if "rng_states" in saved:
            saved["rng_states"] = [_plain(rng_state) for rng_state in saved["rng_states"]]
        stateful = self._settings["stateful"]
        saved[KEY] = {
            "settings": dict(self._settings),
            "time_iteration": state.time_iteration,
            "optimizer_step": state.optimizer_step,
            # What schedules it sets it again only at its next event. A policy is told by the settings.
            "tbtt_step": state.tbtt_step if isinstance(state.tbtt_step, (int, float)) else None,
            "hidden": pack_hidden(state.hidden) if stateful else None,
            "hidden_rows": state.hidden_rows if stateful else None,
        }
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; see `Engine.load_state_dict`.

        Raises:
            ValueError: the checkpoint is of a trainer with other settings. Nothing has been loaded then.
        """
        own = state_dict.get(KEY)
        if own is not None:
            self._check_settings(own["settings"])
        hidden = None if own is None else unpack_hidden(own["hidden"])
        super().load_state_dict(state_dict)
        state = self.state
        state.hidden, state.hidden_rows, state.hidden_restored = hidden, None, hidden is not None
        if own is None:
            return
        state.time_iteration, state.optimizer_step = own["time_iteration"], own["optimizer_step"]
        state.hidden_rows = own["hidden_rows"]
        if own["tbtt_step"] is not None:
            state.tbtt_step = own["tbtt_step"]

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


def carry_hidden(engine: Engine, stateful: bool) -> None:
    """Put the carried state on `engine.state` and reset it where an epoch begins.

    Mid-epoch, after a checkpoint was loaded, the state stays and the data are asked to go on where it belongs.
    """
    state: Any = engine.state
    state.hidden, state.hidden_rows, state.hidden_restored = None, None, False

    def begin_epoch(engine: Engine) -> None:
        if not resumes_inside_epoch(engine):
            engine.state.hidden = None  # type: ignore[attr-defined]
        elif not isinstance(engine, DeterministicEngine):  # that one skips what it has seen by itself
            _skip_seen_batches(engine, stateful)

    engine.add_event_handler(Events.EPOCH_STARTED, begin_epoch)


def resumes_inside_epoch(engine: Engine) -> bool:
    """Tell a resume in the middle of an epoch from a new epoch, at EPOCH_STARTED.

    A loaded checkpoint sets the epoch to iteration // epoch_length. After terminate() and terminate_epoch() the epoch
    counter is ahead of that, and Ignite begins the data anew.
    """
    state = engine.state
    if state.epoch_length is None:
        return state.iteration > 0
    return state.iteration % state.epoch_length != 0 and state.iteration // state.epoch_length + 1 == state.epoch


def _skip_seen_batches(engine: Engine, stateful: bool) -> None:
    data: Any = engine.state.dataloader
    if hasattr(data, "resume_at"):
        iteration = engine.state.iteration
        data.resume_at(iteration if engine.state.epoch_length is None else iteration % engine.state.epoch_length)
    elif stateful and data is not None and not isinstance(data, Iterator) and not hasattr(data, "load_state_dict"):
        warnings.warn(
            f"a stateful run goes on at iteration {engine.state.iteration}, inside an epoch, but its data "
            f"({type(data).__name__}) begin anew: the carried hidden state meets batches that it does not belong to. "
            "Give data with resume_at(batch), as ContiguousStreams has, an iterator that is already there, or "
            "deterministic=True.",
            UserWarning,
            stacklevel=2,
        )
