"""Sparse Jacobians in as many evaluations as there are colours, against float64 autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ignite_tbptt.blackbox import (
    AbsoluteStep,
    BlackboxError,
    BoundedStep,
    CentralDifference,
    ForwardDifference,
    RelativeStep,
    banded,
    blackbox,
    detect_sparsity,
)
from ignite_tbptt.blackbox.coloring import Banded, coloring_of, pattern_of


def diffusion(x: Tensor) -> Tensor:
    """One explicit step on a line, with a reaction: tridiagonal."""
    padded = torch.cat([x[:1], x, x[-1:]])
    return x + 0.2 * (padded[2:] - 2 * x + padded[:-2]) + 0.1 * x**3


def gradients(fn: Any, estimator: Any, x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Any]:
    """By differences and by autograd, for a random cotangent."""
    f = blackbox(lambda x: fn(x).detach(), estimator=estimator)
    y, truth = f(x), fn(x)
    v = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(y, x, v)[0], torch.autograd.grad(truth, x, v)[0], f


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_a_tridiagonal_jacobian_takes_three_evaluations_a_side() -> None:
    x = doubles(1000)
    for estimator, evaluations, near in (
        (CentralDifference(sparsity=banded(1)), 6, 1e-9),
        (ForwardDifference(sparsity=banded(1)), 3, 1e-6),
        (CentralDifference(4, sparsity=banded(1)), 12, 1e-11),
    ):
        found, truth, f = gradients(diffusion, estimator, x)
        assert f.nfev == evaluations
        assert (found - truth).abs().max() <= near


def test_an_elementwise_function_takes_one() -> None:
    found, truth, f = gradients(torch.sin, ForwardDifference(sparsity="elementwise"), doubles(40, 25))
    assert f.nfev == 1
    assert (found - truth).abs().max() <= 1e-7


def test_a_dense_pattern_and_a_sparse_matrix() -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    pattern = torch.rand(30, 50, generator=torch.Generator().manual_seed(0)) < 0.05
    weights = torch.randn(30, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * pattern

    def fn(x: Tensor) -> Tensor:
        return (weights @ x).sin()

    for sparsity in (pattern, pattern.numpy(), scipy_sparse.csr_matrix(pattern.numpy())):
        found, truth, f = gradients(fn, CentralDifference(sparsity=sparsity), doubles(50))
        assert f.nfev == 2 * coloring_of(pattern_of(sparsity), 50).count < 2 * 50
        assert (found - truth).abs().max() <= 1e-9


def test_two_inputs_lie_side_by_side() -> None:
    pattern = torch.cat([torch.eye(4), torch.eye(4)], 1).bool()
    f = blackbox(lambda x, w: (x * w).detach(), estimator=CentralDifference(sparsity=pattern))
    x, w = doubles(4), doubles(4)
    f(x, w).sum().backward()
    assert f.nfev == 4
    assert torch.allclose(x.grad, w.detach(), atol=1e-9)  # type: ignore[arg-type]
    assert torch.allclose(w.grad, x.detach(), atol=1e-9)  # type: ignore[arg-type]


def as_pattern(coloring: Any, inputs: int) -> Tensor:
    pattern = torch.zeros(coloring.owners.shape[1], inputs + 1, dtype=torch.bool)
    return pattern.scatter_(1, coloring.owners.T, torch.ones_like(coloring.owners.T, dtype=torch.bool))[:, :inputs]


def test_columns_of_one_colour_share_no_row() -> None:
    random = torch.rand(40, 60) < 0.1
    distance = torch.arange(60) - torch.arange(60)[:, None]
    for sparsity, pattern in (
        (random, random),
        (banded(2, 0), (distance >= -2) & (distance <= 0)),
        (banded(2, 1), (distance >= -2) & (distance <= 1)),
        (banded(70), distance < 100),
        ("elementwise", distance == 0),
    ):
        coloring = coloring_of(pattern_of(sparsity), 60)
        assert torch.equal(as_pattern(coloring, 60), pattern)
        for color in range(coloring.count):
            assert pattern[:, coloring.colors == color].sum(1).max() <= 1
        for output in (0, 17):
            assert coloring.inputs_of(output) == pattern[output].nonzero()[:, 0].tolist()
    assert coloring_of(banded(2, 1), 60).count == 4


def test_a_band_takes_memory_for_its_diagonals_alone() -> None:
    coloring = coloring_of(banded(1), 1_000_000)
    assert coloring.owners.numel() == 3_000_000


@pytest.mark.parametrize("wrong", [banded(0, 1), "elementwise", torch.eye(60).bool()])
def test_a_wrong_pattern_is_refused(wrong: Any) -> None:
    x = doubles(60)
    f = blackbox(lambda x: diffusion(x).detach(), estimator=CentralDifference(sparsity=wrong))
    with pytest.raises(BlackboxError, match=r"sparsity says that output \d+ .* depends on .* alone, but it changed"):
        f(x).sum().backward()


@pytest.mark.parametrize(
    ("estimator", "weight"),
    [
        (CentralDifference(sparsity=banded(1)), 0.01),
        (ForwardDifference(sparsity=banded(1)), 0.01),
        (CentralDifference(4, sparsity=banded(1)), 0.01),
        (CentralDifference(step_size=BoundedStep(RelativeStep(), -3.5, 3.5), sparsity=banded(1)), 0.01),
        (CentralDifference(step_size=AbsoluteStep(0.1), sparsity=banded(1)), 0.1),  # 0.001 is lost to truncation
    ],
)
def test_one_entry_that_is_missing_is_found_at_the_first_gradient(estimator: Any, weight: float) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(30, dtype=torch.float64, generator=generator).clamp(-3.5, 3.5)
        x[3], x[7] = 3.5, -3.5  # at the bounds
        row = int(torch.randint(0, 30, (1,), generator=generator))
        column = (row + int(torch.randint(2, 29, (1,), generator=generator))) % 30

        def fn(x: Tensor, extra: float, row: int = row, column: int = column) -> Tensor:
            y = diffusion(x).detach().clone()
            y[row] += extra * x[column]
            return y

        x.requires_grad_()
        blackbox(fn, estimator=estimator)(x, 0.0).sum().backward()
        with pytest.raises(BlackboxError, match=rf"sparsity says that output {row} of fn depends on .* alone"):
            blackbox(fn, estimator=estimator)(x, weight).sum().backward()


@pytest.mark.parametrize("pattern", ["elementwise", banded(1)])
@pytest.mark.parametrize("weights", [(-2.0, 1.0, 1.0), (0.0, 1.0, -1.0)])
def test_entries_that_are_missing_and_nearly_cancel_are_found(pattern: Any, weights: tuple[float, ...]) -> None:
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        first, second = torch.randint(2, 14, (2,), generator=generator).tolist()
        row = int(torch.randint(0, 30, (1,), generator=generator))
        places = torch.tensor([row, row + first, row + first + second]) % 30

        def fn(x: Tensor, places: Tensor = places) -> Tensor:
            y = diffusion(x).detach() if isinstance(pattern, Banded) else x.detach() ** 2
            y[places[0]] += x[places] @ torch.tensor(weights).double()
            return y

        x = torch.randn(30, dtype=torch.float64, generator=generator).requires_grad_()
        y = blackbox(fn, estimator=CentralDifference(sparsity=pattern))(x).sum()
        with pytest.raises(BlackboxError, match=rf"output {row} of fn depends on .* alone"):
            y.backward()


def test_rounding_that_spreads_over_all_outputs_is_no_dependence() -> None:
    turns = torch.exp(2j * torch.pi * torch.fft.rfftfreq(256, dtype=torch.float64))
    shift = torch.eye(256).roll(1, 1).bool()

    def shifted(x: Tensor) -> Tensor:
        found: Tensor = torch.fft.irfft(torch.fft.rfft(x) * turns, n=256)
        return found

    found, truth, _ = gradients(shifted, CentralDifference(sparsity=shift), doubles(256))
    assert (found - truth).abs().max() <= 1e-9


def test_a_noisy_function_with_a_pattern_is_not_refused() -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        return x.detach() ** 2 + 1e-6 * torch.randn(x.shape, dtype=x.dtype, generator=generator)

    x = doubles(10)
    estimator = CentralDifference(step_size=AbsoluteStep(0.05), sparsity="elementwise")
    blackbox(noisy, estimator=estimator, repeatable=False)(x).sum().backward()
    # the noise of a difference over a step of 2 * 0.05, five standard deviations of it
    assert x.grad is not None
    assert (x.grad - 2 * x.detach()).abs().max() <= 5 * 2**0.5 * 1e-6 / 0.1


def test_the_pattern_is_looked_at_again() -> None:
    coupled = False

    def fn(x: Tensor) -> Tensor:
        return (x.roll(1) * x if coupled else x**2).detach()

    f = blackbox(fn, estimator=CentralDifference(sparsity="elementwise"))
    x = doubles(40)
    f(x).sum().backward()
    coupled = True
    with pytest.raises(BlackboxError, match="sparsity says"):
        f(x).sum().backward()


def test_what_a_pattern_cannot_be() -> None:
    x = doubles(4)
    with pytest.raises(TypeError, match="sparsity must be a bool tensor"):
        blackbox(diffusion, estimator=CentralDifference(sparsity="tridiagonal"))(x).sum().backward()
    with pytest.raises(TypeError, match=r"got torch.float32 of shape \(4, 4\)"):
        blackbox(diffusion, estimator=CentralDifference(sparsity=torch.eye(4)))(x).sum().backward()
    with pytest.raises(ValueError, match="sparsity has 5 columns, and there are 4 numbers"):
        blackbox(diffusion, estimator=CentralDifference(sparsity=torch.eye(5).bool()))(x).sum().backward()
    with pytest.raises(ValueError, match="sparsity is of 4 outputs, but the function gives 1 tensors of 1 numbers"):
        blackbox(lambda x: x.detach().sum(), estimator=CentralDifference(sparsity="elementwise"))(x).backward()
    y = doubles(4)
    product = blackbox(lambda x, y: (x * y).detach(), estimator=CentralDifference(sparsity="elementwise"))
    with pytest.raises(ValueError, match=r"all 2 differentiated inputs, .* give in_dims=0 instead"):
        product(x, y).sum().backward()
    y = blackbox(lambda x: x.detach() * 2, estimator=CentralDifference(sparsity="elementwise"), in_dims=0)(
        doubles(4, 3)
    )
    with pytest.raises(ValueError, match="sparsity and in_dims cannot be said of one blackbox"):
        y.sum().backward()
    with pytest.raises(ValueError, match="above must be a whole number of diagonals, 0 or more, got -1"):
        banded(1, -1)


def test_a_pattern_that_is_changed_later_is_as_it_was() -> None:
    pattern = torch.eye(6, dtype=torch.bool)
    estimator = CentralDifference(sparsity=pattern)
    pattern[:] = True
    _, _, f = gradients(torch.sin, estimator, doubles(6))
    assert f.nfev == 2


def test_patterns_of_inputs_whose_memory_is_not_in_order() -> None:
    x = torch.rand(3, 4, dtype=torch.float64).T
    expected = torch.autograd.functional.jacobian(lambda x: x.cumsum(0), x).flatten(2).flatten(0, 1) != 0
    assert torch.equal(detect_sparsity(lambda x: x.cumsum(0), x), expected)
    assert detect_sparsity(torch.sin, torch.tensor(0.3)).tolist() == [[True]]


def test_bounds_turn_all_of_a_colour() -> None:
    seen: list[Tensor] = []

    def fn(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return diffusion(x)

    x = torch.linspace(0, 1, 30, dtype=torch.float64).requires_grad_()
    step = BoundedStep(RelativeStep(), 0.0, 1.0)
    found, truth, _ = gradients(fn, CentralDifference(step_size=step, sparsity=banded(1)), x)
    assert all(bool(((point >= 0) & (point <= 1)).all()) for point in seen)
    assert (found - truth).abs().max() <= 1e-8


def test_patterns_are_detected() -> None:
    x = torch.rand(12, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(diffusion, x) != 0
    assert torch.equal(detect_sparsity(diffusion, x), expected)
    # behind a condition that holds at some points alone
    assert (
        detect_sparsity(lambda x: torch.where(x.sum() > 0.3, x, x.flip(0)), torch.full((6,), 0.05), points=8).sum() > 6
    )
    with pytest.raises(ValueError, match="points must be a whole number of places to look at, at least 1, got 0"):
        detect_sparsity(diffusion, x, points=0)
    with pytest.raises(ValueError, match=r"points must be a whole number .* got 2\.5; 3 finds"):
        detect_sparsity(diffusion, x, points=2.5)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(TypeError, match="fn must be callable, got Tensor"):
        detect_sparsity(x, x)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(TypeError, match="needs a tensor of floating point"):
        detect_sparsity(lambda x: x, torch.ones(2, dtype=torch.int64))
