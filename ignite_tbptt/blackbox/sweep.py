"""The error of a difference formula against its step, measured: which step to take, and how noisy the function is.

Along one direction a function of many numbers is a function of one. Its slope is known from Richardson extrapolation,
in float64 where the function can be evaluated there, well enough to measure the error of each single step. The error
falls with the order of the formula where truncation rules, and rises with the noise over h where round-off does. Pairs
with any stencil; what it recommends goes into `AbsoluteStep`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.noise import Line, Scalar, noise_level, one_by_one
from ignite_tbptt.blackbox.stencil import Stencil, central

__all__ = ["StepSweep", "step_sweep"]


@dataclass(frozen=True)
class StepSweep:
    """Error against step; made by `step_sweep`.

    Attributes:
        steps: the steps, rising powers of two.
        errors: relative error of the slope at each step, or that of the true slope where this is larger.
        noise: standard deviation of what the evaluations are off by, relative to the size of the function.
        reference: where the true slope was taken from, "float64" or "richardson".
        recommended: the step of the smallest error, with its neighbours taken into account.
        order: of the formula.
    """

    steps: tuple[float, ...]
    errors: tuple[float, ...]
    noise: float
    reference: str
    recommended: float
    order: int

    @property
    def noise_floor(self) -> float:
        """The relative error at the recommended step. No step does better by more than luck."""
        return self.errors[self.steps.index(self.recommended)]

    def __str__(self) -> str:
        return (
            f"order {self.order}, reference {self.reference}: step {self.recommended:.3g} has error "
            f"{self.noise_floor:.1e}; the function is off by {self.noise:.1e} of its size"
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw the curve; returns the axes.

        Args:
            ax: matplotlib axes, new ones by default.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("plot() needs matplotlib: pip install 'ignite-tbptt[plot]'") from error
            ax = pyplot.subplots(layout="constrained")[1]
        shown = [(h, error) for h, error in zip(self.steps, self.errors, strict=True) if error > 0]
        ax.loglog(*zip(*shown, strict=True), marker=".", label=f"order {self.order}")
        ax.axvline(self.recommended, color="0.5", linestyle="--", label=f"recommended {self.recommended:.2g}")
        ax.axhline(self.noise_floor, color="0.8", zorder=0)
        ax.set(xlabel="step", ylabel=f"relative error ({self.reference})")
        ax.legend()
        return ax


def step_sweep(
    fn: Callable[..., Any], *inputs: Any, stencil: Stencil | None = None, numpy: bool = False, seed: int = 0
) -> StepSweep:
    """Measure the error of a difference formula against its step, along one direction through the inputs.

    Example:
        >>> import torch
        >>> sweep = step_sweep(torch.sin, torch.tensor([1.0, 2.0]))
        >>> sweep.reference, 1e-3 < sweep.recommended < 0.1
        ('float64', True)

    Some 120 evaluations in float32, twice as many in float64, and more for inputs that are much smaller than 1.

    Args:
        fn: function of the inputs, as `blackbox` takes it.
        inputs: its arguments. Those tensors are moved that require grad, or all float tensors where none does.
        stencil: the formula; central of order 2 by default.
        numpy: hand the function numpy arrays, in float64.
        seed: of the signs of the direction and of the weights of the outputs.

    Raises:
        TypeError: fn is not callable, or no input is a tensor of floating point.
        BlackboxError: fn is NaN or infinite at the inputs, or does not change along the direction at any step.

    The slope is that of Ridders (1982, Accurate computation of F'(x) and F'(x)F''(x)), the noise that of ECNoise (More
    and Wild 2011, Estimating computational noise).
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {type(fn).__name__}: step_sweep(fn, *inputs)")
    formula = central() if stencil is None else stencil
    line = Line(fn, inputs, numpy, seed)
    with torch.no_grad(), line.streams.replayed():
        phi = line.along(torch.float64 if numpy else None)
        size = abs(phi(0.0))
        if not math.isfinite(size):
            raise BlackboxError(f"{line.label} is NaN or infinite at the inputs: there is no slope to measure")
        eps = torch.finfo(torch.float64 if numpy else line.dtype).eps
        steps = line.steps(math.ceil(math.log2(eps)) + 3)
        noise = noise_level(one_by_one(phi), line.scale, eps)
        (truth, doubt), reference = _truth(line, phi, steps, noise, numpy)
        found = [abs(_slope(formula, phi, h) - truth) / abs(truth) for h in steps]
        # a slope that the true one was taken from agrees with it, whatever both are off by
        errors = [error if error > doubt or math.isnan(error) else doubt for error in found]
    best = _lowest(errors)
    return StepSweep(tuple(steps), tuple(errors), noise / (size or 1.0), reference, steps[best], formula.order)


def _truth(line: Line, phi: Scalar, steps: list[float], noise: float, numpy: bool) -> tuple[tuple[float, float], str]:
    """The slope, from float64 where that is more than the function works in, else from all steps; and its doubt."""
    if not numpy and line.dtype != torch.float64:
        try:
            exact = line.along(torch.float64)
            eps = torch.finfo(torch.float64).eps
            fine = line.steps(-40)
            fine_noise = noise_level(one_by_one(exact), line.scale, eps)
            # a function that rounds inside gains nothing from float64
            if fine_noise < 0.01 * noise:
                return _ridders(exact, fine, fine_noise, line.label), "float64"
        except (RuntimeError, TypeError, ValueError):
            pass  # it is written for one precision only
    return _ridders(phi, steps, noise, line.label), "richardson"


def _slope(stencil: Stencil, phi: Scalar, h: float) -> float:
    return sum(w * phi(c * h) for c, w in zip(stencil.offsets, stencil.weights, strict=True)) / h


def _ridders(phi: Scalar, steps: list[float], noise: float, label: str) -> tuple[float, float]:
    """The entry of Richardson's tableau whose neighbours differ least, noise over step counted in; and by how much.

    The difference is relative.
    """
    best, found = math.inf, math.nan
    row: list[float] = []
    for h in reversed(steps):
        above, row = row, [_slope(central(), phi, h)]
        for m, diagonal in enumerate(above[:6]):
            row.append(row[m] + (row[m] - diagonal) / (4 ** (m + 1) - 1))
            error = max(abs(row[-1] - row[-2]), abs(row[-1] - diagonal)) + noise / h
            # relative: slopes over steps much longer than the function's scale vanish, and differ by little from 0
            if math.isfinite(row[-1]) and row[-1] and error / abs(row[-1]) < best:
                best, found = error / abs(row[-1]), row[-1]
    if not math.isfinite(found):
        raise BlackboxError(
            f"{label} does not change along the direction that was tried, at any step up to {steps[-1]:.3g}: its "
            "gradient is zero there, or its steps are larger; try other inputs, or another seed"
        )
    return found, best


def _lowest(errors: list[float]) -> int:
    """Where the error is lowest, judged by the worst of each step and its neighbours: a single low one is luck."""
    finite = [error if math.isfinite(error) else math.inf for error in errors]
    return min(range(len(finite)), key=lambda k: (max(finite[max(0, k - 1) : k + 2]), finite[k]))
