"""Bad input to the factories and in a run: the message names what came and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt import create_supervised_tbptt_evaluator, create_supervised_tbptt_trainer
from tests.helpers import Forecaster, batches, same, seeded, sgd, weights


def make_trainer(model: Any = None, loss_fn: Any = F.mse_loss, tbtt_step: Any = 4, **kwargs: Any) -> Any:
    model = model or seeded(Forecaster)
    return create_supervised_tbptt_trainer(model, sgd(model), loss_fn, tbtt_step, **kwargs)


@pytest.mark.parametrize("make", [make_trainer, lambda **kw: create_supervised_tbptt_evaluator(Forecaster(), **kw)])
@pytest.mark.parametrize(
    ("tbtt_step", "kind", "message"),
    [
        (0, ValueError, "tbtt_step must be at least 1, got 0"),
        (-4, ValueError, "tbtt_step must be at least 1, got -4"),
        (True, TypeError, "tbtt_step must be an int.*got True of type bool"),
        (4.0, TypeError, "tbtt_step must be an int.*got 4.0 of type float"),
        ("4", TypeError, "tbtt_step must be an int.*got '4' of type str"),
        (None, TypeError, "tbtt_step must be an int.*of type NoneType"),
    ],
)
def test_tbtt_step(make: Any, tbtt_step: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make(tbtt_step=tbtt_step)


@pytest.mark.parametrize("make", [make_trainer, lambda **kw: create_supervised_tbptt_evaluator(Forecaster(), **kw)])
def test_unknown_amp_mode(make: Any) -> None:
    with pytest.raises(ValueError, match=r"amp_mode must be None or 'amp'.*got 'apex'"):
        make(amp_mode="apex")


@pytest.mark.parametrize("scaler", [True, torch.amp.GradScaler("cpu")])
def test_a_scaler_without_amp(scaler: Any) -> None:
    with pytest.raises(ValueError, match=r"scaler=.* is given, but amp_mode is None"):
        make_trainer(scaler=scaler)


def test_gradient_accumulation_steps() -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps must be at least 1, got 0"):
        make_trainer(gradient_accumulation_steps=0)


@pytest.mark.parametrize("dim", [2, -3])
def test_dim_out_of_range(dim: int) -> None:
    with pytest.raises(ValueError, match=rf"dim={dim} is out of range for batch\[0\] of shape \(10, 4\)"):
        make_trainer(dim=dim).run([(torch.zeros(10, 4), torch.zeros(10, 4))])


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        ((torch.zeros(10, 4, 3), torch.zeros(6, 4, 2)), ValueError, r"batch\[0\] has 10, batch\[1\] has 6"),
        ((torch.zeros(0, 4, 3), torch.zeros(0, 4, 2)), ValueError, "empty sequence"),
        (([], []), ValueError, "no tensor to cut"),
        ({"x": torch.zeros(10, 4, 3), "y": torch.zeros(10, 4, 2)}, TypeError, "batch is of type dict.*prepare_batch"),
        (torch.zeros(10, 4, 3), TypeError, "batch is of type Tensor"),
        ((torch.zeros(10, 4, 3),) * 3, TypeError, "batch is of type tuple of 3 items"),
        ((torch.zeros(10, 4, 3), None), ValueError, "no chunk of the batch had a target"),
    ],
)
def test_batches(batch: Any, kind: type[Exception], message: str) -> None:
    model = seeded(Forecaster)
    before = weights(model)
    with pytest.raises(kind, match=message):
        make_trainer(model).run([batch])
    assert same(weights(model), before)


def test_prepare_batch_that_makes_no_pair() -> None:
    with pytest.raises(TypeError, match="the result of prepare_batch is of type Tensor, but must be a pair"):
        make_trainer(prepare_batch=lambda batch, device, non_blocking: batch[0]).run(batches(1))


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.output = output

    def forward(self, x: Tensor, hidden: Any = None) -> Any:
        return self.output(self.layer(x))


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda y: y, "type Tensor"),  # two time steps would unpack without a word
        (lambda y: (y, y, y), "type tuple of 3 items"),
        (lambda y: {"y": y, "hidden": y}, "type dict"),
        (lambda y: None, "type NoneType"),
    ],
)
@pytest.mark.parametrize("evaluate", [False, True])
def test_a_model_that_returns_no_pair(output: Any, got: str, evaluate: bool) -> None:
    engine = (
        create_supervised_tbptt_evaluator(Returns(output)) if evaluate else make_trainer(Returns(output), tbtt_step=2)
    )
    with pytest.raises(TypeError, match=rf"output of the model is of {got}.*\(y_pred, hidden\).*model_fn"):
        engine.run(batches(1, steps=2))


def test_a_hidden_state_without_tensors() -> None:
    with pytest.raises(TypeError, match=r"the hidden state must hold tensors.*returned 7"):
        make_trainer(Returns(lambda y: (y, 7))).run(batches(1))


@pytest.mark.parametrize(
    ("loss_fn", "kind", "message"),
    [
        (lambda y_pred, y: (y_pred - y) ** 2, ValueError, r"must return a scalar, got a tensor of shape \(4, 4, 2\)"),
        (lambda y_pred, y: 3.0, TypeError, "must return a scalar tensor, got float"),
        (lambda y_pred, y: F.mse_loss(y_pred.detach(), y), ValueError, r"does not require grad.*\.item\(\).*detach"),
    ],
)
def test_losses(loss_fn: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make_trainer(loss_fn=loss_fn).run(batches(1))


@pytest.mark.parametrize("evaluate", [False, True])
def test_a_bidirectional_layer_is_warned_about(evaluate: bool) -> None:
    model = nn.GRU(3, 1, bidirectional=True)
    with pytest.warns(UserWarning, match="GRU is bidirectional: its backward direction sees only the chunk"):
        create_supervised_tbptt_evaluator(model) if evaluate else make_trainer(model)


@pytest.mark.parametrize("evaluate", [False, True])
def test_a_stateful_engine_with_another_number_of_rows(evaluate: bool) -> None:
    model = seeded(Forecaster)
    engine = create_supervised_tbptt_evaluator(model, stateful=True) if evaluate else make_trainer(model, stateful=True)
    data = [*batches(1, rows=4), *batches(1, rows=3)]
    with pytest.raises(ValueError, match=r"the batch has 3 rows, but the hidden state .* has 4.*ContiguousStreams"):
        engine.run(data)


def test_a_stateful_trainer_whose_state_was_dropped_takes_another_number_of_rows() -> None:
    trainer = make_trainer(stateful=True)

    @trainer.on("ITERATION_COMPLETED")
    def drop(engine: Any) -> None:
        engine.state.hidden = None

    trainer.run([*batches(1, rows=4), *batches(1, rows=3)])
    assert trainer.state.iteration == 2
