"""What a checkpoint of an engine over time holds, and where a run goes on.

`engine.state_dict()` gets one more entry, ``"tbptt"``, in plain types that ``torch.load(weights_only=True)`` accepts. A
state dict without it, from contrib's trainer say, loads as well.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from ignite.engine import DeterministicEngine, Engine, Events

from ignite_tbptt import nest, ranks
from ignite_tbptt.events import WindowEngine

KEY = "tbptt"


class TimeEngine(WindowEngine):
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
            "tbtt_step": serialized_tbtt_step(state.tbtt_step),
            "data_position": state.tbptt.data_position,
            "batch_in_epoch": state.tbptt.batch_in_epoch,
            "inside_batch": state.tbptt.inside_batch,
            "rank": None if hidden is None else ranks.own(),
            "hidden": pack_hidden(hidden),
            "hidden_rows": state.tbptt.rows,
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
        state, place = self.state, self.state.tbptt
        state.hidden, place.rows, place.hidden_restored = hidden, None, hidden is not None
        place.batch_in_epoch = place.data_position = 0
        place.resume_data_at = state.iteration % (state.epoch_length or state.iteration + 1)
        if own is not None:
            state.time_iteration, state.optimizer_step = own["time_iteration"], own["optimizer_step"]
            place.rows = own["hidden_rows"]
            self._restore_tbtt_step(own["tbtt_step"])
            _warn_of_a_place_between(own, place.resume_data_at)
            place.resume_data_at = own["data_position"]

    def _restore_tbtt_step(self, saved: Any) -> None:
        if not isinstance(saved, str):
            self.state.tbtt_step = saved
        elif saved != (here := serialized_tbtt_step(self.state.tbtt_step)):
            warnings.warn(
                f"the checkpoint was saved while engine.state.tbtt_step was {saved}, here it is {here}: "
                "set it as it was, or the run goes on with other windows.",
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


def serialized_tbtt_step(tbtt_step: Any) -> int | float | str:
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


@dataclass
class TimeState:
    """What an engine over time keeps for itself, as ``engine.state.tbptt``; handlers have no business here.

    Attributes:
        step: the process function, None for an evaluator.
        rows: rows of the batch that left the carried state, None where they are not known.
        hidden_restored: the carried state comes from a checkpoint, perhaps of another device.
        data_position: batches drawn since the data began.
        batch_in_epoch: batches drawn since the epoch began.
        inside_batch: some windows of a batch have been run, and some have not.
        shared_step: the windows that share the next optimizer step.
        layout_is_unknown: no chunk has shown yet whether the model takes the time axis for time.
        weighs_losses: chunks have a `loss_weight`.
        gradients_were_seen: a first backward has been looked at for parameters without a gradient.
        resume_data_at: where a loaded checkpoint wants the data to go on; None where none was loaded.
    """

    step: Any = None
    rows: int | None = None
    hidden_restored: bool = False
    data_position: int = 0
    batch_in_epoch: int = 0
    inside_batch: bool = False
    shared_step: Any = None
    layout_is_unknown: bool = True
    weighs_losses: bool = False
    gradients_were_seen: bool = False
    resume_data_at: int | None = None


def track_position(engine: Engine, stateful: bool) -> TimeState:
    """Reset the carried state where an epoch or the data begin, and count the batches since then.

    After a checkpoint was loaded the data are asked to go on where they were, and inside an epoch the state stays.
    """
    state: Any = engine.state
    state.hidden, state.tbptt = None, TimeState()
    place: TimeState = state.tbptt

    def begin_data(engine: Engine, iter_counter: int = 0) -> None:
        if place.batch_in_epoch:  # otherwise the epoch has just begun, and its handlers may have set a state
            state.hidden = None
        place.data_position = 0

    def begin_epoch(engine: Engine) -> None:
        place.batch_in_epoch = 0
        if place.resume_data_at is None:
            state.hidden = None
            return
        if state.iteration % (state.epoch_length or state.iteration + 1) == 0:
            state.hidden = None
        else:
            place.batch_in_epoch = state.iteration % (state.epoch_length or state.iteration + 1)
        _resume_data(engine, stateful)

    def draw_batch(engine: Engine) -> None:
        place.data_position += 1
        place.batch_in_epoch += 1

    engine.add_event_handler(Events.STARTED, begin_data)
    engine.add_event_handler(Events.EPOCH_STARTED, begin_epoch)
    engine.add_event_handler(Events.GET_BATCH_COMPLETED, draw_batch)
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, begin_data)
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, begin_data)
    return place


def _resume_data(engine: Engine, stateful: bool) -> None:
    state: Any = engine.state
    place: TimeState = state.tbptt
    data, position = state.dataloader, place.resume_data_at or 0
    place.resume_data_at = None
    if hasattr(data, "__len__"):
        position %= len(data)
    place.data_position = position
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


_PLAIN = (bool, int, float, str, type(None))


def pack_hidden(hidden: Any) -> Any:
    """Return the state in the plain types that ``torch.load(weights_only=True)`` accepts.

    Tensors are detached and cloned, so that the view of a last step does not save the storage of all steps. A container
    of a class of its own becomes a dict that names the class; `unpack_hidden` finds it again.

    Raises:
        ValueError: the state holds something that would not come back from a file.
    """
    if isinstance(hidden, torch.Tensor):
        return hidden.detach().clone()
    if type(hidden) in _PLAIN:
        return hidden
    if type(hidden) in (list, tuple):
        return type(hidden)(pack_hidden(child) for child in hidden)
    if type(hidden) is dict and "__class__" not in hidden:
        return {key: pack_hidden(child) for key, child in hidden.items()}
    pairs = nest.children(hidden)
    name = [type(hidden).__module__, type(hidden).__qualname__]
    if pairs is None or _find_class(*name) is not type(hidden):
        raise ValueError(
            f"the carried hidden state holds a {'.'.join(name)}, which would not come back from a checkpoint. It may "
            "hold tensors, numbers, strings and None in dicts, lists, tuples, and named tuples, dataclasses or "
            "subclasses of those that are defined at the top level of a module."
        )
    return {"__class__": name, "children": {key: pack_hidden(child) for key, child in pairs}}


def unpack_hidden(packed: Any) -> Any:
    """Return the state that `pack_hidden` packed.

    Raises:
        ValueError: a class of the state cannot be found under the name that it was saved with.
    """
    if isinstance(packed, (list, tuple)):
        return type(packed)(unpack_hidden(child) for child in packed)
    if not isinstance(packed, dict):
        return packed
    if "__class__" not in packed:
        return {key: unpack_hidden(child) for key, child in packed.items()}
    kind = _find_class(*packed["__class__"])
    if kind is None:
        raise ValueError(
            f"the checkpoint carries a hidden state of the class {'.'.join(packed['__class__'])}, which is not there. "
            "Define it at the top level of its module, and import that module before the checkpoint is loaded."
        )
    values = {key: unpack_hidden(value) for key, value in packed["children"].items()}
    if issubclass(kind, Mapping):
        return kind(values)  # type: ignore[call-arg]
    if hasattr(kind, "_fields"):
        return kind(**values)
    if issubclass(kind, (list, tuple)):
        return kind(values.values())
    # Fields are set as they were, past any __init__: the state is restored, not made anew.
    state = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(state, name, value)
    return state


def _find_class(module: str, name: str) -> type | None:
    # Only what the program has imported itself and what is a plain container is ever looked up: a checkpoint runs no
    # code of its own choice.
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        return None
    return found if dataclasses.is_dataclass(found) or issubclass(found, (Mapping, list, tuple)) else None
