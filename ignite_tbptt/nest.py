"""Nests: containers of tensors, walked in one way by everything that cuts, moves or carries them.

A nest is a tensor, or a mapping, tuple, named tuple, list, set or dataclass of nests; whatever else it holds
(``None``, strings, numbers) is handed through. The time half cuts nests along time and carries them through it; the
blackbox half finds the tensors that go into a function and come out of it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Set
from typing import Any

import torch

Path = tuple[Any, ...]
"""Keys, indices and field names that lead from the root of a nest to one of its leaves."""


def children(nest: Any) -> list[tuple[Any, Any]] | None:
    """Return the (key, child) pairs of a container, or None where `nest` is a leaf."""
    if isinstance(nest, torch.Tensor):
        return None
    if isinstance(nest, Mapping):
        return list(nest.items())
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return list(zip(nest._fields, nest, strict=True))
    if isinstance(nest, (tuple, list, Set)):
        return list(enumerate(nest))
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        names = [field.name for field in dataclasses.fields(nest)]
        return [(name, getattr(nest, name)) for name in names if hasattr(nest, name)]
    return None


def rebuild(nest: Any, values: list[Any]) -> Any:
    """Return a container like `nest` whose children are `values`, in the order of `children`."""
    if type(nest) is tuple:  # the pair (x, y) at every time iteration, before the slow question for a mapping
        return tuple(values)
    if isinstance(nest, Mapping):
        items = dict(zip(nest, values, strict=True))
        if isinstance(nest, MutableMapping):
            # A copy keeps what a subclass adds: the factory of a defaultdict, the attributes of a batch encoding.
            twin = copy.copy(nest)
            twin.update(items)
            return twin
        return type(nest)(items)  # type: ignore[call-arg]
    if isinstance(nest, tuple):
        return type(nest)(*values) if hasattr(nest, "_fields") else type(nest)(values)
    if isinstance(nest, (list, Set)):
        return type(nest)(values)  # type: ignore[call-arg]
    # A copy, not replace(): fields without an init, and frozen classes, come through as they are.
    twin = copy.copy(nest)
    for (name, _), value in zip(children(nest) or (), values, strict=True):
        object.__setattr__(twin, name, value)
    return twin


def map_tensors(function: Callable[[torch.Tensor], Any], nest: Any) -> Any:
    """Return `nest` with every tensor replaced by ``function(tensor)``; other leaves stay what they are."""
    if isinstance(nest, torch.Tensor):
        return function(nest)
    if type(nest) is tuple:  # an LSTM's state at every time iteration: the one container on the hot path
        return tuple([map_tensors(function, child) for child in nest])
    pairs = children(nest)
    if pairs is None:
        return nest
    return rebuild(nest, [map_tensors(function, child) for _, child in pairs])


def leaves(nest: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every leaf of `nest`, tensors and others, with the path that leads to it."""
    pairs = children(nest)
    if pairs is None:
        yield path, nest
        return
    for key, child in pairs:
        yield from leaves(child, (*path, key))


def tensors(nest: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of `nest`."""
    if isinstance(nest, torch.Tensor):
        yield nest
    elif nest is not None and not isinstance(nest, (int, float, str)):  # most of what there is beside tensors
        for _, child in children(nest) or ():
            yield from tensors(child)


def spell(name: str, path: Path) -> str:
    """Spell the place of a leaf as one would write it in Python: ``batch[0]['image']``."""
    return name + "".join(f"[{key!r}]" for key in path)
