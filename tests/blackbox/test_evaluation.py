"""Executors are maps: the same outputs in the same order, wherever they run and however many points go into a call."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from ignite_tbptt.blackbox.estimator import CentralDifference
from ignite_tbptt.blackbox.function import blackbox
from ignite_tbptt.blackbox.task import EvaluationCount, SerialEvaluation, StackedEvaluation
from tests.blackbox.helpers import EVALUATORS


@pytest.mark.parametrize("name", EVALUATORS)
@pytest.mark.parametrize("pool", ["map", "threads", "backwards"])
def test_any_map_gives_the_same_gradients(name: str, pool: str) -> None:
    def f(x: Tensor, w: Tensor) -> Any:
        return (x * w).sin().detach(), x.t().exp().detach()

    def backwards(function: Any, tasks: Any) -> Any:
        """As a pool whose workers finish in another order than they began."""
        tasks = list(tasks)
        return reversed([function(task) for task in reversed(tasks)])

    def gradients(executor: Any) -> list[Tensor]:
        x = torch.linspace(-1, 1, 84).reshape(7, 12).double().requires_grad_()
        w = torch.linspace(0.5, 2, 12).double().requires_grad_()
        outputs = blackbox(f, in_dims=(0, None), out_dims=(0, 1), executor=executor)(x, w)
        return list(torch.autograd.grad([y.sum() for y in outputs], [x, w]))

    with ThreadPoolExecutor(3) as threads:
        where: Any = {"map": map, "threads": threads.map, "backwards": backwards}[pool]
        found = gradients(dataclasses.replace(EVALUATORS[name], executor=where))  # type: ignore[type-var]
        assert all(map(torch.equal, found, gradients(where)))
    for got, want in zip(found, gradients(SerialEvaluation()), strict=True):
        assert torch.allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("name", EVALUATORS)
def test_points_that_move_what_rows_share_are_never_stacked(name: str) -> None:
    sizes: list[int] = []

    def f(x: Tensor, w: Tensor) -> Tensor:
        sizes.append(len(x))
        return (x * w).detach()

    x, w = torch.randn(4, 3), torch.randn(3, requires_grad=True)
    wrapped = blackbox(f, in_dims=(0, None), executor=EVALUATORS[name])
    wrapped(x, w).sum().backward()
    assert sizes[-6:] == [4] * 6
    assert wrapped.nfev == 6
    assert torch.allclose(w.grad, x.sum(0), atol=1e-4)  # type: ignore[arg-type]


def test_stacking_makes_one_call_of_many_in_portions_that_stay_in_cache() -> None:
    sizes: list[int] = []

    def f(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.detach().sin()

    x = torch.randn(10, 64, requires_grad=True)
    wrapped = blackbox(f, in_dims=0, executor=StackedEvaluation())
    wrapped(x).sum().backward()
    # forward, again, row 0 alone, all but row 0, two points in a stack; wider steps; and 128 points at 2.5 kB
    assert sizes[:5] == [10, 10, 10, 10, 20]
    assert sizes[5:] == [10] * (wrapped.count.probes - 4) + [1280]
    probes = wrapped.count.probes
    sizes.clear()
    wide = torch.randn(256, 64, requires_grad=True)
    wrapped(wide).sum().backward()
    assert max(sizes) == 256 * 8  # half a megabyte
    assert sum(sizes) == 256 * (129 + wrapped.count.probes - probes + 1)
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
    with pytest.raises(ValueError, match="chunk_bytes must be an int of at least 1, got 0"):
        SerialEvaluation(chunk_bytes=0)
    with pytest.raises(ValueError, match="stack_bytes must be an int of at least 1, got 0"):
        StackedEvaluation(stack_bytes=0)
