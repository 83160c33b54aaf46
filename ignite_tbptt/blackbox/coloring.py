"""Which outputs depend on which inputs, and which inputs may therefore be moved together.

Columns of a Jacobian that have no row in common can be told apart after all of them were moved at once (Curtis, Powell
and Reid 1974, On the estimation of sparse Jacobian matrices). Groups of such columns are colours of a graph, found here
greedily. Pairs with `moves`, where a colour is a move, and with `probes`, which verify what a pattern says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ignite_tbptt.arguments import require_seed
from ignite_tbptt.blackbox.flat import FlatCall, Outputs
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["Banded", "Coloring", "Sparsity", "banded", "coloring_of", "detect_sparsity", "pattern_of"]


@dataclass(frozen=True)
class Banded:
    """Output i depends on the inputs i - below to i + above; made by `banded`."""

    below: int
    above: int


Sparsity = Tensor | Banded | Literal["elementwise"] | Any
"""A bool tensor or array (outputs, inputs), a matrix of scipy.sparse, `banded(k)`, or "elementwise"."""


def banded(below: int, above: int | None = None) -> Banded:
    """Return the pattern in which output i depends on the inputs from i - below to i + above.

    Example:
        >>> banded(1)  # tridiagonal
        Banded(below=1, above=1)

    Args:
        below: diagonals below the main one.
        above: diagonals above it, as many as below by default.

    Raises:
        ValueError: a number that is not a whole one, or negative.
    """
    above = below if above is None else above
    for name, value in (("below", below), ("above", above)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be a whole number of diagonals, 0 or more, got {value!r}")
    return Banded(below, above)


@dataclass(frozen=True, eq=False)
class Coloring:
    """Colours of the columns of a pattern.

    Attributes:
        colors: (inputs,), the colour of each.
        count: how many colours there are.
        owners: (colours, outputs), the one input of a colour that an output depends on; `inputs` where there is none.
    """

    colors: Tensor
    count: int
    owners: Tensor

    def inputs_of(self, output: int) -> list[int]:
        """The inputs that an output depends on."""
        return sorted(owner for owner in self.owners[:, output].tolist() if owner < len(self.colors))


def pattern_of(sparsity: Any) -> Any:
    """A pattern as it is now: what the caller's matrix becomes later has no part in it.

    Raises:
        TypeError: it is no pattern.
    """
    if sparsity is None or isinstance(sparsity, Banded):
        return sparsity
    if isinstance(sparsity, str) and sparsity == "elementwise":
        return Banded(0, 0)
    if hasattr(sparsity, "tocoo"):
        return sparsity.tocoo(copy=True)
    if isinstance(sparsity, np.ndarray):
        sparsity = torch.from_numpy(np.ascontiguousarray(sparsity))
    if isinstance(sparsity, Tensor):
        if sparsity.ndim == 2 and sparsity.dtype == torch.bool and sparsity.layout == torch.strided:
            return sparsity.detach().clone()
        raise TypeError(
            f"sparsity must be a bool tensor (outputs, inputs), got {sparsity.dtype} of shape {tuple(sparsity.shape)}: "
            "give pattern != 0, dense"
        )
    raise TypeError(
        f"sparsity must be a bool tensor (outputs, inputs), a matrix of scipy.sparse, banded(k) or 'elementwise', got "
        f"{sparsity!r}; detect_sparsity(fn, *inputs) finds the pattern"
    )


def coloring_of(sparsity: Any, inputs: int) -> Coloring:
    """Return the colours for a pattern, of `pattern_of`, of so many inputs.

    Raises:
        ValueError: it is a pattern of another number of inputs.
    """
    if not isinstance(sparsity, Banded):
        cached = _COLORINGS.get(id(sparsity))
        if cached is not None and cached[0] is sparsity and len(cached[1].colors) == inputs:
            return cached[1]
        coloring = _colored(*_entries(sparsity, inputs), inputs)
        if len(_COLORINGS) >= 16:
            _COLORINGS.clear()
        _COLORINGS[id(sparsity)] = (sparsity, coloring)
        return coloring
    return _banded(sparsity, inputs)


_COLORINGS: dict[int, tuple[Any, Coloring]] = {}


@functools.lru_cache(maxsize=16)
def _banded(band: Banded, inputs: int) -> Coloring:
    """Every so many columns, in turn: what is found greedily, without the pattern."""
    count = min(band.below + band.above + 1, inputs)
    outputs = torch.arange(inputs)
    first = (outputs - band.below).clamp(min=0)  # of a row; the column of a colour is less than `count` to its right
    owners = torch.stack([first + (color - first) % count for color in range(count)])
    outside = (owners >= inputs) | (owners > outputs + band.above)
    return Coloring(outputs % count, count, owners.masked_fill(outside, inputs))


def _entries(sparsity: Any, inputs: int) -> tuple[Tensor, Tensor, int]:
    """Rows and columns of the entries of a pattern, and the number of its rows."""
    if isinstance(sparsity, Tensor):
        rows, columns = sparsity.cpu().nonzero().unbind(1)
    else:
        rows, columns = torch.as_tensor(sparsity.row).long(), torch.as_tensor(sparsity.col).long()
    if sparsity.shape[1] != inputs:
        raise ValueError(
            f"sparsity has {sparsity.shape[1]} columns, and there are {inputs} numbers to differentiate; its columns "
            "are those of all inputs that require grad, side by side in the order of the arguments"
        )
    return rows, columns, int(sparsity.shape[0])


def _colored(rows: Tensor, columns: Tensor, outputs: int, inputs: int) -> Coloring:
    """Colour greedily, the columns with most rows first."""
    rows_of: list[list[int]] = [[] for _ in range(inputs)]
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        rows_of[column].append(row)
    colors = [0] * inputs
    taken: list[set[int]] = [set() for _ in range(outputs)]  # colours that a row has already
    for column in sorted(range(inputs), key=lambda j: -len(rows_of[j])):
        used = set().union(*(taken[row] for row in rows_of[column]))
        color = next(c for c in range(len(used) + 1) if c not in used)
        colors[column] = color
        for row in rows_of[column]:
            taken[row].add(color)
    count = max(colors, default=-1) + 1
    owners = torch.full((count, outputs), inputs)
    for column, color in enumerate(colors):
        owners[color, rows_of[column]] = column
    return Coloring(torch.tensor(colors), count, owners)


def detect_sparsity(
    fn: Callable[..., Any], *inputs: Any, points: int = 3, numpy: bool = False, seed: int = 0
) -> Tensor:
    """Find which outputs depend on which inputs, by moving each input alone at several random points.

    Example:
        >>> import torch
        >>> detect_sparsity(lambda x: x.cumsum(0), torch.ones(3)).int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)

    One evaluation for each number and point. A dependence that shows at none of the points, behind a condition say, is
    not found: the pattern is verified at the first gradients.

    Args:
        fn: function of the inputs, as `blackbox` takes it.
        inputs: its arguments. Those tensors are moved that require grad, or all float tensors where none does.
        points: random points around the inputs, which are the first of them.
        numpy: hand the function numpy arrays, in float64.
        seed: of the points.

    Returns:
        A bool tensor (outputs, inputs), both flattened side by side.

    Raises:
        TypeError: fn is not callable, seed no int, or there is no tensor of floating point among the inputs.
        ValueError: `points` is no whole number, or below 1.
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {type(fn).__name__}: detect_sparsity(fn, *inputs)")
    require_seed(seed)
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise ValueError(
            f"points must be a whole number of places to look at, at least 1, got {points!r}; 3 finds most patterns"
        )
    call = FlatCall(fn, inputs, {}, numpy=numpy)
    tensors = [tensor.detach() for tensor in call.tensors]
    tensors = [t.double() if numpy and t.is_floating_point() else t for t in tensors]
    floats = [k for k, tensor in enumerate(tensors) if tensor.is_floating_point() and tensor.numel()]
    moved = [k for k in floats if call.tensors[k].requires_grad] or floats
    if not moved:
        raise TypeError(
            f"{call.label} needs a tensor of floating point among its inputs: integers cannot be moved by a small step"
        )
    generator = torch.Generator().manual_seed(seed)
    streams = RandomStreams.now()

    def value(points: list[Tensor]) -> Tensor:
        streams.restore()
        outputs = Outputs.of(call(*[x.clone() for x in points]), call.label)
        return torch.cat([t.flatten() for t in outputs.tensors if t.is_floating_point()])

    found: Tensor | None = None
    with torch.no_grad(), streams.replayed():
        for number in range(points):
            here = list(tensors)
            if number:
                for k in moved:
                    noise = torch.randn(tensors[k].shape, generator=generator, dtype=torch.float64)
                    here[k] = tensors[k] + 0.1 * (noise * tensors[k].abs().clamp(min=1.0)).to(tensors[k])
            before = value(here)
            columns = []
            for k in moved:
                for index in range(tensors[k].numel()):
                    there = [x.clone() for x in here]
                    place = torch.unravel_index(torch.tensor(index), there[k].shape)
                    there[k][place] += 0.01 * float(there[k][place].abs().clamp(min=1.0))
                    columns.append(value(there) != before)
            pattern = torch.stack(columns, 1)
            found = pattern if found is None else found | pattern
    assert found is not None
    return found
