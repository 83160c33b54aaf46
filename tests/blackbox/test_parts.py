"""What an estimator, an executor and their like are made of is checked when they are made, not at a gradient."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from ignite_tbptt.blackbox import (
    SPSA,
    AbsoluteStep,
    BoundedStep,
    CentralDifference,
    Estimator,
    ForwardDifference,
    GuidedDirections,
    Journaled,
    MeasuredStep,
    Orthogonal,
    PerInputStep,
    RelativeStep,
    SerialEvaluation,
    StackedEvaluation,
    blackbox,
    detect_sparsity,
    estimate_noise,
)

NO_STEPS: list[Any] = [1e-3, 0, 0.0, torch.tensor([1e-3, 1e-2]), "small", MeasuredStep]
TAKES_A_STEP: list[Callable[[Any], Any]] = [
    lambda step: CentralDifference(step_size=step),
    ForwardDifference,
    lambda step: SPSA(4, step),
    lambda step: Estimator(step_size=step),
    lambda step: BoundedStep(step, 0.0, 1.0),
]


@pytest.mark.parametrize("make", TAKES_A_STEP)
@pytest.mark.parametrize("step", NO_STEPS, ids=repr)
def test_a_step_size_is_no_number(make: Callable[[Any], Any], step: Any) -> None:
    with pytest.raises(TypeError, match="step_size must be a StepSize, got"):
        make(step)


def test_the_error_says_how_to_give_a_number() -> None:
    with pytest.raises(TypeError, match=r"give AbsoluteStep\(0\.001\), or RelativeStep\(0\.001\) for a step relative"):
        CentralDifference(step_size=1e-3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="make one, RelativeStep"):
        CentralDifference(step_size=MeasuredStep)  # type: ignore[arg-type]
    x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    blackbox(torch.square, estimator=CentralDifference(step_size=AbsoluteStep(1e-3)))(x).backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(4.0, abs=1e-9)


def test_step_sizes_of_each_input() -> None:
    with pytest.raises(TypeError, match=r"step_sizes\[1\] must be a StepSize, got 0.1"):
        PerInputStep((RelativeStep(), 0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step_sizes must be a tuple"):
        PerInputStep(RelativeStep())  # type: ignore[arg-type]


def test_bounds_are_numbers() -> None:
    with pytest.raises(TypeError, match="lower must be a number or a tensor, got 'zero'"):
        BoundedStep(RelativeStep(), "zero")  # type: ignore[arg-type]
    BoundedStep(RelativeStep(), (0.0, None), torch.ones(3))


@pytest.mark.parametrize("directions", [8, "orthogonal", Orthogonal])
def test_directions_are_made(directions: Any) -> None:
    with pytest.raises(TypeError, match="directions must be Directions, got"):
        Estimator(directions=directions)


def test_stencils_are_taken() -> None:
    with pytest.raises(TypeError, match="stencil must be a Stencil, got 2"):
        Estimator(2)  # type: ignore[arg-type]


@pytest.mark.parametrize("executor", [4, "threads", ThreadPoolExecutor, None], ids=repr)
def test_executors_run(executor: Any, tmp_path: Any) -> None:
    for make in (
        lambda: SerialEvaluation(executor=executor),
        lambda: StackedEvaluation(executor=executor),
        lambda: Journaled(tmp_path / "journal", executor),
    ):
        with pytest.raises(TypeError, match="executor must be called as map"):
            make()


def test_a_journal_begins_with_its_path() -> None:
    with pytest.raises(TypeError, match="path must be that of a file, got <class 'map'>; executor comes after it"):
        Journaled(map, map)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 2.5, True, float("nan")])
def test_bytes_are_whole(size: Any) -> None:
    with pytest.raises(ValueError, match="chunk_bytes must be an int of at least 1"):
        SerialEvaluation(size)
    with pytest.raises(ValueError, match="stack_bytes must be an int of at least 1"):
        StackedEvaluation(size)


@pytest.mark.parametrize("seed", [0.5, "1", None])
def test_seeds_are_not_cut_off(seed: Any) -> None:
    x = torch.ones(2)
    for make in (
        lambda: Orthogonal(2, seed),
        lambda: SPSA(2, seed=seed),
        lambda: GuidedDirections(4, seed=seed),
        lambda: detect_sparsity(torch.sin, x, seed=seed),
        lambda: estimate_noise(torch.sin, x, seed=seed),
    ):
        with pytest.raises(TypeError, match="seed must be an int, got"):
            make()
    Orthogonal(2, np.int64(3))  # type: ignore[arg-type]
