"""The arguments of one call: which leaves are tensors, what they are called, and how to call again with others.

The idea: a function of nested arguments is a function of a flat list of tensors once the nest is remembered. Numpy
arrays among the arguments are copied for each evaluation, like tensors; everything else is passed through. Pairs with
`function`, which differentiates flat lists only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import (
    SequenceKey,
    _broadcast_to_and_flatten,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)

__all__ = ["Arguments"]

_PLAIN = (Tensor, torch.nn.Parameter, np.ndarray, float, int, bool, str, type(None))


class Arguments(Sequence[str]):
    """One call of a function; as a sequence, the names of the tensors among its arguments.

    Args:
        fn: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        numpy: whether the function is to be given arrays in the place of tensors.
    """

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, numpy: bool = False
    ) -> None:
        self._fn = fn
        self._numpy = numpy
        self._positional = len(args)
        # most functions have no nests among their arguments, and are called more quickly without looking for them
        self._flat = not kwargs and all(type(arg) in _PLAIN for arg in args)
        kwargs_leaves: list[Any] = []
        if self._flat:
            leaves = list(args)
        else:
            leaves, self._args_spec = tree_flatten(args)
            kwargs_leaves, self._kwargs_spec = tree_flatten(kwargs)
        self._leaves = leaves + kwargs_leaves
        self._split = len(leaves)
        self._places = [k for k, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self._leaves[k] for k in self._places]
        self._arrays = [k for k, leaf in enumerate(self._leaves) if isinstance(leaf, np.ndarray)]
        for k in self._places:
            # the graph shall not keep the caller's tensors alive by way of the function
            self._leaves[k] = None
        for k in self._arrays:
            self._leaves[k] = self._leaves[k].copy()

    @property
    def as_function(self) -> Callable[..., Any]:
        """The function of the tensors alone."""
        if self._flat and not self._numpy and len(self._places) == len(self._leaves):
            return self._fn
        return self._call

    def _call(self, *tensors: Tensor) -> Any:
        leaves = list(self._leaves)
        for k, tensor in zip(self._places, tensors, strict=True):
            leaves[k] = _as_array(tensor) if self._numpy else tensor
        for k in self._arrays:
            leaves[k] = leaves[k].copy()
        if self._flat:
            return self._fn(*leaves)
        args, kwargs = self._nested(leaves)
        return self._fn(*args, **kwargs)

    def flat_in_dims(self, in_dims: Any) -> tuple[int | None, ...] | None:
        """One batch axis, or None, for each tensor; keyword arguments have none, as in torch.vmap.

        Raises:
            TypeError: an entry that is neither an int nor None.
            ValueError: in_dims do not have the structure of the arguments, or give an axis to what is no tensor.
        """
        if in_dims is None:
            return None
        if isinstance(in_dims, list):
            in_dims = tuple(in_dims)
        flat = self._broadcast(in_dims)
        if flat is None:
            raise ValueError(
                f"in_dims={in_dims} does not match the {self._positional} positional arguments of "
                f"{getattr(self._fn, '__name__', 'fn')}: give an int, or a tuple with an entry for each, None for one "
                "that has no rows"
            )
        dims = [*flat, *[None] * (len(self._leaves) - self._split)]
        for k, dim in enumerate(dims):
            if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
                raise TypeError(f"in_dims must be made of ints and None, as in torch.vmap, got {dim!r} in {in_dims}")
            if dim is not None and k not in self._places:
                raise ValueError(
                    f"in_dims gives axis {dim} to {self._spelled(k)}, which is no tensor but "
                    f"{type(self._leaves[k]).__name__}; give None there"
                )
        return tuple(dims[k] for k in self._places)

    def _broadcast(self, in_dims: Any) -> Sequence[Any] | None:
        """An entry for each positional leaf, None where in_dims has another structure than the arguments."""
        if self._flat:
            if isinstance(in_dims, int):
                return [in_dims] * self._split
            fits = isinstance(in_dims, tuple) and len(in_dims) == self._split
            return in_dims if fits and not any(isinstance(dim, (tuple, list, dict)) for dim in in_dims) else None
        found: list[Any] | None = _broadcast_to_and_flatten(in_dims, self._args_spec)
        return found

    def _nested(self, leaves: list[Any]) -> tuple[Any, Any]:
        if self._flat:
            return tuple(leaves), {}
        args = tree_unflatten(leaves[: self._split], self._args_spec)
        return args, tree_unflatten(leaves[self._split :], self._kwargs_spec)

    def _spelled(self, leaf: int) -> str:
        """A leaf as one would write it inside the function: ``x``, ``batch['image']``, ``args[3]``."""
        blank = self._nested([0] * len(self._leaves))
        (which, key, *rest), _ = tree_flatten_with_path(blank)[0][leaf]
        if isinstance(which, SequenceKey) and which.idx == 0:
            root = self._parameter(key.idx)  # type: ignore[attr-defined]
        else:
            root = str(key.key)  # type: ignore[attr-defined]
        return root + keystr(tuple(rest))

    def _parameter(self, index: int) -> str:
        with_names = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        try:
            parameters = [p.name for p in inspect.signature(self._fn).parameters.values() if p.kind in with_names]
        except (TypeError, ValueError):
            parameters = []
        return parameters[index] if index < len(parameters) else f"args[{index}]"

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._spelled(k) for k in self._places[index]]
        return self._spelled(self._places[index])


def _as_array(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        raise TypeError(
            "numpy has no bfloat16: leave dtype out, which evaluates in float64, or choose another one than bfloat16"
        )
    return tensor.numpy()
