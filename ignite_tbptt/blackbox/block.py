"""Tensors seen as rows x width, side by side in blocks: what is moved together, and how it goes back into its shape.

The idea: where rows are independent a tensor has as many rows as its batch axis has entries, and one row otherwise;
whoever chooses directions then only knows rows and columns. All tensors of one precision whose rows move together make
a block. Pairs with `directions`, which moves the columns of a block, and with `gradient`, which takes it apart again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ignite_tbptt.blackbox.stencil import Stencil
from ignite_tbptt.blackbox.step_size import AbsoluteStep, RelativeStep, Steps, StepSize

__all__ = ["Block", "Group", "Rows", "groups_of"]


class Rows:
    """A tensor's shape, seen as independent rows of some width; as a single row where `dim` is None."""

    def __init__(self, shape: Sequence[int], dim: int | None) -> None:
        self.shape = tuple(shape)
        self.dim = dim
        numel = math.prod(self.shape)
        self.rows = 1 if dim is None else self.shape[dim]
        self.width = numel // self.rows if self.rows else 0

    def split(self, tensor: Tensor) -> Tensor:
        """(*shape) -> (rows, width)."""
        moved = tensor.movedim(self.dim, 0) if self.dim else tensor
        return moved.reshape(self.rows, self.width)

    def join(self, rows: Tensor) -> Tensor:
        """(*leading, rows, width) -> (*leading, *shape)."""
        leading = rows.shape[:-2]
        if not self.dim:
            return rows.reshape(leading + self.shape)
        rest = self.shape[: self.dim] + self.shape[self.dim + 1 :]
        return rows.reshape((*leading, self.rows, *rest)).movedim(len(leading), len(leading) + self.dim)

    def index(self, row: int, column: int) -> tuple[int, ...]:
        """Where an element stands in the tensor."""
        flat = torch.zeros(self.rows, self.width, dtype=torch.bool)
        flat[row, column] = True
        return tuple(self.join(flat).nonzero()[0].tolist())


@functools.lru_cache(maxsize=256)
def rows_of(shape: tuple[int, ...], dim: int | None) -> Rows:
    """The same `Rows` for the same shape: one forward call is like the last."""
    return Rows(shape, dim)


@dataclass(frozen=True)
class Block:
    """Tensors of one dtype that are moved together: those with independent rows, or those that all rows share.

    Attributes:
        x: all of them side by side, (rows, width).
        layouts: how each goes back into its shape.
        members: the place of each among the arguments of the blackbox.
        positions: the place of each among the arguments that are differentiated.
        names: what the arguments of the blackbox are called in messages.
        memory: gradients that earlier directions have left here, (rows, width) each, the last one first.
    """

    x: Tensor
    layouts: tuple[Rows, ...]
    members: Sequence[int]
    positions: Sequence[int]
    names: Sequence[str]
    memory: list[Tensor] | None = None

    @classmethod
    def of(
        cls, tensors: Sequence[Tensor], dims: Sequence[int | None], members: Sequence[int], positions: Sequence[int],
        names: Sequence[str], memory: list[Tensor] | None = None,
    ) -> Block:  # fmt: skip
        """A block of these tensors, whose rows are at these axes."""
        layouts = tuple(rows_of(tensor.shape, dim) for tensor, dim in zip(tensors, dims, strict=True))
        rows = [layout.split(tensor) for layout, tensor in zip(layouts, tensors, strict=True)]
        x = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
        return cls(x, layouts, members, positions, names, memory)

    def apart(self, rows: Tensor) -> list[Tensor]:
        """(*leading, rows, width) -> (*leading, *shape) for each tensor."""
        if len(self.layouts) == 1:
            return [self.layouts[0].join(rows)]
        # Tensor.split, written in Python, takes five times as long
        parts = rows.split_with_sizes([layout.width for layout in self.layouts], -1)
        return [layout.join(part) for layout, part in zip(self.layouts, parts, strict=True)]

    def steps(self, step_size: StepSize, stencil: Stencil, eps: float) -> Steps:
        """The step of every element, (rows, width); bounds and the like see the tensors in their own shape."""
        if isinstance(step_size, (AbsoluteStep, RelativeStep)) and step_size.is_elementwise:
            return step_size.each(self.x, stencil, eps)
        parts = zip(self.apart(self.x), self.positions, strict=True)
        each = [step_size.each(part, stencil, eps, position) for part, position in parts]
        sizes = self.together([steps.sizes for steps in each])
        if all(steps.one_sided is None for steps in each):
            return Steps(sizes)
        one_sided = [torch.zeros_like(s.sizes, dtype=torch.bool) if s.one_sided is None else s.one_sided for s in each]
        return Steps(sizes, self.together(one_sided))

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """(*shape) of each tensor -> (rows, width)."""
        rows = [layout.split(part) for layout, part in zip(self.layouts, parts, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)

    def spelled(self, column: int) -> tuple[str, tuple[int, ...], Rows]:
        """Which element a column is: name of the tensor, index in row 0, and layout of the tensor."""
        for member, layout in zip(self.members, self.layouts, strict=True):
            if column < layout.width:
                return self.names[member], layout.index(0, column), layout
            column -= layout.width
        raise IndexError(column)


class Group(NamedTuple):
    """Tensors that are moved together: in one precision, and all with rows of their own or all without."""

    rows_move: bool
    members: tuple[int, ...]
    dims: tuple[int | None, ...]
    positions: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def groups_of(kinds: tuple[tuple[torch.dtype, int | None, bool] | None, ...]) -> tuple[Group, ...]:
    """The groups among tensors, given the dtype, the axis of the rows and whether there are elements, of each.

    None stands for a tensor that needs no gradient. Positions are counted among those that do.
    """
    needed = [(k, kind) for k, kind in enumerate(kinds) if kind is not None]
    found: dict[tuple[bool, torch.dtype], list[tuple[int, int | None, int]]] = {}
    for position, (k, (dtype, dim, any_elements)) in enumerate(needed):
        if any_elements:
            found.setdefault((dim is not None, dtype), []).append((k, dim, position))
    return tuple(Group(rows_move, *zip(*tensors, strict=True)) for (rows_move, _), tensors in found.items())
