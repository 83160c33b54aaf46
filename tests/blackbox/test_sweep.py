"""The sweep finds the step that theory finds, and the noise that was put in."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor

from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.noise import estimate_noise, noise_level
from ignite_tbptt.blackbox.stencil import Stencil, central, forward
from ignite_tbptt.blackbox.sweep import step_sweep

mpl.use("Agg")

EPS32, EPS64 = 2.0**-23, 2.0**-52


@pytest.mark.parametrize("stencil", [forward(), central(), central(4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_step_and_error_are_those_of_theory(stencil: Stencil, dtype: torch.dtype) -> None:
    x = torch.linspace(0.5, 2.5, 20, dtype=dtype)
    sweep = step_sweep(torch.exp, x, stencil=stencil)
    eps = torch.finfo(dtype).eps
    assert sweep.reference == ("float64" if dtype == torch.float32 else "richardson")
    # a function of size 1 with derivatives of size 1: h and error have the exponents of theory, to a factor of ten
    power = 1 / (stencil.order + 1)
    assert abs(math.log10(sweep.recommended / eps**power)) <= 1.3
    assert sweep.noise_floor <= 10 * eps ** (1 - power)
    # to the right of the best step truncation rules: its slope in the picture is the order
    doubled = [math.log2(after / before) for before, after in itertools.pairwise(sweep.errors)]
    right = [slope for h, slope in zip(sweep.steps, doubled, strict=False) if 4 * sweep.recommended <= h <= 0.25]
    assert right or stencil.order == 4
    assert all(abs(slope - stencil.order) < 0.5 for slope in right[:3])
    # to the left round-off does: an error of some eps / h
    h, error = sweep.steps[2], sweep.errors[2]
    assert error <= 20 * eps / h


@pytest.mark.parametrize("sigma", [1e-2, 1e-5])
def test_noise_is_measured_as_large_as_it_was_made(sigma: float) -> None:
    def noisy(generator: np.random.Generator, distances: Sequence[float]) -> list[float]:
        return [math.exp(t) + sigma * generator.normal() for t in distances]

    found = [noise_level(functools.partial(noisy, np.random.default_rng(seed)), 1.0, EPS64) for seed in range(9)]
    # a level from some six differences is good to a factor of about two; the median of nine is better
    assert 0.5 <= float(np.median(found)) / sigma <= 2


def test_a_function_that_rounds_is_given_a_step_over_its_quanta() -> None:
    def rounds(x: Tensor) -> Tensor:
        return torch.round(x * 64) / 64 * 3

    x = torch.tensor([1.1, 2.3, 0.7, 5.1, 0.3])
    sweep = step_sweep(rounds, x)
    assert sweep.reference == "richardson"
    assert sweep.recommended >= 1 / 64
    assert 0.2 / 64 / 3 <= sweep.noise * float(rounds(x).abs().sum()) <= 6 / 64


def test_numpy_functions_integers_beside_and_large_steps_outside_the_domain() -> None:
    def f(x: Any, index: Any) -> Any:
        return np.array([math.log(value) for value in x[index]])

    sweep = step_sweep(f, torch.tensor([0.5, 0.25]), torch.tensor([1, 0]), numpy=True)
    assert sweep.reference == "richardson"
    assert sweep.noise_floor <= 1e-8
    assert math.isnan(sweep.errors[-1])


def test_random_numbers_are_common_and_streams_are_kept() -> None:
    before = torch.get_rng_state()
    sweep = step_sweep(lambda x: torch.dropout(x.exp(), 0.5, True), torch.linspace(0, 1, 30))
    assert sweep.noise_floor <= 1e-4
    assert torch.equal(before, torch.get_rng_state())


def test_a_picture() -> None:
    sweep = step_sweep(torch.sin, torch.ones(3))
    axes = sweep.plot()
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert len(axes.lines[0].get_xdata()) == sum(error > 0 for error in sweep.errors)
    assert sweep.plot(axes) is axes
    assert f"step {sweep.recommended:.3g}" in str(sweep)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"ignite-tbptt\[plot\]"):
        step_sweep(torch.sin, torch.ones(3)).plot()


def test_what_cannot_be_swept_is_refused() -> None:
    with pytest.raises(TypeError, match=r"needs a tensor of floating point .* got torch.int64, torch.complex64"):
        step_sweep(torch.sin, torch.ones(2).long(), torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="fn must be callable"):
        step_sweep(torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(BlackboxError, match="is NaN or infinite at the inputs"):
        step_sweep(torch.log, -torch.ones(2))
    with pytest.raises(BlackboxError, match="does not change along the direction"):
        step_sweep(torch.zeros_like, torch.ones(2))


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e6])
def test_the_scale_of_the_inputs_is_found(size: float) -> None:
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * size
    sweep = step_sweep(lambda x: size / x, x)
    # a function of x / size: the best step is that of size 1, times the size, to a factor of ten
    assert 0.1 <= sweep.recommended / size / EPS64 ** (1 / 3) <= 10
    assert sweep.noise_floor <= 10 * EPS64 ** (2 / 3)


def test_small_inputs_of_a_function_of_size_one() -> None:
    sweep = step_sweep(lambda x: (x + 1).exp(), torch.tensor([1e-6, 3e-6]))
    assert 0.1 <= sweep.recommended / EPS32 ** (1 / 3) <= 10


def test_quanta_that_are_equally_far_apart_are_seen() -> None:
    """In some of these places neighbours are one quantum apart each, as of a line without noise."""
    for place in range(40):
        x = torch.tensor([1.1 + place / 39], dtype=torch.float64)
        level = estimate_noise(lambda x: np.round(np.sin(x) + x * x, 4), x, numpy=True).level
        # a quantum of 1e-4, uniformly: 1e-4 / sqrt(12), up to the few values that were looked at
        assert 1e-4 / math.sqrt(12) / 5 < level < 1e-4 / math.sqrt(12) * 5
        sweep = step_sweep(lambda x: np.round(np.sin(x) + x * x, 4), x, numpy=True)
        # half a quantum over a step that is no longer than 1, over a slope of 4
        assert sweep.noise_floor > 1e-6
