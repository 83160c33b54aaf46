"""What the factories are given is checked when it is given, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ignite_tbptt import create_supervised_tbptt_evaluator, create_supervised_tbptt_trainer
from tests.helpers import Forecaster, batches, seeded, sgd

FUNCTIONS = ["prepare_batch", "output_transform", "model_transform", "model_fn", "split_batch"]
OPTIONAL = ["initial_hidden", "loss_weight"]


def trainer_with(**changed: Any) -> Any:
    model = seeded(Forecaster)
    given = {"model": model, "optimizer": sgd(model), "loss_fn": F.mse_loss, "tbtt_step": 5, **changed}
    return create_supervised_tbptt_trainer(**given)


def evaluator_with(**changed: Any) -> Any:
    return create_supervised_tbptt_evaluator(**{"model": seeded(Forecaster), **changed})


@pytest.mark.parametrize("made", [trainer_with, evaluator_with])
@pytest.mark.parametrize("name", FUNCTIONS + OPTIONAL)
def test_what_is_called_can_be_called(made: Any, name: str) -> None:
    for value in ("mean", 3, torch.ones(2), None)[: 3 if name in OPTIONAL else 4]:
        with pytest.raises(TypeError, match=rf"^{name} must be {name}\(.*, got .*, which cannot be called"):
            made(**{name: value})
    with pytest.raises(TypeError, match=rf"^{name} must be .*, got the class Identity: make one, Identity\(\) say"):
        made(**{name: nn.Identity})


@pytest.mark.parametrize("made", [trainer_with, evaluator_with])
def test_a_model_is_a_module_and_an_axis_an_int(made: Any) -> None:
    for model in (None, Forecaster, "model", lambda x, hidden: (x, hidden)):
        with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got "):
            made(model=model)
    for dim in (None, 1.0, "time", True):
        with pytest.raises(TypeError, match=r"^dim must be an int, the axis of time in the tensors of a batch, got"):
            made(dim=dim)


def test_a_loss_is_a_function_and_no_class() -> None:
    with pytest.raises(TypeError, match=r"^loss_fn must be loss_fn\(y_pred, y\) -> loss, got the class MSELoss: make"):
        trainer_with(loss_fn=nn.MSELoss)
    with pytest.raises(TypeError, match=r"^loss_fn must be .*, got 'mse', which cannot be called"):
        trainer_with(loss_fn="mse")


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD, F.mse_loss, [nn.Parameter(torch.ones(1))]])
def test_an_optimizer_steps(optimizer: Any) -> None:
    with pytest.raises(
        TypeError, match=r"(?s)^optimizer must be an optimizer, .* the order is model, optimizer, loss_fn"
    ):
        trainer_with(optimizer=optimizer)


def test_metrics_have_names() -> None:
    with pytest.raises(TypeError, match=r"^metrics must be a dict of metrics by name, got 'loss'"):
        evaluator_with(metrics="loss")


@pytest.mark.parametrize("weight", [None, torch.ones(2), "all"])
def test_a_weight_is_a_number(weight: Any) -> None:
    trainer = trainer_with(loss_weight=lambda x, y: weight)
    trainer.logger.disabled = True
    with pytest.raises(TypeError, match="loss_weight must return a number, the steps that count, got"):
        trainer.run(batches(1))
