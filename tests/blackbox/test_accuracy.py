"""Gradients are as exact as theory lets them be: against autograd in float64, and against scipy at the same price.

Errors are relative norms over all gradients of a module, for a loss that is a positive sum of its outputs, at numbers
that float32 can hold. The table is the one this package promises, measured elsewhere on modules of unnamed sizes;
round-off averages out with the number of outputs, so the sizes here are those of a small batch, not of one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize._numdiff import approx_derivative
from torch import Tensor
from torch.func import functional_call

from ignite_tbptt.blackbox.estimator import CentralDifference, Estimator, ForwardDifference
from ignite_tbptt.blackbox.function import blackbox
from tests.blackbox.helpers import MODULES, relative_error, seen_through

FORWARD, CENTRAL, FOURTH = ForwardDifference(), CentralDifference(), CentralDifference(order=4)
SETTINGS: dict[str, tuple[Estimator, torch.dtype]] = {
    "forward, f32": (FORWARD, torch.float32),
    "central, f32": (CENTRAL, torch.float32),
    "order 4, f32": (FOURTH, torch.float32),
    "forward, f64": (FORWARD, torch.float64),
    "central, f64": (CENTRAL, torch.float64),
}
TABLE = {
    "Linear": (8e-5, 2e-6, 4e-7, 4e-10, 1e-16),
    "LayerNorm": (6e-5, 2e-6, 6e-7, 1e-9, 2e-12),
    "Conv2d": (1e-4, 4e-6, 8e-7, 2e-9, 2e-16),
    "GRU": (6e-4, 3e-5, 5e-6, 2e-8, 4e-11),
    # of all in the table the GRU is the most curved; a block of attention is no worse
    "transformer block": (6e-4, 3e-5, 5e-6, 2e-8, 4e-11),
}


def error(kind: str, estimator: Estimator, dtype: torch.dtype, evaluated_in: torch.dtype | None = None) -> float:
    torch.manual_seed(0)
    make, shape, dim = MODULES[kind]
    module = make()
    x = torch.randn(shape).to(dtype)
    parameters = {name: p.detach().to(dtype) for name, p in module.named_parameters()}
    true_x = x.double().requires_grad_()
    true = {name: p.double().requires_grad_() for name, p in parameters.items()}
    y = functional_call(module, true, (true_x,))
    cotangent = (torch.rand(y.shape) + 0.5).to(dtype)
    truth = torch.autograd.grad(y, [true_x, *true.values()], cotangent.double())

    mine_x = x.requires_grad_()
    mine = {name: p.requires_grad_() for name, p in parameters.items()}
    f = blackbox(
        seen_through(module.to(dtype)), estimator=estimator, in_dims=(None, dim), out_dims=dim, dtype=evaluated_in
    )
    y = f(mine, mine_x)
    assert y.dtype == dtype
    found = torch.autograd.grad(y, [mine_x, *mine.values()], cotangent)
    assert all(gradient.dtype == dtype for gradient in found)
    return relative_error(found, truth)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", MODULES)
def test_modules_are_within_twice_the_table(kind: str, setting: str) -> None:
    allowed = 2 * TABLE[kind][list(SETTINGS).index(setting)]
    assert error(kind, *SETTINGS[setting]) <= allowed


@pytest.mark.parametrize("kind", MODULES)
def test_order_4_in_float64(kind: str) -> None:
    # round-off alone: eps |f| 3/2 / h with h = 2^-10, relative to slopes of about |f|, and truncation below it
    assert error(kind, FOURTH, torch.float64) <= 2.0**-52 * 1.5 / 2.0**-10 * 30


@pytest.mark.parametrize("kind", MODULES)
def test_bfloat16_evaluated_in_float32_loses_only_the_last_rounding(kind: str) -> None:
    # rounding to the 8 bits of bfloat16 is off by at most 2^-8 in each element
    assert error(kind, CENTRAL, torch.bfloat16, torch.float32) <= 2.0**-8


def vector_of_two(x: Any) -> Any:
    return np.array([x[0] * np.sin(x[1]), x[1] * np.cos(x[0]), x[0] ** 3 * x[1] ** -0.5])


SCIPY: dict[str, tuple[Callable[[Any], Any], list[float], Callable[[Tensor], Tensor]]] = {
    "sinh at 1": (np.sinh, [1.0], torch.sinh),
    "x^2, tan, exp at 0.5": (
        lambda x: np.array([x[0] ** 2, np.tan(x[0]), np.exp(x[0])]),
        [0.5],
        lambda x: torch.stack([x[0] ** 2, torch.tan(x[0]), torch.exp(x[0])]),
    ),
    "sin(x0 x1) log x0 at (100, -0.5)": (
        lambda x: np.sin(x[0] * x[1]) * np.log(x[:1]),
        [100.0, -0.5],
        lambda x: torch.sin(x[0] * x[1]) * torch.log(x[:1]),
    ),
    "a vector of a vector at (-100, 0.2)": (
        vector_of_two,
        [-100.0, 0.2],
        lambda x: torch.stack([x[0] * torch.sin(x[1]), x[1] * torch.cos(x[0]), x[0] ** 3 * x[1] ** -0.5]),
    ),
}


@pytest.mark.parametrize(("method", "estimator"), [("2-point", FORWARD), ("3-point", CENTRAL)])
@pytest.mark.parametrize("name", SCIPY)
def test_no_more_than_twice_the_error_of_scipy_for_as_many_evaluations(
    name: str, method: str, estimator: Estimator
) -> None:
    function, at, twin = SCIPY[name]
    calls = 0

    def counted(x: Any) -> Any:
        nonlocal calls
        calls += 1
        return function(x)

    theirs = np.atleast_2d(approx_derivative(counted, np.array(at), method=method))
    their_calls = calls - 1  # the value at x, which the forward call has
    true = torch.autograd.functional.jacobian(twin, torch.tensor(at, dtype=torch.float64)).numpy()
    f = blackbox(function, estimator=estimator, numpy=True)
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    y = f(x)
    mine = np.stack([torch.autograd.grad(y[k], x, retain_graph=True)[0].numpy() for k in range(len(y))])
    assert f.nfev == their_calls * len(y)

    def off(jacobian: Any) -> Any:
        return np.linalg.norm((jacobian - true) / np.maximum(np.abs(true), 1e-300))

    # below this both are at the mercy of how the last bits of f fall
    unit = 2.0**-52 / {"2-point": 2.0**-26, "3-point": 2.0**-17}[method]
    assert off(mine) <= 2 * max(off(theirs), unit)
