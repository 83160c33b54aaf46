"""The noise of a function: how far its evaluations are off, whatever the reason.

Along one direction a function of many numbers is a function of one. Differences of high order of closely spaced values
cancel what is smooth and leave what is not (ECNoise, More and Wild 2011, Estimating computational noise, section 4).
Pairs with `sweep`, which shows what noise does to a slope, and with `measured_step`, which balances it with truncation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ignite_tbptt.arguments import require_seed
from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.flat import FlatCall, Outputs
from ignite_tbptt.blackbox.measured_step import Values, in_few_bits
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["Line", "NoiseEstimate", "Scalar", "estimate_noise", "noise_level", "one_by_one"]

# Values are taken closer together than at first by down to this factor.
_CLOSEST = 8.0**-3

Scalar = Callable[[float], float]


@dataclass(frozen=True)
class NoiseEstimate:
    """How far the evaluations of a function are off; made by `estimate_noise`.

    Attributes:
        level: standard deviation, in the units of a single output.
        relative: the same over the size of the outputs.
        converged: whether differences of several orders agreed on it; where they did not, it is a guess.
    """

    level: float
    relative: float
    converged: bool

    def __str__(self) -> str:
        doubt = "" if self.converged else ", a guess: differences of several orders do not agree"
        return f"noise {self.level:.2g}, {self.relative:.1e} of the size of the outputs{doubt}"


def estimate_noise(fn: Callable[..., Any], *inputs: Any, numpy: bool = False, seed: int = 0) -> NoiseEstimate:
    """Measure the noise of a function at some inputs.

    Example:
        >>> import torch
        >>> estimate_noise(lambda x: torch.round(x, decimals=3), torch.tensor([1.0], dtype=torch.float64)).level < 1e-3
        True

    Some 7 to 100 evaluations, along one direction of random signs. Random numbers from the global streams are the same
    in all of them, so that theirs is no noise; a generator of the function's own counts.

    Args:
        fn: function of the inputs, as `blackbox` takes it.
        inputs: its arguments. Those tensors are moved that require grad, or all float tensors where none does.
        numpy: hand the function numpy arrays, in float64.
        seed: of the signs of the direction and of the weights of the outputs.

    Raises:
        TypeError: fn is not callable, seed no int, or no input is a tensor of floating point.
        BlackboxError: fn is NaN or infinite at the inputs.
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {type(fn).__name__}: estimate_noise(fn, *inputs)")
    require_seed(seed)
    line = Line(fn, inputs, numpy, seed)
    with torch.no_grad(), line.streams.replayed():
        phi = line.along(torch.float64 if numpy else None)
        size = abs(phi(0.0))
        if not math.isfinite(size):
            raise BlackboxError(f"{line.label} is NaN or infinite at the inputs: there is no noise to measure")
        eps = torch.finfo(torch.float64 if numpy else line.dtype).eps
        level, converged = _noise(one_by_one(phi), line.scale, eps, 0.75)
    return NoiseEstimate(level / line.spread, level / (size or 1.0), converged)


class Line:
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
                f"{self.label} needs a tensor of floating point among its inputs, got {found}: integers cannot be "
                "moved by a small step, complex numbers go in as torch.view_as_real(input)"
            )
        self._seed = seed
        self.dtype = max((tensors[k].dtype for k in self._moved), key=lambda dtype: torch.finfo(dtype).eps)
        finite = (tensors[k].detach()[tensors[k].isfinite()].abs() for k in self._moved)
        largest = max((float(some.max()) for some in finite if some.numel()), default=0.0)
        self.scale = 2.0 ** round(math.log2(largest)) if largest else 1.0
        self.streams = RandomStreams.now()
        self._weights: list[Tensor] | None = None

    @property
    def spread(self) -> float:
        """Standard deviation of the weighted sum over that of one output, if outputs are off independently."""
        return math.sqrt(sum(float(weight.square().sum()) for weight in self._weights or ())) or 1.0

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


def one_by_one(phi: Scalar) -> Values:
    """A function that is asked for several values at a time."""
    return lambda distances: [phi(t) for t in distances]


def noise_level(values: Values, scale: float, eps: float, power: float = 0.75) -> float:
    """Standard deviation of the noise in a function of one number, near 0 (ECNoise, More and Wild 2011, section 4).

    Args:
        values: the function, asked for several values at a time.
        scale: size of the numbers that it is given.
        eps: their relative precision.
        power: the spacing of the seven values starts at ``eps ** power`` of the scale.

    Returns:
        The noise in its units; 0 where none was seen, as with a constant.
    """
    return _noise(values, scale, eps, power)[0]


def _noise(values: Values, scale: float, eps: float, power: float) -> tuple[float, bool]:
    """The level, and whether differences of several orders agreed on it.

    Where a smooth function is all that is seen, values closer together tell, up to a plateau; where nothing changes,
    those further apart. Too far apart a function that oscillates looks like noise: what the differences of high order
    left in closer values bounds that. And quanta look like none where neighbours happen to be equally many apart: noise
    is no small part of the least step between two plateaus.
    """
    first = spacing = in_few_bits(scale * eps**power)
    factor, left, quantum, plateau = 1 / 8, math.inf, math.inf, False
    while spacing < scale:
        ahead, middle, behind = values([3 * spacing, 0.0, -3 * spacing])
        found = [] if ahead == middle == behind else values([(k - 3) * spacing for k in range(7)])
        # beyond a plateau that ends to one side alone the function is bent; noise and quanta are to both
        one_sided = plateau and (len(set(found[:4])) == 1 or len(set(found[3:])) == 1)
        levels = None if one_sided else _levels(found)
        if plateau or levels is None:
            quantum = min([quantum, *(gap for a, b in itertools.pairwise(found) if (gap := abs(a - b)) > 0)])
        if levels is None:
            if spacing < first:
                break
            factor, plateau = 8, True
        elif plateau and levels[-1][0] < quantum / 20:
            pass
        elif not math.isfinite(levels[0][0]):
            if factor > 1:
                break
        else:
            for k in range(4):
                some = [level for level, _ in levels[k : k + 3]]
                if levels[k][1] and max(some) <= 4 * min(some):
                    return (some[0], True) if some[0] <= 8 * left else (left, False)
            left = min(left, math.hypot(levels[4][0], levels[5][0]))
        spacing *= factor
        if spacing < first * _CLOSEST:
            break  # further apart a smooth function would show even more
    return (left, False) if left < math.inf else (0.0, True)


def _levels(values: Sequence[float]) -> list[tuple[float, bool]] | None:
    """What differences of order 1, 2, ... say of the noise, and whether they change signs; None of a plateau."""
    if not values:
        return None
    found, gamma, differences = [], 1.0, list(values)
    for k in range(1, len(values)):
        differences = [after - before for before, after in itertools.pairwise(differences)]
        if k == 1 and 2 * sum(d == 0 for d in differences) > len(differences):
            return None  # most values are the same
        gamma *= k / (2 * (2 * k - 1))
        level = math.sqrt(gamma * sum(d * d for d in differences) / len(differences))
        found.append((level, min(differences) < 0 < max(differences)))
    return found
