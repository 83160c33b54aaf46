"""What several tests of the blackbox half share: truths from outside, functions no autograd sees through, and lists of
every implementation. A new strategy adds one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ignite_tbptt.blackbox.coordinates import Coordinates
from ignite_tbptt.blackbox.estimator import CentralDifference, Estimator, ForwardDifference
from ignite_tbptt.blackbox.moves import Directions
from ignite_tbptt.blackbox.random_directions import Gaussian, Orthogonal, Rademacher
from ignite_tbptt.blackbox.stencil import Stencil, backward, central, forward
from ignite_tbptt.blackbox.task import Executor, SerialEvaluation, StackedEvaluation

STENCILS: dict[str, Stencil] = {
    "forward": forward(),
    "backward": backward(),
    "central": central(),
    "central 4": central(4),
    "one-sided of order 2": central().one_sided(),
    "one-sided of order 4": central(4).one_sided(),
}

COORDINATE_ESTIMATORS: dict[str, Estimator] = {
    "forward": ForwardDifference(),
    "backward": Estimator(backward()),
    "central": CentralDifference(),
    "order 4": CentralDifference(order=4),
}

EVALUATORS: dict[str, Executor] = {
    "serial": SerialEvaluation(),
    "serial, a point at a time": SerialEvaluation(chunk_bytes=1),
    "stacked": StackedEvaluation(),
    "stacked, a few at a time": StackedEvaluation(stack_bytes=700),
}

RANDOM_DIRECTIONS: dict[str, Callable[[int, int], Directions]] = {
    "Rademacher": Rademacher,
    "Gaussian": Gaussian,
    "orthogonal": Orthogonal,
}

DIRECTIONS: dict[str, Directions] = {
    "coordinates": Coordinates(),
    **{name: make(3, 0) for name, make in RANDOM_DIRECTIONS.items()},
}


def seen_through(module: nn.Module) -> Callable[..., Any]:
    """The module as a function of its parameters and its input."""
    return lambda parameters, x: functional_call(module, parameters, (x,))


def relative_error(found: Sequence[Tensor | None], true: Sequence[Tensor]) -> float:
    """||found - true|| / ||true||, in float64, all tensors taken together."""
    assert all(tensor is not None for tensor in found)
    one = torch.cat([tensor.detach().double().flatten() for tensor in found if tensor is not None])
    other = torch.cat([tensor.detach().double().flatten() for tensor in true])
    return float((one - other).norm() / other.norm())


def as_text(x: Tensor, w: Tensor) -> Tensor:
    """2 x w0 + x^2 w1, by way of the string that says so."""
    w0, w1 = w.tolist()
    return torch.tensor([eval(f"2 * {a} * {w0} + ({a}) ** 2 * {w1}") for a in x.tolist()], dtype=x.dtype)


def row_sums(x: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> Any:
    """A function of independent rows and shared weights."""
    return np.tanh(x * w).sum(1)
