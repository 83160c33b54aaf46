"""Elements that are NaN or infinite, padding say: what counts is right, and what cannot be is said by name."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ignite_tbptt.blackbox import (
    BlackboxError,
    CentralDifference,
    Estimator,
    ForwardDifference,
    GuidedDirections,
    MeasuredStep,
    Orthogonal,
    banded,
    blackbox,
    estimate_noise,
    step_sweep,
)

PADDING = [math.nan, math.inf, -math.inf]
COUNTS = torch.tensor([True, True, False, True])[:, None]
MEASURED = MeasuredStep()


def padded(padding: float) -> Tensor:
    rows = [[0.5, 1.2], [0.9, 1.7], [padding, padding], [1.3, 0.4]]
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def error(fn: Any, padding: float, **options: Any) -> tuple[float, Any]:
    """How far the gradient of sin(x) x is off where it counts; where it does not, it must be 0."""
    x, f = padded(padding), blackbox(fn, numpy=True, in_dims=0, **options)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore")
        torch.where(COUNTS, f(x), 0.0).sum().backward()
    true = torch.where(COUNTS, x.sin() + x * x.cos(), 0.0).detach()
    assert x.grad is not None
    assert torch.equal(x.grad[2], torch.zeros(2, dtype=torch.float64))
    return float((x.grad - true).abs().max()), f


def smooth(x: Any) -> Any:
    return np.sin(x) * x


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(
    ("estimator", "within"),
    [
        (CentralDifference(), 1e-9),
        (ForwardDifference(), 1e-6),
        (CentralDifference(step_size=MEASURED), 1e-9),
        (CentralDifference(step_size=MeasuredStep(per_element=True)), 1e-9),
        (Estimator(directions=Orthogonal(2), step_size=MEASURED), 1e-9),
        (Estimator(directions=GuidedDirections(3), step_size=MEASURED), 1e-9),
    ],
)
def test_rows_that_do_not_count_change_nothing(padding: float, estimator: Estimator, within: float) -> None:
    found, _ = error(smooth, padding, estimator=estimator)
    assert found < within


def test_the_other_side_is_looked_at_beside_padding() -> None:
    x = torch.tensor([1 - 1e-10, math.nan], dtype=torch.float64, requires_grad=True)
    f: Any = blackbox(np.arcsin, numpy=True, in_dims=0, estimator=ForwardDifference())
    with np.errstate(invalid="ignore"):
        f(x)[0].backward()
    assert x.grad is not None
    # one-sided at a distance h from x, where f'' = x / (1 - x^2)^(3/2) is huge: the step is 1.5e-8
    edge = np.float64(1 - 1e-10)
    assert float(x.grad[0]) == pytest.approx((np.arcsin(edge) - np.arcsin(edge - 2.0**-26)) / 2.0**-26, rel=1e-6)
    assert float(x.grad[1]) == 0.0


@pytest.mark.parametrize("padding", PADDING)
def test_a_coarse_function_is_found_out_beside_padding(padding: float) -> None:
    # the noise of four decimals, 3e-5, gives (noise)^(2/3) = 1e-3; a step that does not see it is off by 1
    found, f = error(lambda x: np.round(smooth(x), 4), padding)
    assert found < 1e-2
    assert f._facts.measures


@pytest.mark.parametrize("padding", PADDING)
def test_noise_beside_padding_is_no_coupling_of_rows(padding: float) -> None:
    generator = np.random.default_rng(0)
    found, _ = error(lambda x: smooth(x) + 1e-5 * generator.standard_normal(x.shape), padding, repeatable=False)
    assert found < 1e-2


def test_a_row_that_turns_nan_by_another_is_coupled() -> None:
    generator = np.random.default_rng(0)

    def coupled(x: Any) -> Any:
        y = smooth(x) + 1e-9 * generator.standard_normal(x.shape)
        return np.where(x[:1] == 0.5, y, np.nan)

    x = torch.tensor([[0.5], [0.9]], dtype=torch.float64, requires_grad=True)
    f = blackbox(coupled, numpy=True, in_dims=0, repeatable=False)
    with pytest.raises(BlackboxError, match="are independent, but moving row 0 changed the outputs of other rows"):
        f(x).sum().backward()


@pytest.mark.parametrize("padding", PADDING)
def test_a_certificate_is_of_what_counts(padding: float) -> None:
    found, f = error(smooth, padding, certify=1)
    assert found < 1e-9
    assert f.certificate is not None
    assert f.certificate.relative < 1e-9


@pytest.mark.parametrize("padding", [*PADDING, 1e3])
@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("first", [0, 4])
def test_where_all_is_padding_no_step_is_measured(padding: float, per_element: bool, first: int) -> None:
    # Of a window the last step is measured, and all of its rows are padding: saturated, or not finite.
    inputs = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
    inputs[first + 1 :] = padding
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    estimator = CentralDifference(step_size=MeasuredStep(per_element=per_element))
    f: Any = blackbox(lambda x, h, w: np.tanh(x * w + h), numpy=True, in_dims=(0, 0, None), estimator=estimator)

    def loss(step: Any, weight: Tensor) -> Tensor:
        state = total = torch.zeros(4, dtype=torch.float64)
        for x in inputs:
            found, counts = step(x, state, weight), (x.abs() <= 1).all()
            state = torch.where(counts, found, state)
            total = total + torch.where(counts, found, 0.0)
        return total.sum()

    for _ in range(2):
        weight.grad = None
        with np.errstate(invalid="ignore"):
            loss(f, weight).backward()
        same = weight.detach().requires_grad_()
        loss(lambda x, h, w: torch.tanh(torch.where(x.abs() <= 1, x, 0.0) * w + h), same).backward()
        assert weight.grad is not None
        assert same.grad is not None
        assert float(weight.grad) == pytest.approx(float(same.grad), rel=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_where_only_noise_is_seen_the_longest_step_is_not_taken(seed: int) -> None:
    # Both calls share their steps, and the later one, which is saturated, is measured.
    generator = np.random.default_rng(seed)
    f: Any = blackbox(
        lambda x, w: np.tanh(x * w) + 1e-7 * generator.standard_normal(x.shape),
        numpy=True,
        repeatable=False,
        estimator=CentralDifference(step_size=MEASURED),
    )
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (f(x, weight) * x + f(torch.full_like(x, 1e3), weight)).sum().backward()
    true = (x * x / torch.cosh(x * weight.detach()) ** 2).sum()
    assert weight.grad is not None
    # noise^(2/3) is 2e-5; at the longest step, 1, the truncation is 0.2
    assert float(weight.grad) == pytest.approx(float(true), rel=1e-3)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("sparsity", ["elementwise", banded(1)])
def test_colours_beside_padding(padding: float, sparsity: Any) -> None:
    x = torch.tensor([0.5, 1.2, padding, 0.7], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([True, True, False, True])
    f = blackbox(smooth, numpy=True, estimator=CentralDifference(sparsity=sparsity), certify=1)
    with np.errstate(invalid="ignore"):
        torch.where(counts, f(x), 0.0).sum().backward()
    true = torch.where(counts, x.sin() + x * x.cos(), 0.0).detach()
    assert x.grad is not None
    assert float((x.grad - true).abs().max()) < 1e-9
    assert f.certificate is not None


@pytest.mark.parametrize("step", [None, MEASURED])
@pytest.mark.parametrize("in_dims", [None, 0])
@pytest.mark.parametrize(("value", "spelled"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_an_input_that_no_step_leads_away_from(step: Any, in_dims: Any, value: float, spelled: str) -> None:
    def saturated(x: Any) -> Any:
        return np.arctan(np.nan_to_num(x))

    x = torch.tensor([1.0, value], dtype=torch.float64, requires_grad=True)
    f = blackbox(saturated, numpy=True, in_dims=in_dims, estimator=CentralDifference(step_size=step))
    with pytest.raises(BlackboxError, match=rf"^x of saturated is {spelled} at element \(1,\), and no step leads away"):
        f(x).sum().backward()


@pytest.mark.parametrize("value", PADDING)
def test_noise_and_steps_are_not_measured_where_the_function_is_not_finite(value: float) -> None:
    x = torch.tensor([1.0, value], dtype=torch.float64)
    for measure in (estimate_noise, step_sweep):
        with pytest.raises(BlackboxError, match="square is NaN or infinite at the inputs"):
            measure(np.square, x, numpy=True)
        measure(lambda x: np.sin(np.where(np.isfinite(x), x, 0.0)), x, numpy=True)


def test_an_input_from_inference_mode_is_named() -> None:
    weight = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        x = torch.ones(3)
    f = blackbox(lambda x, w: (x * w).sum(), numpy=True)
    with pytest.raises(RuntimeError, match=r"an argument of <lambda> was made under torch\.inference_mode\(\).*clone"):
        f(x, weight)
    f(x.clone(), weight).backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, x)
