"""Random directions estimate without bias, with the variance that theory gives them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ignite_tbptt.blackbox.block import Rows
from ignite_tbptt.blackbox.estimator import SPSA, CentralDifference, Estimator, GaussianSmoothing
from ignite_tbptt.blackbox.function import blackbox
from ignite_tbptt.blackbox.random_directions import Orthogonal
from ignite_tbptt.blackbox.stencil import central
from ignite_tbptt.blackbox.step_size import AbsoluteStep
from tests.blackbox.helpers import RANDOM_DIRECTIONS

D = 64
VARIANCE = {
    "Rademacher": lambda d, n: (d - 1) / n,
    "Gaussian": lambda d, n: (d + 1) / n,
    "orthogonal": lambda d, n: d / n - 1,
}


def draws(kind: str, n: int, count: int, width: int = D) -> tuple[Tensor, Tensor]:
    """Estimates, (count, width), of the gradient of a linear function, and that gradient."""
    slope = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    estimator = Estimator(central(), RANDOM_DIRECTIONS[kind](n, 5), AbsoluteStep(0.25))
    # every row draws directions of its own, so that one call gives many estimates
    f = blackbox(lambda x: (x @ slope).detach(), estimator=estimator, in_dims=0)
    x = torch.zeros(count, width, dtype=torch.float64, requires_grad=True)
    f(x).sum().backward()
    assert x.grad is not None
    return x.grad, slope


# at 64 elements the kinds are a few hundredths apart, less than a tenth; at 2 they are far from one another
@pytest.mark.parametrize(("width", "n", "count"), [(D, 4, 4000), (2, 1, 40000)])
@pytest.mark.parametrize("kind", RANDOM_DIRECTIONS)
def test_mean_and_variance_are_those_of_theory(kind: str, width: int, n: int, count: int) -> None:
    found, true = draws(kind, n, count, width)
    variance = VARIANCE[kind](width, n) * true.square().sum()
    # 4 standard errors in the direction of the gradient, where the estimate varies least, and in all others together
    assert (found.mean(0) - true).square().sum() <= variance / count * (1 + 4 * math.sqrt(2 / width))
    along = found @ true / true.norm()
    assert abs(along.mean() - true.norm()) <= 4 * along.std() / math.sqrt(count)
    assert (found - true).square().sum(1).mean() == pytest.approx(float(variance), rel=0.1)


def test_orthogonal_directions_are_exact_once_they_are_as_many_as_elements() -> None:
    for n in (D, 3 * D):
        found, true = draws("orthogonal", n, 3)
        assert (found - true).norm(dim=1).max() <= 1e-13 * true.norm()


def test_no_more_orthogonal_directions_than_elements_are_evaluated() -> None:
    f = blackbox(lambda x: x.detach() * 2, estimator=Estimator(central(), Orthogonal(50)))
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    f(x).sum().backward()
    assert f.nfev == 6


def test_shared_inputs_and_rows_are_estimated_side_by_side() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).detach()

    estimator = Estimator(central(), Orthogonal(12), AbsoluteStep(0.5))
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    wrapped = blackbox(f, estimator=estimator, in_dims=(0, None))
    wrapped(x, w).sum().backward()
    assert wrapped.nfev == 2 * 3 + 2 * 3
    assert torch.allclose(x.grad, w.expand(5, 3), atol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(w.grad, x.sum(0), atol=1e-12)  # type: ignore[arg-type]


def test_directions_are_new_in_every_backward_and_the_same_in_every_run() -> None:
    def gradients() -> list[list[float]]:
        f = blackbox(lambda x: x.detach() * 3, estimator=SPSA(1, seed=7))
        x = torch.arange(8.0, requires_grad=True)
        return [torch.autograd.grad(f(x).sum(), x)[0].tolist() for _ in range(3)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = gradients()
    assert torch.equal(before, torch.get_rng_state())
    assert first == gradients()
    assert first[0] != first[1] != first[2]


def test_named_random_estimators_spend_two_evaluations_a_direction() -> None:
    for estimator in (SPSA(5), GaussianSmoothing(5, sigma=0.1)):
        f = blackbox(lambda x: x.detach() * 3, estimator=estimator)
        x = torch.ones(100, requires_grad=True)
        f(x).sum().backward()
        assert f.nfev == 10


def test_smoothing_gives_a_gradient_where_rounding_leaves_none() -> None:
    x = torch.full((40,), 0.9, requires_grad=True)
    f = blackbox(lambda x: torch.round(x.detach() * 4) / 4, estimator=GaussianSmoothing(2000, sigma=1.0))
    torch.autograd.grad(f(x).sum(), x)
    found = torch.autograd.grad(f(x).sum(), x)[0].mean()
    # smoothed by sigma = 4 quanta the staircase is its own line; mean of 40 of relative variance 41 / 2000 each
    assert abs(found - 1) <= 4 * math.sqrt(41 / 2000 / 40) + 0.01


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_a_number_of_directions_below_one_is_refused(n: int) -> None:
    for make in RANDOM_DIRECTIONS.values():
        with pytest.raises(ValueError, match=r"n must be a whole number of directions, at least 1, got .*give n=1"):
            make(n, 0)


def test_a_sigma_that_is_no_width_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a positive, finite number, got 0"):
        GaussianSmoothing(3, sigma=0)


@pytest.mark.parametrize("dim", [None, 0, 1, 2])
def test_rows_come_apart_and_together(dim: int | None) -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    rows = Rows(x.shape, dim)
    apart = rows.split(x)
    assert torch.equal(rows.join(apart), x)
    assert torch.equal(rows.join(torch.stack([apart, -apart])), torch.stack([x, -x]))
    assert x[rows.index(rows.rows - 1, 2)] == apart[-1, 2]


def test_random_directions_are_in_units_of_each_element_s_own_step() -> None:
    x = torch.tensor([300.0, 1e5, 0.2], dtype=torch.float64, requires_grad=True)
    f = blackbox(lambda x: x.detach() * 3, estimator=Estimator(central(), Orthogonal(3)))
    f(x).sum().backward()
    assert x.grad is not None
    # what is added for the large element and cancels is known to 3e5 2^-53; steps are 2^-18 max(1, |x|)
    assert torch.allclose(x.grad, torch.full((3,), 3.0).double(), rtol=1e-4)
    exact = torch.autograd.grad(blackbox(lambda x: x.detach() * 3, estimator=CentralDifference())(x).sum(), x)[0]
    assert torch.allclose(exact, torch.full((3,), 3.0).double(), rtol=1e-9)


@pytest.mark.parametrize("sigma", [0, -1.0, math.inf, math.nan])
def test_a_width_that_nothing_is_smoothed_over(sigma: float) -> None:
    with pytest.raises(ValueError, match=rf"sigma must be a positive, finite number, got {sigma}: .*SPSA\(n\)"):
        GaussianSmoothing(3, sigma)


def test_directions_are_the_same_wherever_a_script_lies() -> None:
    def gradient(path: str, line: int = 0) -> Tensor:
        space: dict[str, Any] = {}
        exec(compile("\n" * line + "def simulate(x):\n    return x.detach().sum()", path, "exec"), space)
        x = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        blackbox(space["simulate"], estimator=SPSA(1))(x).backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient("one/simulator.py"), gradient("two/simulator.py"))
    others = [gradient("one/simulator.py", line) for line in range(1, 9)]
    assert len({tuple(other.sign().tolist()) for other in others}) > 1  # where it stands in the file counts
