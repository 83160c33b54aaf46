"""The trainer against contrib's and against a hand-written loop, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing from ignite.contrib announces its deprecation
    from ignite.contrib.engines.tbptt import Tbptt_Events as ContribEvents
    from ignite.contrib.engines.tbptt import create_supervised_tbptt_trainer as create_contrib_trainer

from ignite.engine import Engine, Events

from ignite_tbptt import Tbptt_Events, create_supervised_tbptt_trainer
from tests.helpers import Forecaster, batches, hand_written_loop, same, seeded, sgd, weights

Make = Callable[..., Any]


def train(
    factory: Make, kind: Callable[..., nn.Module], optimizer: Make, steps: int, length: int, dim: int, *args: Any
) -> tuple[list[float], list[torch.Tensor], dict[str, int]]:
    """Run two epochs and return the chunk losses, the weights and how often each event was fired."""

    class Model(Forecaster):
        def forward(self, x: torch.Tensor, hidden: Any = None) -> tuple[torch.Tensor, Any]:
            y, hidden = super().forward(x if dim % 3 == 0 else x.transpose(0, 1), hidden)
            return y if dim % 3 == 0 else y.transpose(0, 1), hidden

    model = seeded(lambda: Model(kind))
    trainer = factory(model, optimizer(model.parameters(), lr=0.01), F.mse_loss, steps, dim, *args)
    losses: list[Any] = []
    counts: dict[str, int] = {}

    def count(event: Any) -> Callable[[], None]:
        def handler() -> None:
            counts[event.name] = counts.get(event.name, 0) + 1

        return handler

    trainer.add_event_handler(ContribEvents.TIME_ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
    for event in (*ContribEvents, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
        trainer.add_event_handler(event, count(event))
    data = batches(steps=length)
    trainer.run([tuple(t.transpose(0, 1) for t in pair) for pair in data] if dim % 3 else data, max_epochs=2)
    return losses, weights(model), counts


@pytest.mark.parametrize("length", [12, 10, 3])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_is_contrib_bit_for_bit(length: int, kind: Callable[..., nn.Module], optimizer: Make) -> None:
    ours = train(create_supervised_tbptt_trainer, kind, optimizer, 4, length, 0)
    contrib = train(create_contrib_trainer, kind, optimizer, 4, length, 0)
    assert ours[0] == contrib[0]
    assert same(ours[1], contrib[1])
    assert ours[2] == contrib[2]


@pytest.mark.parametrize("dim", [0, 1, -3, -2])
def test_is_contrib_along_every_time_axis_with_all_positional_arguments(dim: int) -> None:
    def prepare_batch(batch: Any, device: Any, non_blocking: Any) -> Any:
        x, y = batch
        return 2 * x.to(device, non_blocking=non_blocking), y.to(device)

    ours = train(create_supervised_tbptt_trainer, nn.GRU, torch.optim.SGD, 4, 10, dim, "cpu", False, prepare_batch)
    contrib = train(create_contrib_trainer, nn.GRU, torch.optim.SGD, 4, 10, dim, "cpu", False, prepare_batch)
    assert ours[0] == contrib[0]
    assert same(ours[1], contrib[1])


def test_draws_random_numbers_in_contribs_order() -> None:
    def run(factory: Make) -> list[torch.Tensor]:
        class Noisy(Forecaster):
            def forward(self, x: torch.Tensor, hidden: Any = None) -> tuple[torch.Tensor, Any]:
                return super().forward(F.dropout(x, 0.5, self.training), hidden)

        def prepare_batch(batch: Any, device: Any, non_blocking: Any) -> Any:
            x, y = batch
            return x + torch.randn_like(x), y

        model = seeded(Noisy)
        trainer = factory(model, sgd(model), F.mse_loss, 4, prepare_batch=prepare_batch)
        trainer.add_event_handler(ContribEvents.TIME_ITERATION_STARTED, lambda: torch.rand(1))
        trainer.add_event_handler(ContribEvents.TIME_ITERATION_COMPLETED, lambda: model.eval() and torch.rand(1))
        trainer.run(batches(), max_epochs=2)
        return weights(model)

    assert same(run(create_supervised_tbptt_trainer), run(create_contrib_trainer))


def test_is_a_hand_written_loop_bit_for_bit() -> None:
    by_hand, by_trainer = seeded(Forecaster), seeded(Forecaster)
    expected = hand_written_loop(by_hand, sgd(by_hand), batches(), 4)
    losses: list[Any] = []
    trainer = create_supervised_tbptt_trainer(by_trainer, sgd(by_trainer), F.mse_loss, 4)
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, lambda: losses.append(trainer.state.output))
    trainer.run(batches())
    assert losses == expected
    assert same(weights(by_hand), weights(by_trainer))


def test_reports_the_mean_loss_weighted_by_length() -> None:
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model, lr=0.0), F.mse_loss, 4)
    x, y = batches(1, steps=9)[0]
    state = trainer.run([(x, y)])
    # With frozen parameters the weighted mean of the chunk losses is the loss of the whole sequence.
    whole = F.mse_loss(model(x)[0], y).item()
    assert state.output == pytest.approx(whole, rel=4 * torch.finfo(torch.float32).eps)


def test_mocks_pass_through_the_whole_loop() -> None:
    model = mock.MagicMock(return_value=(1, 1))
    optimizer, loss, started, completed = (mock.MagicMock() for _ in range(4))
    with mock.patch("ignite_tbptt.trainer.detach_hidden") as detach_hidden:
        trainer = create_supervised_tbptt_trainer(model, optimizer, loss, tbtt_step=2)
        trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_STARTED, started)
        trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, completed)
        trainer.run([(torch.rand(10, 5, 4), torch.rand(10, 5, 4))])
    for called in (started, completed, model, loss, optimizer.zero_grad, optimizer.step):
        assert called.call_count == 5
    assert detach_hidden.call_count == 4


def test_hidden_is_positional_and_absent_from_the_first_chunk() -> None:
    calls: list[int] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, *args: Any) -> Any:
            calls.append(len(args))
            return self.layer(args[0]), args[0][-1]

    model = Model()
    create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4).run(batches(2))
    assert calls == [1, 2, 2, 1, 2, 2]


@pytest.mark.parametrize("event", ["TIME_ITERATION_STARTED", *ContribEvents])
def test_contribs_events_are_ours(event: Any) -> None:
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4)
    handler = mock.Mock()
    trainer.add_event_handler(event, handler)
    trainer.run(batches(1))
    assert handler.call_count == 3


def test_returns_an_ignite_engine() -> None:
    model = seeded(Forecaster)
    assert isinstance(create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4), Engine)


def test_loads_the_state_dict_of_contribs_trainer() -> None:
    model = seeded(Forecaster)
    theirs = create_contrib_trainer(model, sgd(model), nn.MSELoss(), 4)
    theirs.run(batches(), max_epochs=2)
    ours = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state.iteration == 6
    ours.run(batches(), max_epochs=3)
    assert ours.state.iteration == 9
