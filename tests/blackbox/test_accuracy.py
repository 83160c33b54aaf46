"""Gradients are as exact as theory lets them be: against autograd in float64, and against scipy at the same price.

Errors are relative norms over all gradients of a module, those of its input and of its parameters taken together. What
theory lets them be is derived in `accuracy`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize._numdiff import approx_derivative
from torch import Tensor

from ignite_tbptt.blackbox.estimator import CentralDifference, Estimator, ForwardDifference
from ignite_tbptt.blackbox.function import blackbox
from tests.blackbox.accuracy import FORMULAS, OF_A_BATCH, TABLE, Problem, of_any_size
from tests.blackbox.helpers import relative_error

FORWARD, CENTRAL = ForwardDifference(), CentralDifference()
SEEDS = {kind: range(3 if kind in ("transformer block", "GRU") else 6) for kind in OF_A_BATCH}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", OF_A_BATCH)
def test_modules_of_any_size_are_as_exact_as_derived(kind: str, dtype: torch.dtype) -> None:
    ratios: dict[str, list[float]] = {name: [] for name in FORMULAS}
    for seed in SEEDS[kind]:
        problem = Problem(of_any_size(kind, seed), seed, held_by=dtype)
        for name, formula in FORMULAS.items():
            error, expected = problem.error(formula, dtype), problem.expected(formula, dtype)
            # what is not truncation is noise, and noise stays within four standard errors
            assert error <= expected.truncation + 4 * expected.noise, (name, seed)
            ratios[name].append(error / expected.total)
    for name, some in ratios.items():
        # in the mean of squares noise is no more than its own; a bound ten times too wide would be none
        assert 0.1 <= math.sqrt(statistics.fmean(ratio**2 for ratio in some)) <= 1, name


@pytest.mark.parametrize("kind", TABLE)
def test_the_table_holds_for_a_small_batch(kind: str) -> None:
    """The promised figures, within a factor of two, by the median of five seeds.

    The table does not say what its modules' sizes and losses were. Here they are those of `OF_A_BATCH`, 64 to 256 rows
    for Linear and LayerNorm, 8 images of 6 x 6, 16 sequences of 6 steps; the loss is a sum of the outputs with weights
    between 1/2 and 3/2, and all numbers are such that float32 can hold them, in float64 as well, where a Linear then
    hardly rounds at all. Both matter: a loss of either sign, or few rows, makes a smaller gradient of the same
    round-off; central differences in float32 of a Linear(5, 6) on 3 rows are off by 4e-6 to 7e-6. What the error must
    be for other sizes and losses is what the test above asks.
    """
    settings = [(formula, dtype) for dtype in (torch.float32, torch.float64) for formula in FORMULAS.values()]
    problems = [Problem(OF_A_BATCH[kind], seed, torch.float32, positive=True) for seed in range(5)]
    for allowed, (formula, dtype) in zip(TABLE[kind], settings, strict=False):
        median = statistics.median(problem.error(formula, dtype) for problem in problems)
        assert median <= 2 * allowed, (formula, dtype)


@pytest.mark.parametrize("kind", OF_A_BATCH)
def test_bfloat16_evaluated_in_float32_loses_only_the_last_rounding(kind: str) -> None:
    formula = FORMULAS["central"]
    for seed in SEEDS[kind]:
        problem = Problem(of_any_size(kind, seed), seed, held_by=torch.bfloat16)
        found = problem.found(formula, torch.bfloat16, evaluated_in=torch.float32)
        in_float32 = problem.found(formula, torch.float32)
        assert all(torch.equal(one, other.bfloat16()) for one, other in zip(found, in_float32, strict=True))
        # rounding to the 8 bits of bfloat16 is off by at most 2^-8 in each element
        true = problem.parts(problem.gradient)
        assert relative_error(found, true) <= 2.0**-8 + relative_error(in_float32, true)


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
    """At the point and at others within a hundredth of it: at one alone, either may be lucky in the last bits of f."""
    function, at, twin = SCIPY[name]
    calls = 0

    def counted(x: Any) -> Any:
        nonlocal calls
        calls += 1
        return function(x)

    def off(jacobian: Any) -> float:
        return float(np.linalg.norm((jacobian - true) / np.maximum(np.abs(true), 1e-300)))

    nearby = 1 + 0.01 * np.random.default_rng(0).uniform(-1, 1, (40, len(at)))
    mine, theirs = [], []
    for point in np.array(at) * np.concatenate([np.ones((1, len(at))), nearby]):
        calls = 0
        jacobian = np.atleast_2d(approx_derivative(counted, point, method=method))
        their_calls = calls - 1  # the value at x, which the forward call has
        x = torch.tensor(point, requires_grad=True)
        true = torch.autograd.functional.jacobian(twin, x.detach()).numpy()
        theirs.append(off(jacobian))
        f = blackbox(function, estimator=estimator, numpy=True)
        y = f(x)
        mine.append(off(np.stack([torch.autograd.grad(row, x, retain_graph=True)[0].numpy() for row in y])))
        assert f.nfev == their_calls * len(y)
    assert np.linalg.norm(mine) <= 2 * np.linalg.norm(theirs)
