"""Events, counters, filters; terminate, interrupt, exceptions: what happens when a handler interferes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import TerminateOnNan
from torch.nn import functional as F

from ignite_tbptt import Tbptt_Events, create_supervised_tbptt_evaluator, create_supervised_tbptt_trainer
from tests.helpers import Forecaster, batches, same, seeded, sgd, weights


def make_trainer(**kwargs: Any) -> Any:
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, **kwargs)
    trainer.model = model  # type: ignore[attr-defined]
    return trainer


def record(trainer: Any) -> list[str]:
    log: list[str] = []

    def write(name: str) -> Callable[[], None]:
        return lambda: log.append(name)

    for event in Tbptt_Events:
        trainer.add_event_handler(event, write(event.name))
    return log


WINDOW = ["TIME_ITERATION_STARTED", "BACKWARD_COMPLETED", "OPTIMIZER_STEP_COMPLETED", "TIME_ITERATION_COMPLETED"]


def test_the_order_of_events() -> None:
    trainer = make_trainer()
    log = record(trainer)
    trainer.run(batches(1))
    assert log == WINDOW * 3


def test_the_order_of_events_with_accumulation() -> None:
    trainer = make_trainer(gradient_accumulation_steps=2)
    log = record(trainer)
    trainer.run(batches(1))
    assert log == [WINDOW[0], WINDOW[3], *WINDOW, *WINDOW]


@pytest.mark.parametrize("event", list(Tbptt_Events))
@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, list(range(1, 19))),
        ({"every": 5}, [5, 10, 15]),
        ({"once": 7}, [7]),
        ({"once": [2, 18]}, [2, 18]),
        ({"before": 4}, [1, 2, 3]),
        ({"after": 16}, [17, 18]),
        ({"event_filter": lambda engine, event: event % 8 == 0}, [8, 16]),
    ],
)
def test_filters_count_over_batches_and_epochs(event: Any, filters: dict[str, Any], expected: list[int]) -> None:
    trainer = make_trainer()
    seen: list[int] = []
    trainer.add_event_handler(
        event(**filters) if filters else event, lambda engine: seen.append(engine.state.get_event_attrib_value(event))
    )
    trainer.run(batches(3), max_epochs=2)
    assert seen == expected


def test_every_and_before_together() -> None:
    trainer = make_trainer()
    seen: list[int] = []
    event = Tbptt_Events.TIME_ITERATION_STARTED(every=2, after=3, before=9)
    trainer.add_event_handler(event, lambda engine: seen.append(engine.state.time_iteration))
    trainer.run(batches(3), max_epochs=2)
    assert seen == [4, 6, 8]


def test_optimizer_steps_are_counted_apart_from_windows() -> None:
    trainer = make_trainer(gradient_accumulation_steps=2)
    trainer.run(batches(3))
    assert (trainer.state.time_iteration, trainer.state.optimizer_step) == (9, 5)  # the ninth on its own


def test_a_second_run_counts_anew() -> None:
    trainer = make_trainer()
    trainer.run(batches(2))
    trainer.run(batches(1))
    assert trainer.state.time_iteration == trainer.state.optimizer_step == 3


def test_two_trainers_do_not_share_counters() -> None:
    first, second = make_trainer(), make_trainer()
    first.run(batches(2))
    assert second.state.time_iteration == 0


def test_the_output_is_the_windows_from_backward_on() -> None:
    trainer = make_trainer()
    seen: list[Any] = []
    for event in (Tbptt_Events.BACKWARD_COMPLETED, Tbptt_Events.TIME_ITERATION_COMPLETED):
        trainer.add_event_handler(event, lambda: seen.append(trainer.state.output))
    trainer.run(batches(1))
    assert seen[0::2] == seen[1::2]
    assert len(set(seen)) == 3


@pytest.mark.parametrize("how", ["terminate", "terminate_epoch"])
@pytest.mark.parametrize("event", [WINDOW[0], WINDOW[2], WINDOW[3]])
def test_terminating_stops_after_the_window_in_hand(how: str, event: str) -> None:
    trainer = make_trainer()
    counter = "optimizer_step" if event == WINDOW[2] else "time_iteration"
    log = record(trainer)

    @trainer.on(event)
    def stop(engine: Any) -> None:
        if getattr(engine.state, counter) == 5:
            getattr(engine, how)()

    trainer.run(batches(3), max_epochs=1)
    assert log == WINDOW * 5
    assert trainer.state.iteration == 2


@pytest.mark.parametrize("how", ["terminate", "terminate_epoch"])
def test_terminating_when_the_gradients_are_there_withholds_the_step(how: str) -> None:
    trainer = make_trainer()
    log = record(trainer)
    kept: list[Any] = []

    @trainer.on(Tbptt_Events.BACKWARD_COMPLETED(once=5))
    def stop(engine: Any) -> None:
        kept.extend(weights(engine.model))
        getattr(engine, how)()

    trainer.run(batches(3), max_epochs=1)
    assert log == WINDOW * 4 + [WINDOW[0], WINDOW[1], WINDOW[3]]
    assert same(kept, weights(trainer.model))
    assert trainer.state.optimizer_step == 4


def test_who_terminates_earlier_in_the_window_gets_its_step() -> None:
    trainer = make_trainer()
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_STARTED(once=2), lambda engine: engine.terminate())
    seen: list[bool] = []
    trainer.add_event_handler(Tbptt_Events.BACKWARD_COMPLETED, lambda engine: seen.append(True))
    trainer.run(batches(1))
    assert trainer.state.optimizer_step == len(seen) == 2
    assert trainer.should_terminate


def test_windows_accumulated_before_a_termination_are_not_stepped_on() -> None:
    trainer = make_trainer(gradient_accumulation_steps=3)
    before = weights(trainer.model)
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED(once=2), lambda engine: engine.terminate())
    trainer.run(batches(1))
    assert same(before, weights(trainer.model))


def test_terminate_on_nan_prevents_the_poisoned_step() -> None:
    trainer = make_trainer()
    trainer.add_event_handler(Tbptt_Events.BACKWARD_COMPLETED, TerminateOnNan())
    x, y = batches(1)[0]
    y[5] = float("nan")
    trainer.run([(x, y)])
    assert trainer.state.time_iteration == 2
    assert trainer.state.optimizer_step == 1
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())


def test_interrupt_ends_with_the_batch_and_goes_on_where_it_was() -> None:
    whole, stopped = make_trainer(stateful=True), make_trainer(stateful=True)
    whole.run(batches(4), max_epochs=2)
    stopped.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED(once=4), lambda engine: engine.interrupt())
    data = batches(4)
    stopped.run(data, max_epochs=2)
    assert (stopped.state.iteration, stopped.state.time_iteration) == (2, 6)
    stopped.run(data, max_epochs=2)
    assert same(weights(whole.model), weights(stopped.model))
    assert stopped.state.time_iteration == 24


@pytest.mark.parametrize("how", ["terminate", "terminate_epoch"])
def test_the_carried_state_does_not_survive_into_data_that_begin_anew(how: str) -> None:
    trainer = make_trainer(stateful=True)
    fresh: list[bool] = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: fresh.append(engine.state.hidden is None))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: getattr(engine, how)())
    trainer.run(batches(4), max_epochs=3)
    if how == "terminate":
        trainer.run(batches(4), max_epochs=3)
    assert fresh == [True] * 3


def test_an_exception_in_a_handler_reaches_the_caller_and_the_trainer_runs_again() -> None:
    trainer = make_trainer(stateful=True, amp_mode="amp", scaler=True, device="cpu")
    handle = trainer.add_event_handler(Tbptt_Events.BACKWARD_COMPLETED, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run(batches(2))
    handle.remove()
    trainer.state.max_epochs = None
    trainer.run(batches(2))
    assert trainer.state.iteration == 2


def test_clipping_in_three_lines() -> None:
    trainer = make_trainer()
    norms: list[float] = []

    @trainer.on(Tbptt_Events.BACKWARD_COMPLETED)
    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1e-3)

    @trainer.on(Tbptt_Events.OPTIMIZER_STEP_COMPLETED)
    def measure() -> None:
        norms.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item())

    trainer.run(batches(2))
    assert norms == pytest.approx([1e-3] * 6, rel=2e-3)  # clip_grad_norm_ divides by the norm + 1e-6


def test_the_evaluator_fires_its_events_and_terminates() -> None:
    evaluator = create_supervised_tbptt_evaluator(seeded(Forecaster), tbtt_step=4)
    seen: list[int] = []
    for event in (Tbptt_Events.TIME_ITERATION_STARTED, Tbptt_Events.TIME_ITERATION_COMPLETED(every=2)):
        evaluator.add_event_handler(event, lambda engine: seen.append(engine.state.time_iteration))
    evaluator.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED(once=5), lambda engine: engine.terminate())
    evaluator.run(batches(4))
    assert seen == [1, 2, 2, 3, 4, 4, 5]
    with pytest.raises(ValueError, match="BACKWARD_COMPLETED is not a valid event"):
        evaluator.add_event_handler(Tbptt_Events.BACKWARD_COMPLETED, lambda: None)


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, Tbptt_Events.BACKWARD_COMPLETED, Events.EPOCH_STARTED])
def test_the_run_after_one_that_raised_is_a_new_one(event: Any) -> None:
    """Ignite's own engine returns None from it, and has done nothing."""
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, gradient_accumulation_steps=2)
    raises = [True]

    @trainer.on(event(every=2) if event is not Events.EPOCH_STARTED else event)
    def fail() -> None:
        if raises and raises.pop():
            raise KeyError("a handler")

    with pytest.raises(KeyError):
        trainer.run(batches(4), max_epochs=2)
    twin = seeded(Forecaster)
    twin.load_state_dict(model.state_dict())
    state = trainer.run(batches(4), max_epochs=2)
    assert (state.iteration, state.epoch, state.time_iteration) == (8, 2, 24)
    create_supervised_tbptt_trainer(twin, sgd(twin), F.mse_loss, 4, gradient_accumulation_steps=2).run(
        batches(4), max_epochs=2
    )
    assert same(weights(model), weights(twin))
