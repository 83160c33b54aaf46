"""Where the carried state begins anew and where it is kept, against loops written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ignite_tbptt import (
    ContiguousStreams,
    Tbptt_Events,
    create_supervised_tbptt_evaluator,
    create_supervised_tbptt_trainer,
)
from tests.helpers import Forecaster, batches, hand_written_loop, same, seeded, sgd, weights


def make(stateful: Any, lr: float = 0.1) -> tuple[nn.Module, Any]:
    model = seeded(Forecaster)
    return model, create_supervised_tbptt_trainer(model, sgd(model, lr), F.mse_loss, 4, stateful=stateful)


def by_hand(sequences: list[tuple[list[Any], Any]]) -> list[Tensor]:
    """Train on sequences of batches, each from an initial state; return the weights."""
    model = seeded(Forecaster)
    optimizer = sgd(model)
    for data, hidden in sequences:
        hand_written_loop(model, optimizer, data, 4, hidden=hidden, stateful=True)
    return weights(model)


GIVEN = torch.full((1, 4, 5), 0.5)
DATA = batches(5)


@pytest.mark.parametrize(
    ("stateful", "sequences"),
    [
        ("data", [DATA, DATA, DATA[:2]]),
        (True, [DATA[:3], DATA[3:], DATA[:1], DATA[1:4], DATA[4:], DATA[:2]]),
        (False, [[batch] for batch in (DATA * 3)[:12]]),
    ],
)
def test_where_sequences_begin_when_epochs_are_no_pass_over_the_data(stateful: Any, sequences: list[Any]) -> None:
    model, trainer = make(stateful)
    trainer.run(DATA, max_epochs=4, epoch_length=3)
    assert same(weights(model), by_hand([(data, None) for data in sequences]))


def test_endless_data_are_one_sequence() -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield from DATA

    model, trainer = make("data")
    trainer.run(endless(), max_epochs=4, epoch_length=3)
    assert same(weights(model), by_hand([((DATA * 3)[:12], None)]))


@pytest.mark.parametrize("stateful", [True, "data"])
def test_an_epoch_that_is_cut_short_ends_the_sequence(stateful: Any) -> None:
    model, trainer = make(stateful)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate_epoch())
    trainer.run(DATA, max_epochs=2)
    assert same(weights(model), by_hand([(DATA[:2], None), (DATA, None)]))


def test_the_evaluator_carries_over_epochs_likewise() -> None:
    model = seeded(Forecaster)
    metrics = {"loss": Loss(F.mse_loss, batch_size=torch.numel)}
    evaluator = create_supervised_tbptt_evaluator(model, metrics, 4, stateful="data")
    losses: list[float] = []
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: losses.append(engine.state.metrics["loss"]))
    evaluator.run(DATA, max_epochs=2, epoch_length=3)
    x, y = (torch.cat([batch[part] for batch in DATA]) for part in (0, 1))
    with torch.no_grad():
        whole = F.mse_loss(model(x)[0], y, reduction="none")
        again = F.mse_loss(model(DATA[0][0])[0], DATA[0][1], reduction="none")
    assert losses[0] == pytest.approx(whole[:30].mean().item(), rel=1e-5)
    assert losses[1] == pytest.approx(torch.cat([whole[30:], again]).mean().item(), rel=1e-5)


@pytest.mark.parametrize("create", [create_supervised_tbptt_trainer, create_supervised_tbptt_evaluator])
@pytest.mark.parametrize("stateful", ["Data", "epoch", None, 2])
def test_other_values_of_stateful_are_refused(create: Any, stateful: Any) -> None:
    model = seeded(Forecaster)
    arguments = (model, sgd(model), F.mse_loss, 4) if create is create_supervised_tbptt_trainer else (model,)
    with pytest.raises(ValueError, match=f"stateful must be False, True or 'data', got {stateful!r}"):
        create(*arguments, stateful=stateful)


# A state that is set


def set_at(event: Any) -> Callable[[Any], None]:
    def attach(trainer: Any) -> None:
        def give(engine: Any) -> None:
            engine.state.hidden = GIVEN

        trainer.add_event_handler(event, give)

    return attach


def set_before(trainer: Any) -> None:
    trainer.state.hidden = GIVEN


# GET_BATCH events count the iterations before them.
SET: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "before the run": (set_before, [0]),
    "STARTED": (set_at(Events.STARTED), [0]),
    "EPOCH_STARTED": (set_at(Events.EPOCH_STARTED), [0, 5]),
    "GET_BATCH_STARTED": (set_at(Events.GET_BATCH_STARTED(once=2)), [2]),
    "GET_BATCH_COMPLETED": (set_at(Events.GET_BATCH_COMPLETED(once=2)), [2]),
    "ITERATION_STARTED": (set_at(Events.ITERATION_STARTED(once=3)), [2]),
    "ITERATION_STARTED of an epoch": (set_at(Events.ITERATION_STARTED(once=6)), [5]),
}


@pytest.mark.parametrize("how", SET)
@pytest.mark.parametrize("stateful", [False, True, "data"])
def test_a_state_that_is_set_is_what_the_next_batch_starts_from(stateful: Any, how: str) -> None:
    model, trainer = make(stateful)
    attach, given_to = SET[how]
    attach(trainer)
    trainer.run(DATA, max_epochs=2)
    begin = set(range(10)) if stateful is False else {0, 5}
    starts = sorted(begin | set(given_to))
    data = DATA * 2
    pieces = [data[start:stop] for start, stop in zip(starts, [*starts[1:], 10], strict=True)]
    expected = [(piece, GIVEN if start in given_to else None) for piece, start in zip(pieces, starts, strict=True)]
    assert same(weights(model), by_hand(expected))


@pytest.mark.parametrize("stateful", [False, True, "data"])
@pytest.mark.parametrize("end", ["completed", "terminate", "raise"])
def test_what_a_run_leaves_is_readable_and_not_carried_into_the_next(stateful: Any, end: str) -> None:
    trainer = make(stateful, lr=0.0)[1]
    states: list[Any] = []
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_STARTED, lambda engine: states.append(engine.state.hidden))

    @trainer.on(Events.ITERATION_COMPLETED)
    def scale(engine: Any) -> None:  # also a state that a handler puts in place of the one that was left
        engine.state.hidden = engine.state.hidden * 0.5
        if engine.state.iteration == 3 and end != "completed":
            trainer.remove_event_handler(scale, Events.ITERATION_COMPLETED)
            if end == "raise":
                raise RuntimeError("stop")
            engine.terminate()

    if end == "raise":
        with pytest.raises(RuntimeError, match="stop"):
            trainer.run(DATA)
        trainer._internal_run_generator = None  # Ignite would do nothing at the next run
    else:
        trainer.run(DATA)
    assert trainer.state.hidden is not None
    states.clear()
    trainer.state.max_epochs = None
    trainer.run(DATA)
    if end != "raise":
        assert states[0] is None
    trainer.state.hidden = given = trainer.state.hidden.clone()
    states.clear()
    trainer.run(DATA)
    assert states[0] is given


@pytest.mark.parametrize("stateful", [False, True, "data"])
def test_a_state_set_while_a_run_is_interrupted_is_kept_and_nothing_else(stateful: Any) -> None:
    for given in (None, GIVEN):
        model, trainer = make(stateful)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.interrupt)
        trainer.run(DATA)
        if given is not None:
            trainer.state.hidden = given
        trainer.run(DATA)
        begin = [0, 1, 2, 3, 4] if stateful is False else [0, 2] if given is not None else [0]
        stops = [*begin[1:], 5]
        pieces = [(DATA[a:b], given if a == 2 else None) for a, b in zip(begin, stops, strict=True)]
        assert same(weights(model), by_hand(pieces))


def test_a_state_that_is_set_may_have_other_rows() -> None:
    trainer = make(True)[1]
    trainer.run(batches(rows=3))
    trainer.state.hidden = GIVEN
    trainer.run(DATA)


# Other data


@pytest.mark.parametrize("stateful", [True, "data"])
@pytest.mark.parametrize(
    ("event", "last"),
    [
        (Events.GET_BATCH_STARTED(once=2), 2),
        (Events.GET_BATCH_COMPLETED(once=2), 3),
        (Events.ITERATION_STARTED(once=3), 3),
        (Tbptt_Events.TIME_ITERATION_COMPLETED(once=8), 3),
        (Events.ITERATION_COMPLETED(once=3), 3),
    ],
)
def test_set_data_begins_a_sequence_with_the_first_batch_of_the_new_data(stateful: Any, event: Any, last: int) -> None:
    model, trainer = make(stateful)
    other = batches(5, seed=1)
    trainer.add_event_handler(event, lambda: trainer.set_data(other))
    trainer.run(DATA)
    assert same(weights(model), by_hand([(DATA[:last], None), (other[: 5 - last], None)]))
    assert trainer.state_dict()["tbptt"]["data_position"] == 5 - last


def test_a_state_set_with_the_new_data_is_kept() -> None:
    model, trainer = make(True)
    other = batches(5, seed=1)

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def switch(engine: Any) -> None:
        engine.set_data(other)
        engine.state.hidden = GIVEN

    trainer.run(DATA)
    assert same(weights(model), by_hand([(DATA[:3], None), (other[:2], GIVEN)]))


@pytest.mark.parametrize("create", [create_supervised_tbptt_trainer, create_supervised_tbptt_evaluator])
def test_a_carried_state_and_shuffled_batches_are_warned_about_at_the_users_line(create: Any) -> None:
    model = seeded(Forecaster)
    arguments: tuple[Any, ...] = (
        (model, sgd(model), F.mse_loss)
        if create is create_supervised_tbptt_trainer
        else (
            model,
            {},
        )
    )
    x, y = torch.randn(8, 10, 3), torch.randn(8, 10, 2)

    def time_first(rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [torch.stack(parts, 1) for parts in zip(*rows, strict=True)]

    def loader(**kwargs: Any) -> Any:
        return DataLoader(TensorDataset(x, y), batch_size=4, collate_fn=time_first, **kwargs)

    for shuffled in (
        loader(shuffle=True),
        loader(sampler=torch.utils.data.WeightedRandomSampler([1.0] * 8, 8)),
        loader(sampler=torch.utils.data.DistributedSampler(range(8), 1, 0, shuffle=True)),  # type: ignore[arg-type]
    ):
        with pytest.warns(UserWarning, match="the DataLoader shuffles") as caught:
            create(*arguments, 4, stateful=True).run(shuffled)
        assert caught[0].filename == __file__
        create(*arguments, 4).run(shuffled)
    create(*arguments, 4, stateful=True).run(loader())


def test_streams_in_a_loader_are_the_same_batches() -> None:
    streams = ContiguousStreams((torch.arange(13), torch.arange(13)), rows=2, steps=3, remainder="drop")
    loaded: Any = DataLoader(streams, batch_size=None, num_workers=1)  # type: ignore[arg-type]
    assert [[x.tolist() for x in batch] for batch in loaded] == [[x.tolist() for x in batch] for batch in streams]
