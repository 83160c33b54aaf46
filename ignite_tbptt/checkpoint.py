"""What a checkpoint of an engine over time holds, and where a run goes on.

`engine.state_dict()` gets one more entry, ``"tbptt"``, in plain types that ``torch.load(weights_only=True)`` accepts. A
state dict without it, from contrib's trainer say, loads as well.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from ignite.engine import DeterministicEngine, Engine

from ignite_tbptt import nest, ranks
from ignite_tbptt.events import WindowEngine
from ignite_tbptt.optimization import SharedStep
from ignite_tbptt.position import Resume, TimeState
from ignite_tbptt.warn import warn

KEY = "tbptt"


class TimeEngine(WindowEngine):
    """An Ignite engine whose state dict also holds the counters of time, the carried state and the settings.

    A run that goes on where a checkpoint was saved tells its data so: an object with ``resume_at(batch)`` is asked,
    right before it is iterated over, to begin with that batch. An object with ``fingerprint()``, which returns a dict
    of plain values, has it saved; a run that would go on with data of another fingerprint is refused.

    Args:
        process_function: as for `Engine`.
        settings: what a checkpoint must have in common with the engine that loads it, by name.

    Raises:
        TypeError: a setting is neither a number, nor a string, nor None.
    """

    state: Any  # Ignite's State, which takes the attributes of time as it takes a user's

    def __init__(
        self, process_function: Callable[[Engine, Any], Any], settings: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(process_function)
        self._settings = {name: _plain(name, value) for name, value in (settings or {}).items()}
        self._time = self.state.tbptt = TimeState()
        self.state.hidden = None

    def state_dict(self) -> Any:
        """Return Ignite's state dict, and the entry "tbptt" if the engine has events of time; see `Engine.state_dict`.

        Raises:
            TypeError: the fingerprint of the data holds something else than numbers, strings and None.
            ValueError: the carried state would not come back from a file.
        """
        state, place = self.state, self._time
        saved = super().state_dict()
        for name, value in saved.items():
            if isinstance(value, np.generic):  # epoch_length, say
                saved[name] = value.item()
        if "rng_states" in saved:
            saved["rng_states"] = [_plain_rng(rng_state) for rng_state in saved["rng_states"]]
        if place.stateful is None:
            return saved
        hidden = state.hidden if place.stateful else None
        saved[KEY] = {
            "settings": dict(self._settings),
            "time_iteration": state.time_iteration,
            "optimizer_step": state.optimizer_step,
            # What schedules it sets it again only at its next event.
            "tbtt_step": serialized_tbtt_step(state.tbtt_step),
            "data": _fingerprint(state.dataloader),
            "data_position": place.data_position,
            "batch_in_epoch": place.batch_in_epoch,
            "inside_batch": place.inside_batch,
            "windows_without_step": place.shared_step.windows,
            "rank": None if hidden is None else ranks.own(),
            "hidden": pack_hidden(hidden),
            "hidden_rows": place.rows,
        }
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; see `Engine.load_state_dict`.

        The next run goes on there. In a handler of a run whose data have begun, only the counters and the carried
        state are set: the data go on where they are, as they do in Ignite.

        Raises:
            ValueError: the checkpoint is of a trainer with other settings, or carries the hidden state of the rows of
                another rank. Nothing has been loaded then.
        """
        own: Any = state_dict.get(KEY) if isinstance(state_dict, Mapping) else None
        hidden = None
        if own is not None:
            self._check_settings(own["settings"])
            _check_rank(own["rank"])
            hidden = unpack_hidden(own["hidden"])
        super().load_state_dict(state_dict)
        state, place = self.state, self._time
        batch_in_epoch = state.iteration % (state.epoch_length or state.iteration + 1)
        state.hidden, place.hidden_restored, place.shared_step = hidden, hidden is not None, SharedStep()
        place.rows = None
        resume = Resume(state.iteration, None, hidden)
        if own is not None:
            state.time_iteration, state.optimizer_step = own["time_iteration"], own["optimizer_step"]
            place.rows = own["hidden_rows"]
            self._restore_tbtt_step(own["tbtt_step"])
            resume.position, resume.fingerprint = own["data_position"], own.get("data")
            resume.epoch_was_left = own["batch_in_epoch"] == state.epoch_length
            _warn_of_a_place_between(own, batch_in_epoch, state.epoch_length)
        generator: Any = self._internal_run_generator
        is_running = self._dataloader_iter is not None if generator is None else generator.gi_running
        if is_running and self._dataloader_iter is not None:
            if place.stateful and own is not None and resume.position != place.data_position:
                warn(
                    f"the checkpoint was loaded in a handler of a run: the data go on after batch {place.data_position}"
                    f" of theirs, with the hidden state that was carried there after batch {resume.position}. Set "
                    "engine.state.hidden = None to start from an initial one."
                )
            return
        place.resume, place.left, place.run_failed = resume, hidden, False
        if not is_running:
            # What an earlier run left here would make the next one go on there, or do nothing at all after an
            # exception.
            self.should_terminate = self.should_terminate_single_epoch = self.should_interrupt = False
            self._dataloader_iter = self._init_iter = self._internal_run_generator = None

    def set_data(self, data: Any) -> None:
        """Draw the next batch from `data`, with an initial hidden state; see `Engine.set_data`."""
        super().set_data(data)
        self._time.resume = None
        self._time.begin_data(self.state.hidden)

    def _internal_run(self) -> Any:
        try:
            return super()._internal_run()
        except BaseException:
            self._internal_run_generator = None
            self._time.run_failed = self._time.resume is None  # else it was refused, and may be resumed with other data
            raise

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run; see `Engine.run`.

        Behind a run that ended in an exception a new one begins, unless a checkpoint is loaded. Ignite's own engine
        returns None from it at once.
        """
        if self._time.run_failed:
            self._time.run_failed = False
            self.state.max_epochs = self.state.max_iters = None
        return super().run(*args, **kwargs)

    def _setup_engine(self) -> None:
        # Ignite is about to iterate over the data of a run, behind the handlers of its first EPOCH_STARTED.
        place = self._time
        if place.resume is not None:
            self._go_on(place.resume)
        super()._setup_engine()
        place.resume, place.batch_in_epoch = None, self._init_iter or 0

    def _go_on(self, resume: Resume) -> None:
        """Let the data go on where the checkpoint was saved, and the carried state with them."""
        state, place = self.state, self._time
        data = state.dataloader
        place.data_position = position = self.check_data(resume)
        inside_epoch = state.iteration % (state.epoch_length or state.iteration + 1)
        if inside_epoch:  # whose handlers of EPOCH_STARTED had been called before, not now
            state.hidden = resume.hidden
        begins_anew = not position or not (inside_epoch or place.stateful == "data")
        if begins_anew and state.hidden is place.left:  # neither set before the run nor by a handler
            state.hidden = None
        if not position or isinstance(self, DeterministicEngine):  # that one skips what it has seen by itself
            return
        if hasattr(data, "resume_at"):
            data.resume_at(position)
        elif place.stateful and not (data is None or isinstance(data, Iterator) or hasattr(data, "load_state_dict")):
            warn(
                f"a stateful run goes on at iteration {state.iteration}, after batch {position} of its data, but the "
                f"data ({type(data).__name__}) begin anew: the carried hidden state meets batches that it does not "
                "belong to. Give data with resume_at(batch), as ContiguousStreams has, an iterator that is already "
                "there, or deterministic=True."
            )

    def check_data(self, resume: Resume) -> int:
        """Return at which batch the data of a run go on.

        Raises:
            ValueError: they go on inside, and are not those of the checkpoint.
        """
        data, position = self.state.dataloader, resume.position
        length = self._get_data_length(data)
        if position is None:
            position, length = resume.iteration, length or self.state.epoch_length
        position %= length or position + 1
        here = _fingerprint(data)
        if position and resume.fingerprint is not None and here is not None:
            different = [
                f"{name}={resume.fingerprint.get(name)!r} there and {here.get(name)!r} here"
                for name in {**resume.fingerprint, **here}
                if resume.fingerprint.get(name) != here.get(name)
            ]
            if different:
                raise ValueError(
                    f"the run would go on after batch {position} of other data than the checkpoint's: "
                    f"{'; '.join(different)}. Give the data as they were; or set engine.state.max_epochs = None to "
                    "start a new run."
                )
        return position

    def _restore_tbtt_step(self, saved: Any) -> None:
        if not isinstance(saved, str):
            self.state.tbtt_step = saved
        elif saved != (here := serialized_tbtt_step(self.state.tbtt_step)):
            warn(
                f"the checkpoint was saved while engine.state.tbtt_step was {saved}, here it is {here}: "
                "set it as it was, or the run goes on with other windows."
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

    def _from_iteration(self, iteration: int) -> Iterator[Any]:
        # Ignite tells the batch from the iteration, which is wrong where an epoch was cut short.
        place = self._time
        if place.resume is None or place.resume.position is None:
            place.data_position = iteration % (self._get_data_length(self.state.dataloader) or iteration + 1)
        return super()._from_iteration(place.data_position)


def _plain(name: str, value: Any) -> Any:
    """Return `value` as one of Python's own types, which ``torch.load(weights_only=True)`` accepts."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if value is None or isinstance(value, str):
        return value if value is None else str(value)
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    raise TypeError(
        f"{name} must be a number, a string or None, because checkpoints hold it, got {value!r} of type "
        f"{type(value).__name__}."
    )


def _plain_rng(rng_state: Any) -> Any:
    """Return numpy's random state with its array as a list, which numpy takes back and weights_only lets through."""
    if not isinstance(rng_state, tuple):
        return rng_state
    return tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in rng_state)


def serialized_tbtt_step(tbtt_step: Any) -> Any:
    """Return what of `tbtt_step` a checkpoint holds: a number as Python has it, or how a policy describes itself."""
    if tbtt_step is None or isinstance(tbtt_step, Real):
        return _plain("tbtt_step", tbtt_step)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(tbtt_step))  # a class without a repr of its own tells its address


def _fingerprint(data: Any) -> dict[str, Any] | None:
    if not hasattr(data, "fingerprint"):
        return None
    return {name: _plain(f"fingerprint()[{name!r}]", value) for name, value in data.fingerprint().items()}


def _check_rank(saved: int | None) -> None:
    if saved is not None and saved != ranks.own():
        raise ValueError(
            f"the checkpoint carries the hidden state of the rows of rank {saved}, and this is rank {ranks.own()} with "
            "rows of its own. Let every rank save its own: Checkpoint(to_save, DiskSaver(f'checkpoints/{rank}'), "
            "save_on_rank=rank)."
        )


def _warn_of_a_place_between(saved: Mapping[str, Any], batch_in_epoch: int, epoch_length: int | None) -> None:
    counted = saved["batch_in_epoch"] % (epoch_length or saved["batch_in_epoch"] + 1)
    if saved["inside_batch"]:
        warn(
            "the checkpoint was saved inside a batch, which has no place to resume from: the run goes on with the next "
            "batch, and the windows left in this one are not trained on. For an exact resume save at "
            "ITERATION_COMPLETED."
        )
    elif windows := saved.get("windows_without_step"):
        warn(
            f"the checkpoint was saved while {windows} windows waited for others to share an optimizer step with: "
            "their gradients are not in it, and no step will be taken on them. For an exact resume save where "
            "gradient_accumulation_steps windows are complete."
        )
    if counted != batch_in_epoch:
        warn(
            f"the checkpoint is of a run in which an epoch was cut short: it was at batch {counted} of its epoch, and "
            f"Ignite counts {batch_in_epoch}. The data go on where they were, but this epoch ends elsewhere than it "
            "would have."
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
