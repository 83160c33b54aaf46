"""What a blackbox returned, as tensors: from nests of tensors, numpy arrays and Python floats, and back into the nest.

The idea: the numbers are taken out in the precision in which they came, and copied at once, so that a buffer which the
blackbox fills anew each time cannot make every difference zero. Integers, None, strings and whatever else is no number
to differentiate stay where they are. Pairs with `evaluation`, which compares every later output with the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ignite_tbptt.blackbox.errors import BlackboxError

__all__ = ["Outputs", "check_same_kind", "copied", "same_kind"]


@dataclass(frozen=True, eq=False)
class Outputs:
    """One value of a blackbox.

    Attributes:
        tensors: the numbers in it, each a tensor of its own: floats that can be differentiated, and integers.
        foreign: for each of them, whether it came as something else than a tensor.
        rest: all leaves of the nest, with the index of a tensor wherever there is one.
        spec: the nest.
    """

    tensors: list[Tensor]
    foreign: list[bool]
    rest: list[Any]
    spec: TreeSpec

    @classmethod
    def of(cls, value: Any, label: str) -> Outputs:
        """Take the numbers out of what a blackbox returned.

        Raises:
            TypeError: there is no tensor, array or float in it, or one is complex.
        """
        if isinstance(value, (Tensor, np.ndarray)):  # the one leaf of most functions
            leaves, spec = [value], _LEAF
        else:
            leaves, spec = tree_flatten(value)
        tensors: list[Tensor] = []
        foreign: list[bool] = []
        rest: list[Any] = []
        for leaf in leaves:
            tensor = _as_tensor(leaf, label)
            if tensor is None:
                rest.append(leaf)
                continue
            if tensor.is_complex():
                raise TypeError(
                    f"{label} returned complex numbers, which have no gradient here; return "
                    "torch.view_as_real(output), or its real and imaginary parts"
                )
            rest.append(_Index(len(tensors)))
            tensors.append(tensor)
            foreign.append(not isinstance(leaf, Tensor))
        if not any(tensor.is_floating_point() for tensor in tensors):
            found = sorted({type(leaf).__name__ for leaf in leaves} - {"Tensor"}) or ["integer tensors"]
            raise TypeError(
                f"{label} returned nothing to differentiate: no tensor, numpy array or Python float of floating point "
                f"among its outputs, only {', '.join(found)}; return the numbers themselves, or leave {label} unwrapped"
            )
        return cls(tensors, foreign, rest, spec)

    @property
    def is_leaf(self) -> bool:
        """Whether the blackbox returned one tensor or array and no nest."""
        return self.spec is _LEAF

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """The nest again, with other tensors in the places of these."""
        if self.is_leaf:
            return tensors[0]
        leaves = [tensors[leaf.value] if isinstance(leaf, _Index) else leaf for leaf in self.rest]
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class _Index:
    value: int


_LEAF = tree_flatten(0.0)[1]


def copied(value: Any) -> Tensor:
    """A tensor or an array as a tensor of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.requires_grad else value.clone()
    return torch.from_numpy(np.array(value, order="C"))


def _as_tensor(leaf: Any, label: str) -> Tensor | None:
    if isinstance(leaf, Tensor):
        return copied(leaf)
    if isinstance(leaf, float) and not isinstance(leaf, np.generic):
        return torch.tensor(leaf, dtype=torch.float64)
    if isinstance(leaf, (np.ndarray, np.generic)):
        try:
            return copied(leaf)
        except (TypeError, ValueError) as error:  # an unknown type, or another byte order
            raise TypeError(
                f"{label} returned a numpy array of dtype {leaf.dtype}, which torch cannot hold; "
                "return it as float64, say array.astype(float)"
            ) from error
    return None


def same_kind(first: Outputs, later: Outputs, copies: int = 1, out_dims: Sequence[int] | None = None) -> str | None:
    """Say what differs between two outputs of one blackbox in structure, shape or dtype; None where nothing does.

    Args:
        first: what came out at x.
        later: what came out at a moved x.
        copies: how many points were stacked in the later call, along `out_dims`.
        out_dims: the batch axis of each tensor.
    """
    if later.spec is not first.spec and later.spec != first.spec:
        return f"a nest {later.spec} instead of {first.spec}"
    if len(first.tensors) != len(later.tensors):
        return f"{len(later.tensors)} tensors instead of {len(first.tensors)}"
    for k, (was, now) in enumerate(zip(first.tensors, later.tensors, strict=True)):
        shape = list(was.shape)
        if copies > 1 and out_dims is not None:
            shape[out_dims[k]] *= copies
        if list(now.shape) != shape:
            return f"shape {tuple(now.shape)} instead of {tuple(shape)} (output {k})"
        if was.dtype != now.dtype:
            return f"dtype {now.dtype} instead of {was.dtype} (output {k})"
    return None


def check_same_kind(
    first: Outputs,
    later: Outputs,
    label: str,
    remedy: str,
    where: Callable[[], str],
    copies: int,
    out_dims: Sequence[int] | None,
) -> None:
    """Raise BlackboxError where `same_kind` finds a difference."""
    difference = same_kind(first, later, copies, out_dims)
    if difference is not None:
        raise BlackboxError(
            f"{label} returned {difference} when evaluated again ({where()}): differences of such outputs mean "
            f"nothing; {remedy}"
        )
