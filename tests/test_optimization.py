from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from ignite_tbptt import Segment
from ignite_tbptt.optimization import OptimizerStep, PerSequence, PerWindows, as_accumulation

WINDOWS = [(Segment(0, 4),), (Segment(4, 8),), (Segment(8, 9),)]


def test_groups_of_windows_end_with_what_is_left() -> None:
    assert [len(group) for group in PerWindows(2).groups(WINDOWS)] == [2, 1]
    assert [len(group) for group in PerSequence().groups(WINDOWS)] == [3]


def test_shares_are_counted_in_windows_or_in_steps() -> None:
    assert PerWindows(2).expected(WINDOWS[:2]) == 2
    assert PerWindows(2).share(3) == 1
    assert PerWindows(2).share(0) == 0
    assert PerSequence().expected(WINDOWS) == 9
    assert PerSequence().share(3) == 3


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
