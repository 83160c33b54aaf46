"""A run that was stopped, or killed, and resumed from its checkpoint ends with the same bits as one that never was."""

from __future__ import annotations

import copy
import functools
import io
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.nn import functional as F

from ignite_tbptt import (
    AdaptiveTruncation,
    ContiguousStreams,
    FixedTruncation,
    GradientHorizon,
    Tbptt_Events,
    create_supervised_tbptt_trainer,
)
from tests import killed_trainer
from tests.helpers import CustomCell, Forecaster, PairState, RecordState, batches, same, seeded, weights


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Run:
    """A model, its optimizer, its stateful trainer and its streams."""

    def __init__(self, make: Any = None, **kwargs: Any) -> None:
        self.model = seeded(make or (lambda: Forecaster(nn.LSTM)))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        arguments: dict[str, Any] = {"tbtt_step": 4, "stateful": True, **kwargs}
        self.trainer: Any = create_supervised_tbptt_trainer(self.model, self.optimizer, F.mse_loss, **arguments)
        generator = torch.Generator().manual_seed(1)
        data = torch.randn(150, 3, generator=generator), torch.randn(150, 2, generator=generator)
        self.streams = ContiguousStreams(data, rows=5, steps=7)

    def checkpoints(self, epoch_length: int | None = None) -> dict[int, dict[str, Any]]:
        """Train for 3 epochs; return what was saved after every batch, by its number."""
        saved: dict[int, dict[str, Any]] = {}
        parts = {"trainer": self.trainer, "model": self.model, "optimizer": self.optimizer}

        @self.trainer.on(Events.ITERATION_COMPLETED)
        def save(engine: Any) -> None:
            state = {name: part.state_dict() for name, part in parts.items()}
            saved[engine.state.iteration] = through_a_file(state)

        self.trainer.run(self.streams, max_epochs=3, epoch_length=epoch_length)
        return saved

    def checkpoint_at(self, iteration: int) -> dict[str, Any]:
        return self.checkpoints()[iteration]

    def resume(self, saved: dict[str, Any], **kwargs: Any) -> None:
        saved = copy.deepcopy(saved)  # an optimizer takes the tensors of its state as its own
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.trainer.load_state_dict(saved["trainer"])
        self.trainer.run(self.streams, **kwargs)


@functools.cache
def uninterrupted(
    make: Any = Run, epoch_length: int | None = None, **kwargs: Any
) -> tuple[Run, dict[int, dict[str, Any]]]:
    """Return a run that never was interrupted, and its checkpoints; it is made once for all tests that resume it."""
    run: Run = make(**kwargs)
    return run, run.checkpoints(epoch_length)


CELLS: dict[str, Any] = {
    "lstm": None,
    "named tuple": lambda: CustomCell(lambda h: PairState(h, None), lambda state: state.h),
    "dataclass": lambda: CustomCell(RecordState, lambda state: state.h),
    "dict": lambda: CustomCell(lambda h: {"h": h}, lambda state: state["h"]),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("iteration", [1, 4, 5, 6, 12, 14])  # an epoch has 5 batches
def test_a_resumed_run_ends_with_the_same_bits(cell: str, iteration: int) -> None:
    whole, saved = uninterrupted(make=functools.partial(Run, CELLS[cell]) if CELLS[cell] else Run)
    resumed = Run(CELLS[cell])
    resumed.resume(saved[iteration])
    assert same(weights(whole.model), weights(resumed.model))
    assert resumed.trainer.state.time_iteration == whole.trainer.state.time_iteration
    assert resumed.trainer.state.optimizer_step == whole.trainer.state.optimizer_step
    assert resumed.trainer.state.output == whole.trainer.state.output


def test_the_carried_state_matters_to_that() -> None:
    (whole, saved), resumed = uninterrupted(), Run()
    changed = copy.deepcopy(saved[4])
    changed["trainer"]["tbptt"]["hidden"] = None
    resumed.resume(changed)
    assert not same(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize(("options", "counted"), [(["--endless"], 2 * 16 + 12), (["--deterministic"], 3 * 16)])
def test_a_killed_process_ends_with_the_same_bits(tmp_path: Path, options: list[str], counted: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed_trainer.main([str(whole), *options])
    kill_at = random.Random(str(options)).randrange(2, counted)
    command = [sys.executable, "-m", "tests.killed_trainer", str(killed), *options, "--kill-at", str(kill_at)]
    assert subprocess.run(command, check=False, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert not (killed / "final.pt").exists()
    killed_trainer.main([str(killed), *options])
    ends = [torch.load(folder / "final.pt", weights_only=True) for folder in (whole, killed)]
    assert ends[0]["counted"] == ends[1]["counted"] == counted  # 6 batches: 5 of 3 chunks and one of 1
    assert all(torch.equal(ends[0]["weights"][name], ends[1]["weights"][name]) for name in ends[0]["weights"])


class AdaptiveRun(Run):
    """Chunks and learning rates are set anew at some batches; between two of those the last ones hold."""

    def __init__(self) -> None:
        super().__init__()
        horizon = GradientHorizon(7, samples=2)
        # The last of the five batches of an epoch is short.
        horizon.attach(self.trainer, Events.ITERATION_STARTED(event_filter=lambda _, count: count % 5 in (1, 3)))
        AdaptiveTruncation(horizon, 0.4, 1, 7, self.optimizer).attach(self.trainer)
        self.chosen: list[tuple[int, float]] = []
        self.trainer.add_event_handler(
            Events.ITERATION_STARTED,
            lambda: self.chosen.append((self.trainer.state.tbtt_step, self.optimizer.param_groups[0]["lr"])),
        )


@pytest.mark.parametrize("iteration", [1, 4, 5, 6, 12, 14])
def test_a_resumed_run_goes_on_with_the_chunks_that_were_chosen(iteration: int) -> None:
    (whole, saved), resumed = uninterrupted(make=AdaptiveRun), AdaptiveRun()
    resumed.resume(saved[iteration])
    assert isinstance(whole, AdaptiveRun)
    assert whole.chosen[iteration:] == resumed.chosen
    assert len({steps for steps, _ in whole.chosen}) > 1
    assert same(weights(whole.model), weights(resumed.model))


def test_the_scheduled_tbtt_step_is_restored() -> None:
    first, second = Run(), Run()
    first.trainer.state.tbtt_step = 3
    second.trainer.load_state_dict(through_a_file(first.trainer.state_dict()))
    assert second.trainer.state.tbtt_step == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tbtt_step": 5}, "tbtt_step=4 there and 5 here"),
        ({"tbtt_step": FixedTruncation(4)}, r"tbtt_step=4 there and 'FixedTruncation\(steps=4\)' here"),
        ({"dim": 1}, "dim=0 there and 1 here"),
        ({"stateful": False}, "stateful=True there and False here"),
        ({"gradient_accumulation_steps": "sequence"}, "gradient_accumulation_steps=1 there and 'sequence' here"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_and_nothing_is_loaded(changes: Any, message: str) -> None:
    saved = dict(uninterrupted()[1][4]["trainer"])
    other = Run(**changes)
    with pytest.raises(ValueError, match=message):
        other.trainer.load_state_dict(saved)
    assert other.trainer.state.iteration == other.trainer.state.time_iteration == 0
    del saved["tbptt"]
    other.trainer.load_state_dict(saved)
    assert other.trainer.state.iteration == 4


def test_a_stateless_trainer_saves_no_state() -> None:
    run = Run(stateful=False)
    run.trainer.run(run.streams)
    assert run.trainer.state_dict()["tbptt"]["hidden"] is None


def test_data_that_cannot_skip_are_warned_about_in_the_middle_of_an_epoch() -> None:
    def trainer_at(iteration: int) -> Any:
        run = Run()
        run.trainer.load_state_dict({"iteration": iteration, "epoch_length": 3, "max_epochs": 2})
        return run.trainer

    with pytest.warns(UserWarning, match=r"goes on at iteration 1, after batch 1 of its data, but the data \(list\)"):
        trainer_at(1).run(batches())
    trainer_at(3).run(batches())
    trainer_at(1).run(iter(batches()[1:] + batches()))


def test_streams_are_asked_to_go_on_only_inside_an_epoch() -> None:
    run = Run()
    asked: list[int] = []
    streams: Any = run.streams
    streams.resume_at = asked.append
    run.trainer.run(run.streams, max_epochs=2)
    assert asked == []


def test_a_time_event_of_the_resumed_run_counts_on() -> None:
    resumed = Run()
    seen: list[int] = []
    resumed.trainer.add_event_handler(
        Tbptt_Events.TIME_ITERATION_STARTED(every=4), lambda e: seen.append(e.state.time_iteration)
    )
    resumed.resume(uninterrupted()[1][4])
    assert seen == [12, 16, 20, 24]  # 9 windows an epoch; 8 of them were behind the checkpoint


@pytest.mark.parametrize("stateful", [True, "data"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("epoch_length", [3, 8])  # of 5 batches of data
@pytest.mark.parametrize("iteration", [2, 3, 4, 5, 6, 7, 8])
def test_epochs_that_are_no_pass_over_the_data_are_resumed_alike(
    stateful: Any, deterministic: bool, epoch_length: int, iteration: int
) -> None:
    kwargs: dict[str, Any] = {"stateful": stateful, "deterministic": deterministic}
    (whole, saved), resumed = uninterrupted(epoch_length=epoch_length, **kwargs), Run(**kwargs)
    resumed.resume(saved[iteration])
    assert same(weights(whole.model), weights(resumed.model))


def test_the_state_does_not_go_on_where_the_data_begin_anew_inside_an_epoch() -> None:
    run = Run()
    fresh: list[int] = []
    run.trainer.add_event_handler(
        Events.ITERATION_STARTED, lambda e: fresh.append(e.state.iteration) if e.state.hidden is None else None
    )
    run.trainer.run(run.streams, max_epochs=2, epoch_length=8)
    assert fresh == [1, 6, 9, 11, 16]  # passes of 5 batches and epochs of 8


def test_a_state_set_when_the_epoch_starts_is_kept() -> None:
    run = Run(stateful=True)
    given = (torch.ones(1, 5, 5), torch.ones(1, 5, 5))

    @run.trainer.on(Events.EPOCH_STARTED)
    def give(engine: Any) -> None:
        engine.state.hidden = given

    seen: list[bool] = []
    run.trainer.add_event_handler(
        Events.ITERATION_STARTED(every=5, after=0), lambda e: seen.append(e.state.hidden is given)
    )
    run.trainer.run(run.streams, max_epochs=3)
    assert seen == [True] * 3


@pytest.mark.parametrize("how", ["terminate", "raise", "interrupt"])
def test_a_checkpoint_loads_into_a_trainer_that_was_stopped(how: str) -> None:
    (whole, saved), stopped = uninterrupted(), Run()

    @stopped.trainer.on(Events.ITERATION_COMPLETED(once=9))
    def stop(engine: Any) -> None:
        if how == "raise":
            raise RuntimeError("stop")
        getattr(engine, how)()

    if how == "raise":
        with pytest.raises(RuntimeError, match="stop"):
            stopped.trainer.run(stopped.streams, max_epochs=3)
    else:
        stopped.trainer.run(stopped.streams, max_epochs=3)
    stopped.trainer.remove_event_handler(stop, Events.ITERATION_COMPLETED)
    stopped.resume(saved[7])
    assert stopped.trainer.state.iteration == 15
    assert same(weights(whole.model), weights(stopped.model))


def test_a_checkpoint_from_inside_a_batch_is_warned_about() -> None:
    run = Run()
    saved: dict[str, Any] = {}
    run.trainer.add_event_handler(
        Tbptt_Events.TIME_ITERATION_COMPLETED(once=3), lambda: saved.update(run.trainer.state_dict())
    )
    run.trainer.run(run.streams)
    with pytest.warns(UserWarning, match="saved inside a batch.*ITERATION_COMPLETED"):
        Run().trainer.load_state_dict(saved)


def test_a_checkpoint_of_an_epoch_that_was_cut_short_is_warned_about() -> None:
    run = Run()
    saved: dict[str, Any] = {}
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), run.trainer.terminate_epoch)
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), lambda: saved.update(run.trainer.state_dict()))
    run.trainer.run(run.streams, max_epochs=2)
    with pytest.warns(UserWarning, match="it was at batch 4 of its epoch, and Ignite counts 1"):
        Run().trainer.load_state_dict(saved)


def test_the_state_of_another_ranks_rows_is_refused() -> None:
    saved = copy.deepcopy(uninterrupted()[1][2]["trainer"])
    saved["tbptt"]["rank"] = 1
    with pytest.raises(ValueError, match=r"rows of rank 1, and this is rank 0.*save_on_rank=rank"):
        Run().trainer.load_state_dict(saved)


class PlainPolicy:
    """A policy whose repr tells its address."""

    def windows(self, length: int, generator: torch.Generator) -> Any:
        return FixedTruncation(4).windows(length, generator)


def test_a_policy_without_a_repr_of_its_own_is_known_by_its_class() -> None:
    whole, resumed = Run(tbtt_step=PlainPolicy()), Run(tbtt_step=PlainPolicy())
    resumed.resume(whole.checkpoint_at(4))
    assert same(weights(whole.model), weights(resumed.model))


def test_what_was_set_as_tbtt_step_in_the_run_is_restored_or_asked_for() -> None:
    first, second = Run(), Run()
    for value, plain in ((np.int64(3), 3), (np.float64(2.6), 2.6)):
        first.trainer.state.tbtt_step = value
        second.trainer.load_state_dict(through_a_file(first.trainer.state_dict()))
        assert second.trainer.state.tbtt_step == plain
    first.trainer.state.tbtt_step = FixedTruncation(7)
    with pytest.warns(UserWarning, match=r"tbtt_step was FixedTruncation\(steps=7\), here it is 2.6"):
        second.trainer.load_state_dict(first.trainer.state_dict())
