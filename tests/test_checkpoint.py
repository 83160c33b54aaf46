"""What a checkpoint asks of a run: Ignite's behaviour where it asks nothing, a refusal or a warning in doubt."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from ignite_tbptt import ContiguousStreams, Tbptt_Events, create_supervised_tbptt_evaluator
from ignite_tbptt.checkpoint import TimeEngine
from ignite_tbptt.position import track_position
from tests.helpers import Forecaster, batches, same, seeded, weights
from tests.test_resume import Run, through_a_file, uninterrupted

# As Ignite's engine


class Stream(IterableDataset[Any]):
    """Data without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(batches(5))


def positions(kind: Any, data: Any, place: Any, event: Any = None, **kwargs: Any) -> list[tuple[int, int, float]]:
    """Return iteration, epoch and batch of a run that is placed before, or in a handler of `event`."""
    seen: list[tuple[int, int, float]] = []

    def note(engine: Any, batch: Any) -> None:
        seen.append((engine.state.iteration, engine.state.epoch, 0.0 if batch is None else batch[0].sum().item()))

    engine = kind(note)
    if kind is TimeEngine:
        track_position(engine, False)
    if event is None:
        engine.load_state_dict(place)
    else:
        places = [place]  # once, or the run would never end
        engine.add_event_handler(event, lambda: places and engine.load_state_dict(places.pop()))
    engine.run(data, **kwargs)
    return seen


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "event",
    [
        None,
        Events.STARTED,
        Events.EPOCH_STARTED(once=1),
        Events.GET_BATCH_COMPLETED(once=6),
        Events.ITERATION_COMPLETED(once=7),
        Events.EPOCH_COMPLETED(once=1),
    ],
)
@pytest.mark.parametrize("data", ["list", "loader", "iterable"])
def test_a_place_is_loaded_before_a_run_or_inside_as_ignite_does(
    data: str, event: Any, legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "interrupt_resume_enabled", not legacy)
    make: Any = {
        "list": lambda: batches(5),
        "loader": lambda: DataLoader(batches(5), batch_size=None),  # type: ignore[arg-type]
        "iterable": lambda: DataLoader(Stream(), batch_size=None),
    }[data]
    place = {"iteration": 3, "epoch_length": 5, "max_epochs": 3}
    kwargs = {} if event is None else {"max_epochs": 3, "epoch_length": 5}
    expected = positions(Engine, make(), place, event, **kwargs)
    assert positions(TimeEngine, make(), place, event, **kwargs) == expected


def test_no_dict_is_refused_as_ignite_does() -> None:
    ignites: Any = Engine(lambda engine, batch: None)
    for engine in (ignites, Run().trainer):
        with pytest.raises(TypeError, match="should be a dictionary"):
            engine.load_state_dict("no dict")


def test_an_engine_without_events_of_time_is_ignites() -> None:
    engine, ignites = TimeEngine(lambda engine, batch: None), Engine(lambda engine, batch: None)
    for each in (engine, ignites):
        each.run(batches())
    assert engine.state_dict() == ignites.state_dict()


@pytest.mark.parametrize("iteration", [4, 5, 7])
def test_a_checkpoint_loaded_when_the_run_starts_is_resumed(iteration: int) -> None:
    (whole, saved), resumed = uninterrupted(), Run()
    resumed.model.load_state_dict(saved[iteration]["model"])
    resumed.optimizer.load_state_dict(copy.deepcopy(saved[iteration]["optimizer"]))
    load = functools.partial(resumed.trainer.load_state_dict, saved[iteration]["trainer"])
    resumed.trainer.add_event_handler(Events.STARTED, load)
    resumed.trainer.run(resumed.streams, max_epochs=3)
    assert same(weights(whole.model), weights(resumed.model))


def test_a_roll_back_inside_a_run_says_where_the_data_are() -> None:
    run = Run()
    saved: dict[str, Any] = {}
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: saved.update(run.trainer.state_dict()))
    seen: list[Any] = []

    @run.trainer.on(Events.ITERATION_COMPLETED(once=4))
    def roll_back(engine: Any) -> None:
        engine.remove_event_handler(roll_back, Events.ITERATION_COMPLETED)
        engine.load_state_dict(saved)
        seen.append((engine.state.iteration, engine.state.time_iteration, engine.state.hidden[0].tolist()))

    with pytest.warns(UserWarning, match="the data go on after batch 4 of theirs.*after batch 2") as caught:
        run.trainer.run(run.streams)
    assert caught[0].filename == __file__
    assert seen == [(2, 4, saved["tbptt"]["hidden"][0].tolist())]


# The run that asked


def first_batches(run: Run) -> list[float]:
    seen: list[float] = []
    run.trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: seen.append(e.state.batch[0].sum().item()))
    return seen


@pytest.mark.parametrize("stateful", [True, "data"])
@pytest.mark.parametrize("iteration", [4, 15])
def test_a_new_run_begins_where_the_data_do(stateful: Any, iteration: int) -> None:
    _, saved = uninterrupted(stateful=stateful)
    run = Run(stateful=stateful)
    seen, states = first_batches(run), []
    run.trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: states.append(e.state.hidden))
    run.trainer.load_state_dict(saved[iteration]["trainer"])
    if iteration == 4:
        run.trainer.state.max_epochs = None  # Ignite's way to ask for a restart
    run.trainer.run(run.streams)
    assert seen == [x.sum().item() for x, _ in run.streams]
    assert states[0] is None
    assert run.trainer.state.time_iteration == 9


def test_a_new_run_after_an_epoch_that_is_no_pass_over_the_data() -> None:
    _, saved = uninterrupted(epoch_length=3)
    run = Run()
    seen = first_batches(run)
    run.trainer.load_state_dict(saved[9]["trainer"])
    run.trainer.run(run.streams)
    assert seen == [x.sum().item() for x, _ in run.streams]


class Validated(Run):
    """Iterates over the training streams when an epoch starts, and sets the state that the epoch starts from."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trainer.add_event_handler(Events.EPOCH_STARTED, self.look)

    def look(self, engine: Any) -> None:
        assert len(list(self.streams)) == 5
        engine.state.hidden = torch.full((1, 5, 5), 0.1), torch.full((1, 5, 5), 0.2)


@pytest.mark.parametrize("stateful", [True, "data"])
@pytest.mark.parametrize("epoch_length", [None, 3])
@pytest.mark.parametrize("iteration", [2, 3, 4, 5, 6, 7])
def test_handlers_of_epoch_started_take_nothing_from_a_resumed_run(
    stateful: Any, epoch_length: int | None, iteration: int
) -> None:
    whole, saved = uninterrupted(Validated, epoch_length, stateful=stateful)
    resumed = Validated(stateful=stateful)
    resumed.resume(saved[iteration])
    assert same(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("given", [None, (torch.ones(1, 5, 5), torch.ones(1, 5, 5))])
def test_a_state_set_between_loading_and_running_is_kept(given: Any) -> None:
    run = Run()
    run.trainer.load_state_dict(uninterrupted()[1][4]["trainer"])
    run.trainer.state.hidden = given
    states: list[Any] = []
    run.trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: states.append(e.state.hidden))
    run.trainer.run(run.streams)
    assert states[0] is given


# The same data


def streams(length: int = 150, rows: int = 5, steps: int = 7, seed: int = 1) -> ContiguousStreams:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(length, 3, generator=generator), torch.randn(length, 2, generator=generator)
    return ContiguousStreams(data, rows, steps)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"steps": 6}, "steps=7 there and 6 here"),
        ({"rows": 3}, "rows=5 there and 3 here; row_length=30 there and 50 here"),
        ({"length": 145}, "row_length=30 there and 29 here"),
        ({"seed": 2}, r"checksum=\d+ there and \d+ here"),
    ],
)
def test_a_run_that_would_go_on_elsewhere_is_refused(stateful: bool, other: dict[str, Any], message: str) -> None:
    (whole, saved), run = uninterrupted(stateful=stateful), Run(stateful=stateful)
    run.model.load_state_dict(saved[7]["model"])
    run.optimizer.load_state_dict(copy.deepcopy(saved[7]["optimizer"]))
    run.trainer.load_state_dict(saved[7]["trainer"])
    with pytest.raises(ValueError, match=f"go on after batch 2 of other data than the checkpoint's: {message}"):
        run.trainer.run(streams(**other))
    assert run.trainer.state.epoch == 1
    run.trainer.run(streams())  # all is as it was
    assert same(weights(whole.model), weights(run.model))


def test_data_may_change_where_they_begin() -> None:
    run = Run()
    run.trainer.load_state_dict(uninterrupted()[1][5]["trainer"])
    run.trainer.run(streams(seed=2))


class Told(list[Any]):
    """Data of one's own that tell what they are."""

    version: Any = np.int64(3)

    def fingerprint(self) -> dict[str, Any]:
        return {"version": self.version}


def test_data_of_ones_own_take_part() -> None:
    run = Run(stateful=False)
    saved: dict[str, Any] = {}
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=2), lambda e: saved.update(through_a_file(e.state_dict()))
    )
    run.trainer.run(Told(batches()))
    assert saved["tbptt"]["data"] == {"version": 3}
    other = Told(batches())
    other.version = "four"
    resumed = Run(stateful=False)
    resumed.trainer.load_state_dict(saved)
    with pytest.raises(ValueError, match="version=3 there and 'four' here"):
        resumed.trainer.run(other)
    other.version = [4]
    with pytest.raises(TypeError, match=r"fingerprint\(\)\['version'\] must be a number, a string or None"):
        resumed.trainer.run(other)


# Plain types


def test_numpys_integers_are_saved_as_pythons() -> None:
    settings: dict[str, Any] = {"dim": np.int64(0), "gradient_accumulation_steps": np.int64(1), "stateful": np.True_}
    (whole, saved), run = uninterrupted(), Run(**settings)
    run.trainer.run(run.streams, max_epochs=1, epoch_length=np.int64(5))
    run.trainer.load_state_dict(through_a_file(run.trainer.state_dict()))
    run.resume(saved[4])
    assert same(weights(whole.model), weights(run.model))


def test_a_setting_that_no_checkpoint_could_hold_is_refused_when_the_trainer_is_made() -> None:
    with pytest.raises(TypeError, match=r"stateful must be a number, a string or None, because checkpoints hold"):
        Run(stateful=torch.tensor(True))


# What is lost


def test_a_run_without_data_is_resumed_without_a_word() -> None:
    def trained(load: Any = None) -> tuple[Run, dict[str, Any]]:
        run, saved = Run(stateful=False), dict[str, Any]()

        @run.trainer.on(Events.ITERATION_STARTED)
        def give(engine: Any) -> None:
            engine.state.batch = batches(6)[(engine.state.iteration - 1) % 6]

        @run.trainer.on(Events.ITERATION_COMPLETED(once=4))
        def save(engine: Any) -> None:
            parts = {"trainer": engine, "model": run.model, "optimizer": run.optimizer}
            saved.update(through_a_file({name: part.state_dict() for name, part in parts.items()}))

        if load is None:
            run.trainer.run(max_epochs=2, epoch_length=6)
        else:
            run.model.load_state_dict(load["model"])
            run.optimizer.load_state_dict(load["optimizer"])
            run.trainer.load_state_dict(load["trainer"])
            run.trainer.run()
        return run, saved

    whole, saved = trained()
    resumed, _ = trained(saved)
    assert same(weights(whole.model), weights(resumed.model))
    assert resumed.trainer.state.time_iteration == whole.trainer.state.time_iteration


@pytest.mark.parametrize("cut", [2, 5])
def test_a_checkpoint_of_an_epoch_that_was_cut_short_is_warned_about_wherever_it_is_saved(cut: int) -> None:
    """With epochs of 5 batches, the first cut after 2, batch 5 of the run is batch 3 of its epoch."""
    run, saved = Run(), dict[int, Any]()
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=cut), lambda e: e.terminate_epoch())
    run.trainer.add_event_handler(
        Events.EPOCH_COMPLETED | Events.ITERATION_COMPLETED,
        lambda e: saved.update({e.state.iteration: e.state_dict()}),
    )
    run.trainer.run(run.streams, max_epochs=2)
    if cut == 5:  # nothing was cut
        Run().trainer.load_state_dict(saved[5])
        Run().trainer.load_state_dict(saved[7])
        return
    for iteration, batch, counted in ((2, 0, 2), (5, 3, 0)):
        with pytest.warns(UserWarning, match=f"it was at batch {batch} of its epoch, and Ignite counts {counted}"):
            Run().trainer.load_state_dict(saved[iteration])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("iteration", [2, 3, 6, 7])
def test_the_data_go_on_where_they_were_after_an_epoch_that_was_cut_short(deterministic: bool, iteration: int) -> None:
    run = Run(deterministic=deterministic)
    seen, saved = first_batches(run), dict[int, Any]()
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate_epoch())
    run.trainer.add_event_handler(
        Events.EPOCH_COMPLETED | Events.ITERATION_COMPLETED,
        lambda e: saved.update({e.state.iteration: e.state_dict()}),
    )
    run.trainer.run(run.streams, max_epochs=2)
    resumed = Run(deterministic=deterministic)
    again = first_batches(resumed)
    with pytest.warns(UserWarning, match="cut short"):
        resumed.trainer.load_state_dict(saved[iteration])
    resumed.trainer.run(resumed.streams)
    expected = [*seen[iteration:], seen[0], seen[1]]
    assert again[:2] == expected[:2]


def test_a_checkpoint_of_a_batch_that_was_drawn_and_not_trained_on_is_warned_about() -> None:
    run, saved = Run(), dict[str, Any]()
    run.trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda e: saved.update(e.state_dict()))
    run.trainer.run(run.streams)
    with pytest.warns(UserWarning, match="saved inside a batch") as caught:
        Run().trainer.load_state_dict(saved)
    assert caught[0].filename == __file__


def test_windows_that_wait_for_a_step_are_warned_about() -> None:
    run, saved = Run(gradient_accumulation_steps=4), dict[int, Any]()
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: saved.update({e.state.iteration: e.state_dict()})
    )
    run.trainer.run(run.streams)
    assert run.trainer.state.optimizer_step == 3  # 9 windows, the last one left over
    Run(gradient_accumulation_steps=4).trainer.load_state_dict(saved[2])
    with pytest.warns(UserWarning, match="saved while 2 windows waited for others.*gradients are not in it"):
        Run(gradient_accumulation_steps=4).trainer.load_state_dict(saved[3])


def evaluate() -> None:
    """A handler of a user."""


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED(once=5), Events.EPOCH_COMPLETED(once=1)])
@pytest.mark.parametrize("has_handler", [False, True])
def test_handlers_of_an_epoch_that_was_left_at_its_end_are_named(event: Any, has_handler: bool) -> None:
    run, saved = Run(), dict[str, Any]()
    run.trainer.add_event_handler(event, lambda e: saved.update(e.state_dict()))
    run.trainer.run(run.streams, max_epochs=2)
    resumed = Run()
    resumed.trainer.load_state_dict(saved)
    if has_handler:
        resumed.trainer.add_event_handler(Events.EPOCH_COMPLETED, evaluate)
    if has_handler and event == Events.ITERATION_COMPLETED:
        with pytest.warns(UserWarning, match="EPOCH_COMPLETED: evaluate did not run for that epoch") as caught:
            resumed.trainer.run(resumed.streams)
        assert caught[0].filename == __file__
    else:
        resumed.trainer.run(resumed.streams)


def test_an_evaluator_is_saved_and_resumed_as_well() -> None:
    model = seeded(Forecaster)
    data = batches(5)

    def losses(load: Any = None) -> tuple[list[float], dict[str, Any]]:
        evaluator: Any = create_supervised_tbptt_evaluator(model, {}, 4, stateful=True)
        found, saved = [], dict[str, Any]()
        evaluator.add_event_handler(
            Tbptt_Events.TIME_ITERATION_COMPLETED, lambda e: found.append(F.mse_loss(*e.state.output).item())
        )
        evaluator.add_event_handler(
            Events.ITERATION_COMPLETED(once=2), lambda e: saved.update(through_a_file(e.state_dict()))
        )
        if load is not None:
            evaluator.load_state_dict(load)
            evaluator.run(iter(data[2:]))
        else:
            evaluator.run(data)
        return found, saved

    whole, saved = losses()
    assert losses(saved)[0] == whole[6:]
