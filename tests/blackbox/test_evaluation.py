"""Evaluators are maps: the same outputs in the same order, however many points go into a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ignite_tbptt.blackbox.estimator import CentralDifference
from ignite_tbptt.blackbox.function import blackbox
from ignite_tbptt.blackbox.task import (
    Call,
    EvaluationCount,
    Points,
    SerialEvaluation,
    StackedEvaluation,
)
from tests.blackbox.helpers import EVALUATORS


@pytest.mark.parametrize("name", EVALUATORS)
def test_outputs_come_in_the_order_of_the_points(name: str) -> None:
    def f(x: Tensor, w: Tensor) -> Any:
        return x * w, x.t()

    x, w = torch.randn(7, 4, 3), torch.randn(3)
    call = Call(f, "f", EvaluationCount(), in_dims=[0, None], out_dims=[0, 1])
    call([x[0], w], "at x")
    portions = [Points.of([part, w.expand(len(part), 3)], True, str) for part in x.split(3)]
    found = list(EVALUATORS[name].evaluate(call, portions))
    assert [len(outputs[0]) for outputs in found] == [3, 3, 1]
    assert torch.equal(torch.cat([outputs[0] for outputs in found]), x * w)
    assert torch.equal(torch.cat([outputs[1] for outputs in found]), x.transpose(1, 2))


@pytest.mark.parametrize("name", EVALUATORS)
def test_points_that_move_what_rows_share_are_never_stacked(name: str) -> None:
    x, w = torch.randn(4, 3), torch.randn(5, 3)
    call = Call(lambda x, w: x * w, "f", EvaluationCount(), in_dims=[0, None], out_dims=[0])
    call([x, w[0]], "at x")
    (found,) = next(EVALUATORS[name].evaluate(call, [Points.of([x.expand(5, 4, 3).clone(), w], False, str)]))
    assert torch.equal(found, x * w[:, None])
    assert call.count.nfev == 6


def test_stacking_makes_one_call_of_many_in_portions_that_stay_in_cache() -> None:
    sizes: list[int] = []

    def f(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.detach().sin()

    x = torch.randn(10, 64, requires_grad=True)
    wrapped = blackbox(f, in_dims=0, executor=StackedEvaluation())
    wrapped(x).sum().backward()
    # forward, the probe of the rows, the probe of the stack, and 128 points at 2.5 kB
    assert sizes == [10, 10, 20, 1280]
    sizes.clear()
    wide = torch.randn(256, 64, requires_grad=True)
    wrapped(wide).sum().backward()
    assert max(sizes) == 256 * 8  # half a megabyte
    assert sum(sizes) == 256 * 129
    sizes.clear()
    wider = torch.randn(1024, 64, requires_grad=True)
    wrapped(wider).sum().backward()
    # two would fit, which is not worth it
    assert sizes == [1024] * 129


def test_a_function_that_draws_random_numbers_is_not_stacked() -> None:
    sizes: list[int] = []

    def f(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return torch.nn.functional.dropout(x, 0.5).detach()

    x = torch.ones(8, 3, requires_grad=True)
    y = blackbox(f, in_dims=0, executor=StackedEvaluation())(x)
    y.sum().backward()
    assert set(sizes) == {8}
    assert torch.allclose(x.grad, y, atol=1e-5)  # type: ignore[arg-type]


def test_counts_are_of_calls_and_can_be_shared() -> None:
    count = EvaluationCount()
    one = blackbox(lambda x: x.detach() * 2, count=count)
    two = blackbox(lambda x: x.detach() * 3, count=count, estimator=CentralDifference(4))
    x = torch.ones(3, requires_grad=True)
    (one(x) + two(x)).sum().backward()
    assert (count.nfev, one.nfev, count.gradients) == (2 * 3 + 4 * 3, 18, 2)
    assert one.seconds == two.seconds > 0


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk_bytes must be at least 1, got 0"):
        SerialEvaluation(chunk_bytes=0)
    with pytest.raises(ValueError, match="stack_bytes must be at least 1, got 0"):
        StackedEvaluation(stack_bytes=0)
