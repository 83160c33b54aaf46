"""How exact a gradient by finite differences must be, derived for any module, and how exact one is.

The idea: the error of a difference has two parts that can be known without taking one. Truncation is
``C h^p f^(p+1)``, from a polynomial through values in float64; round-off is the noise of f in its own precision,
which is what f gives there against what it gives in float64, times the weights of the formula over the step. The
steps are those of the textbook, ``eps^(1/(p+1)) max(1, |x|)``, taken with the factor sqrt(2) that rounding to a power
of two may cost on either side; nothing here asks the package which step it took. `benchmarks/blackbox_accuracy.py`
prints these beside the table of FACTS; `test_accuracy` holds the package to them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor, nn
from torch.func import functional_call

from ignite_tbptt.blackbox.estimator import CentralDifference, Estimator, ForwardDifference
from ignite_tbptt.blackbox.function import blackbox
from tests.blackbox.helpers import relative_error, seen_through


class Block(nn.Module):
    """A small transformer block: attention and a feed-forward part, each behind a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.forth, self.back = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.back(nn.functional.gelu(self.forth(self.second(x))))
        return out


class Gru(nn.Module):
    """A GRU that gives its outputs alone."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gru(x)[0]
        return y


@dataclass(frozen=True)
class Case:
    """A module, the shape of its input, and the batch axis of input and output."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dim: int = 0


# Of a small batch: what the rows of FACTS are compared with.
OF_A_BATCH: dict[str, Case] = {
    "Linear": Case(lambda: nn.Linear(4, 8), (64, 4)),
    "LayerNorm": Case(lambda: nn.LayerNorm(8), (256, 8)),
    "Conv2d": Case(lambda: nn.Conv2d(2, 3, 3), (8, 2, 6, 6)),
    "GRU": Case(lambda: Gru(4, 5), (6, 16, 4), 1),
    "transformer block": Case(lambda: Block(6), (16, 4, 6)),
}

# Relative errors that the package promises: forward, central and order 4 in float32, forward and central in float64.
TABLE: dict[str, tuple[float, ...]] = {
    "Linear": (8e-5, 2e-6, 4e-7, 4e-10, 1e-16),
    "LayerNorm": (6e-5, 2e-6, 6e-7, 1e-9, 2e-12),
    "Conv2d": (1e-4, 4e-6, 8e-7, 2e-9, 2e-16),
    "GRU": (6e-4, 3e-5, 5e-6, 2e-8, 4e-11),
}


def of_any_size(kind: str, seed: int) -> Case:
    """A module of sizes that chance has chosen.

    A LayerNorm has 4 elements or more: of two it gives only a sign, of three it is nearly as sharp.
    """
    draw = random.Random(seed).randint
    rows, width, out = draw(1, 16), draw(1, 12), draw(1, 12)
    if kind == "Linear":
        return Case(lambda: nn.Linear(width, out), (rows, width))
    if kind == "LayerNorm":
        return Case(lambda: nn.LayerNorm(width + 3), (rows, width + 3))
    if kind == "Conv2d":
        channels, side = draw(1, 3), draw(3, 7)
        return Case(lambda: nn.Conv2d(channels, 2, (2, 3)), (draw(1, 4), channels, side, side))
    if kind == "GRU":
        hidden, steps = draw(1, 6), draw(1, 6)
        return Case(lambda: Gru(1 + width // 3, hidden), (steps, rows, 1 + width // 3), 1)
    even = 2 * draw(2, 3)
    return Case(lambda: Block(even), (draw(1, 3), draw(1, 4), even))


@dataclass(frozen=True)
class Formula:
    """A difference formula, as textbooks have it."""

    estimator: Estimator
    order: int
    error_constant: float
    """Of the leading error ``C h^p f^(p+1)``."""
    weights: tuple[float, ...]
    reach: int


FORMULAS: dict[str, Formula] = {
    "forward": Formula(ForwardDifference(), 1, 1 / 2, (-1, 1), 1),
    "central": Formula(CentralDifference(), 2, 1 / 6, (-1 / 2, 1 / 2), 1),
    "order 4": Formula(CentralDifference(order=4), 4, 1 / 30, (1 / 12, -2 / 3, 2 / 3, -1 / 12), 2),
}


@dataclass(frozen=True)
class Expected:
    """What the relative error of a gradient must come to."""

    truncation: float
    noise: float
    """Root of the mean square of what round-off makes of it."""

    @property
    def total(self) -> float:
        return self.truncation + self.noise


# How far polynomials are fitted, over max(1, |x|): no further than a formula looks, no nearer than round-off allows.
FAR = (2.0**-6, 2.0**-3)


class Problem:
    """A module at a point, with a cotangent and the true gradient, all as one vector of numbers in float64.

    Args:
        case: the module.
        seed: of its parameters, input and cotangent.
        held_by: the precision that holds all of these numbers.
        positive: whether the cotangent is positive everywhere; it is normal otherwise.
    """

    def __init__(self, case: Case, seed: int, held_by: torch.dtype, positive: bool = False) -> None:
        torch.manual_seed(seed)
        self.case, module = case, case.make().double()
        x = torch.randn(case.shape, dtype=torch.float64)
        self.names = [name for name, _ in module.named_parameters()]
        # parameters are born in float32: move them, so that in float64 all of their bits count
        start = [x, *(p.detach() + 1e-3 * torch.randn_like(p) for p in module.parameters())]
        self.shapes = [tensor.shape for tensor in start]
        self.x = _flat(start).to(held_by).double()
        self._module = module
        y = self.value(self.x)
        v = torch.rand_like(y) + 0.5 if positive else torch.randn_like(y)
        self.v = v.to(held_by).double()
        point = self.x.clone().requires_grad_()
        self._series: dict[float, Any] = {}
        (self.gradient,) = torch.autograd.grad(self.value(point), point, self.v)

    def parts(self, flat: Tensor) -> list[Tensor]:
        """The input and the parameters in such a vector."""
        sizes = [math.prod(shape) for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]

    def value(self, flat: Tensor) -> Tensor:
        """The output there, in the precision of the vector."""
        x, *parameters = self.parts(flat)
        y: Tensor = functional_call(self._module, dict(zip(self.names, parameters, strict=True)), (x,))
        return y

    def error(self, formula: Formula, dtype: torch.dtype) -> float:
        """The relative error of the gradient that the package gives in this precision."""
        return relative_error(self.found(formula, dtype), self.parts(self.gradient))

    def found(self, formula: Formula, dtype: torch.dtype, evaluated_in: torch.dtype | None = None) -> Sequence[Tensor]:
        """The gradient that the package gives in this precision, of the input and of each parameter."""
        dim = self.case.dim
        f = blackbox(
            seen_through(self._module),
            estimator=formula.estimator,
            in_dims=(None, dim),
            out_dims=dim,
            dtype=evaluated_in,
        )
        x, *parameters = (part.to(dtype).requires_grad_() for part in self.parts(self.x))
        y = f(dict(zip(self.names, parameters, strict=True)), x)
        assert y.dtype == dtype
        found = torch.autograd.grad(y, [x, *parameters], self.v.to(dtype))
        assert all(part.dtype == dtype for part in found)
        return found

    def expected(self, formula: Formula, dtype: torch.dtype) -> Expected:
        """The relative error that the formula must have when f is evaluated in this precision."""
        eps, order = torch.finfo(dtype).eps, formula.order
        h = eps ** (1 / (order + 1)) * self.x.abs().clamp(min=1)
        derivative = self._largest_derivative(order + 1, formula.reach * math.sqrt(2) * h)
        truncation = formula.error_constant * (math.sqrt(2) * h) ** order * derivative
        # the values at the points of a formula, and of different outputs, are rounded independently of one another
        noise = self.noise(eps) * math.hypot(*formula.weights) / (h / math.sqrt(2))
        noise = noise * (self._depends * self.v.flatten().square()).sum(1).sqrt()
        size = float(self.gradient.norm())
        rounded = torch.finfo(dtype).eps / 2  # of the gradient itself, at the very end
        return Expected(float(truncation.norm()) / size, float(noise.norm()) / size + rounded)

    def noise(self, eps: float) -> float:
        """The root mean square error of one output in a precision: measured in float32, the rest is a matter of eps."""
        off = []
        for _ in range(16):
            near = (self.x + 1e-2 * torch.randn_like(self.x)).float()
            off.append(self.value(near).double() - self.value(near.double()))
        return float(torch.stack(off).square().mean().sqrt()) * eps / torch.finfo(torch.float32).eps

    def _largest_derivative(self, order: int, reach: Tensor) -> Tensor:
        """The largest derivative of <v, f> along each element, anywhere within reach of x.

        Of polynomials of degree 8 through values in float64. (Forward derivatives of high order will not do: torch
        drops terms of LayerNorm's.)
        """
        far = next(far for far in FAR if bool((reach <= far * self.x.abs().clamp(min=1)).all()))
        if far not in self._series:
            self._series[far] = self._fitted(far * self.x.abs().clamp(min=1))
        far_each = far * self.x.abs().clamp(min=1)
        series = chebyshev.chebder(self._series[far], order)
        inside = np.linspace(-1, 1, 9)[:, None] * (reach / far_each).numpy()
        largest = np.abs(chebyshev.chebval(inside, series[:, None, :], tensor=False)).max(0)
        return torch.from_numpy(largest) / far_each**order

    def _fitted(self, far: Tensor) -> Any:
        """Chebyshev coefficients of <v, f> along each element, (degree + 1, elements); notes who depends on whom."""
        nodes, first = torch.from_numpy(chebyshev.chebpts1(9)), self.value(self.x).flatten()
        along, depends = [], []
        for element, width in enumerate(far.tolist()):
            step = torch.zeros_like(self.x)
            step[element] = width
            moved = torch.stack([self.value(self.x + node * step).flatten() for node in nodes])
            along.append((moved - first) @ self.v.flatten())
            depends.append((moved != first).any(0))
        self._depends = torch.stack(depends)
        return chebyshev.chebfit(nodes.numpy(), torch.stack(along).numpy().T, 8)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
