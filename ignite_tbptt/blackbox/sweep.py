"""The error of a difference formula against its step, measured: which step to take, and how noisy the function is.

Along one direction a function of many numbers is a function of one. Its slope is known from Richardson extrapolation,
in float64 where the function can be evaluated there, well enough to measure the error of each single step. The error
falls with the order of the formula where truncation rules, and rises with the noise over h where round-off does. Pairs
with any stencil; what it recommends goes into `AbsoluteStep`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.flat import FlatCall, Outputs
from ignite_tbptt.blackbox.stencil import Stencil, central
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["StepSweep", "noise_level", "step_sweep"]

Scalar = Callable[[float], float]


@dataclass(frozen=True)
class StepSweep:
    """Error against step; made by `step_sweep`.

    Attributes:
        steps: the steps, rising powers of two.
        errors: relative error of the slope at each step.
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
        """The relative error at the recommended step: no step does better by more than luck."""
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
    line = _Line(fn, inputs, numpy, seed)
    with torch.no_grad(), line.streams.replayed():
        phi = line.along(torch.float64 if numpy else None)
        size = abs(phi(0.0))
        if not math.isfinite(size):
            raise BlackboxError(f"{line.label} is NaN or infinite at the inputs: there is no slope to measure")
        eps = torch.finfo(torch.float64 if numpy else line.dtype).eps
        steps = line.steps(math.ceil(math.log2(eps)) + 3)
        noise = noise_level(phi, line.scale, eps)
        truth, reference = line.truth(phi, steps, noise, numpy)
        errors = [abs(_slope(formula, phi, h) - truth) / abs(truth) for h in steps]
    best = _lowest(errors)
    return StepSweep(tuple(steps), tuple(errors), noise / (size or 1.0), reference, steps[best], formula.order)


class _Line:
    """A function of nested tensors, along a direction of random signs, its outputs weighted at random."""

    def __init__(self, fn: Callable[..., Any], inputs: tuple[Any, ...], numpy: bool, seed: int) -> None:
        self.label = getattr(fn, "__name__", type(fn).__name__)
        self._arguments = FlatCall(fn, inputs, {}, numpy=numpy)
        self._function = self._arguments
        tensors = self._arguments.tensors
        floats = [k for k, tensor in enumerate(tensors) if tensor.is_floating_point() and tensor.numel()]
        self._moved = [k for k in floats if tensors[k].requires_grad] or floats
        if not self._moved:
            found = ", ".join(str(tensor.dtype) for tensor in tensors) or "no tensor at all"
            raise TypeError(
                f"step_sweep needs a tensor of floating point among the inputs of {self.label}, got {found}: integers "
                "cannot be moved by a small step, complex numbers go in as torch.view_as_real(input)"
            )
        self._seed = seed
        self.dtype = max((tensors[k].dtype for k in self._moved), key=lambda dtype: torch.finfo(dtype).eps)
        largest = max(float(tensors[k].abs().max()) for k in self._moved)
        self.scale = 2.0 ** round(math.log2(largest)) if largest else 1.0
        self.streams = RandomStreams.now()
        self._weights: list[Tensor] | None = None

    def along(self, dtype: torch.dtype | None) -> Scalar:
        """The weighted sum of the outputs at x + t d, evaluated in the given precision or that of the inputs."""
        tensors = [tensor.detach() for tensor in self._arguments.tensors]
        tensors = [t.to(dtype) if dtype and t.is_floating_point() else t for t in tensors]
        signs = torch.Generator().manual_seed(self._seed)
        direction = {
            k: (torch.randint(0, 2, tensors[k].shape, generator=signs) * 2 - 1).to(tensors[k]) for k in self._moved
        }
        known: dict[float, float] = {}

        def phi(t: float) -> float:
            if t not in known:
                self.streams.restore()
                points = [x + t * direction[k] if k in direction else x.clone() for k, x in enumerate(tensors)]
                try:
                    known[t] = self._weighted(Outputs.of(self._function(*points), self.label))
                except (ArithmeticError, ValueError):
                    if t == 0:
                        raise
                    known[t] = math.nan  # outside the domain, as the large steps may be
            return known[t]

        return phi

    def steps(self, first: int) -> list[float]:
        """Powers of two from ``2 ** first`` of the size of x to that size, or to 1 where x is smaller."""
        last = max(0, -round(math.log2(self.scale)))
        return [self.scale * 2.0**power for power in range(first, last + 1)]

    def _weighted(self, outputs: Outputs) -> float:
        values = [tensor.double().cpu() for tensor in outputs.tensors if tensor.is_floating_point()]
        if self._weights is None:
            generator = torch.Generator().manual_seed(self._seed + 1)
            self._weights = [torch.rand(v.shape, generator=generator, dtype=torch.float64) + 0.5 for v in values]
        return sum(float((weight * value).sum()) for weight, value in zip(self._weights, values, strict=True))

    def truth(self, phi: Scalar, steps: list[float], noise: float, numpy: bool) -> tuple[float, str]:
        """The slope, from float64 where that is more than the function works in, else from all steps together."""
        if not numpy and self.dtype != torch.float64:
            try:
                exact = self.along(torch.float64)
                eps = torch.finfo(torch.float64).eps
                fine = self.steps(-40)
                fine_noise = noise_level(exact, self.scale, eps)
                # a function that rounds inside gains nothing from float64
                if fine_noise < 0.01 * noise:
                    return _ridders(exact, fine, fine_noise, self.label), "float64"
            except (RuntimeError, TypeError, ValueError):
                pass  # it is written for one precision only
        return _ridders(phi, steps, noise, self.label), "richardson"


def noise_level(phi: Scalar, scale: float, eps: float) -> float:
    """Standard deviation of the noise in a function of one number, near 0 (ECNoise, More and Wild 2011, section 4).

    Args:
        phi: the function.
        scale: size of the numbers that it is given.
        eps: their relative precision, where the spacing of the seven values starts.

    Returns:
        The noise in the units of phi; 0 where none was seen, as with a constant.
    """
    spacing = scale * eps**0.75
    level = 0.0
    while spacing < scale:
        values = [phi((k - 3) * spacing) for k in range(7)]
        if not all(map(math.isfinite, values)):
            break
        differences, levels, changes, gamma = values, [], [], 1.0
        for k in range(1, 7):
            differences = [after - before for before, after in itertools.pairwise(differences)]
            gamma *= k / (2 * (2 * k - 1))
            levels.append(math.sqrt(gamma * sum(d * d for d in differences) / len(differences)))
            changes.append(min(differences) < 0 < max(differences))
            if k == 1 and 2 * sum(d == 0 for d in differences) > len(differences):
                break  # most values are the same: the quantum of the function is larger than this
        else:
            for k in range(4):
                if changes[k] and max(levels[k : k + 3]) <= 4 * min(levels[k : k + 3]):
                    return levels[k]
            level = level or levels[-1]
        spacing *= 8
    return level


def _slope(stencil: Stencil, phi: Scalar, h: float) -> float:
    return sum(w * phi(c * h) for c, w in zip(stencil.offsets, stencil.weights, strict=True)) / h


def _ridders(phi: Scalar, steps: list[float], noise: float, label: str) -> float:
    """The entry of Richardson's tableau whose neighbours differ least, noise over step counted in."""
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
    return found


def _lowest(errors: list[float]) -> int:
    """Where the error is lowest, judged by the worst of each step and its neighbours: a single low one is luck."""
    finite = [error if math.isfinite(error) else math.inf for error in errors]
    return min(range(len(finite)), key=lambda k: (max(finite[max(0, k - 1) : k + 2]), finite[k]))
