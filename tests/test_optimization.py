from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ignite_tbptt import Segment
from ignite_tbptt.optimization import (
    MeanLoss,
    OptimizerStep,
    PerSequence,
    PerWindows,
    SumLoss,
    as_accumulation,
    reduction_of,
)


def test_a_step_is_taken_for_so_many_windows_and_for_those_left_in_an_epoch() -> None:
    assert [PerWindows(3).closes(count, True, False) for count in (1, 2, 3)] == [False, False, True]
    assert PerWindows(3).closes(1, True, True)
    assert [PerSequence().closes(5, ends, False) for ends in (False, True)] == [False, True]


def test_segments_weigh_as_the_policy_says_where_all_steps_count() -> None:
    window = (Segment(0, 2, loss_weight=0.0), Segment(2, 6, loss_weight=0.4), Segment(6, 8, loss_weight=0.6))
    assert PerWindows(1).weights(window, [0, 4, 2]) == pytest.approx([0.0, 0.4, 0.6])
    assert PerWindows(1).scale(window) == 1.0


def test_segments_weigh_by_the_steps_that_count() -> None:
    window = (Segment(0, 4, loss_weight=0.5), Segment(4, 8, loss_weight=0.5))
    # The mean over 3 + 1 counting steps, in whatever unit they are counted.
    for accumulation in (PerWindows(1), PerSequence()):
        assert accumulation.weights(window, [3, 1]) == pytest.approx([0.75, 0.25])
        assert accumulation.weights(window, [30, 10]) == pytest.approx([0.75, 0.25])
        assert accumulation.weights(window, [0, 1]) == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize(
    ("loss_fn", "kind"),
    [
        (F.mse_loss, MeanLoss),
        (nn.MSELoss(), MeanLoss),
        (nn.MSELoss(reduction="sum"), SumLoss),
        (partial(F.mse_loss, reduction="sum"), SumLoss),
        (partial(F.mse_loss, reduction="mean"), MeanLoss),
        (mock.MagicMock(), MeanLoss),
    ],
)
def test_the_reduction_of_a_loss_is_read(loss_fn: Any, kind: type) -> None:
    assert type(reduction_of(loss_fn)) is kind


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(TypeError, match="optimizer must step without a closure, got LBFGS"):
        OptimizerStep(torch.optim.LBFGS([nn.Parameter(torch.ones(1))]))


@pytest.mark.parametrize("value", [0, -1])
def test_accumulation_below_one_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"gradient_accumulation_steps must be at least 1, got {value}"):
        as_accumulation(value)


@pytest.mark.parametrize("value", [1.5, None, True])
def test_accumulation_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="gradient_accumulation_steps must be an int"):
        as_accumulation(value)


def test_an_unknown_accumulation_is_refused() -> None:
    with pytest.raises(ValueError, match="'sequence', got 'batch'"):
        as_accumulation("batch")


def parameter_with_gradient(gradient: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.full((1,), gradient)
    return parameter


def test_the_gradients_are_corrected_before_they_are_looked_at() -> None:
    parameter = parameter_with_gradient(3.0)
    step = OptimizerStep(torch.optim.SGD([parameter, nn.Parameter(torch.ones(1))], lr=1.0))
    seen: list[float] = []

    def look() -> bool:
        assert parameter.grad is not None
        seen.append(parameter.grad.item())
        return True

    assert step.take(2.0, look)
    assert seen == [6.0]
    assert parameter.item() == -5.0


def test_a_refused_step_is_not_taken() -> None:
    parameter = parameter_with_gradient(3.0)
    assert not OptimizerStep(torch.optim.SGD([parameter], lr=1.0)).take(1.0, lambda: False)
    assert parameter.item() == 1.0


@pytest.mark.parametrize("ready", [mock.Mock(return_value=False), mock.Mock(side_effect=RuntimeError("handler"))])
def test_a_scaler_can_go_on_after_a_step_that_was_refused_or_failed(ready: mock.Mock) -> None:
    parameter = parameter_with_gradient(3.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    step = OptimizerStep(torch.optim.SGD([parameter], lr=1.0), scaler)
    for _ in range(2):
        step.zero()
        step.backward(parameter.sum())
        if ready.side_effect:
            with pytest.raises(RuntimeError, match="handler"):
                step.take(1.0, ready)
        else:
            assert not step.take(1.0, ready)
    assert parameter.item() == 1.0
    step.zero()
    step.backward(parameter.sum())
    assert step.take(1.0, lambda: True)
    assert parameter.item() == 0.0


def test_a_step_that_the_scaler_skips_does_not_count_as_taken() -> None:
    parameter = parameter_with_gradient(0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    step = OptimizerStep(torch.optim.SGD([parameter], lr=1.0), scaler)
    step.zero()
    step.backward((parameter * float("inf")).sum())
    assert not step.take(1.0, lambda: True)
    assert parameter.item() == 1.0
    assert scaler.get_scale() == 2.0
