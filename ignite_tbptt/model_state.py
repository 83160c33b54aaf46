"""Snapshots of what a model keeps beside its parameters, so that a second run starts where the first one did.

A snapshot walks what is reachable from the callables that are run: attributes and buffers of modules, of other objects
and of their classes, closures, defaults, arguments of a ``functools.partial``, the object of a bound method, and the
globals that a function names. Of every mutable object on the way (dict, list, set, tensor, array, random generator) it
keeps the content; restoring writes the content back into the same object. Objects of the standard library, of torch,
numpy and Ignite are not entered, modules apart, nor are functions and objects that a file imports from others.
Iterators and extension types are out of reach. Global random streams are the matter of `random_streams`.
"""

from __future__ import annotations

import functools
import random
import sys
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_LIBRARIES = (sys.stdlib_module_names | {"torch", "numpy", "ignite", "ignite_tbptt"}) - {"__main__"}
_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "torch.jit.", "torch._")
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)
_LEAVES = (type(None), bool, int, float, complex, str, bytes, ModuleType, BuiltinFunctionType, CodeType)


class ModelState:
    """The content of everything mutable that is reachable from some callables, at one moment.

    Example:
        ::

            before = ModelState.of(model, loss_fn)
            model(x)
            print(before.changed())  # ['lif.mem', 'norm.running_mean', ...]
            before.restore()

    Attributes:
        lazy: names of parameters and buffers whose shape the first forward decides; they cannot be put back.
    """

    def __init__(self, roots: tuple[Any, ...], parameters: bool, known: dict[int, _Kept]) -> None:
        self._roots, self._parameters = roots, parameters
        self._kept: dict[int, _Kept] = {}
        self.lazy: list[str] = []
        for name, owner, kind in _walk(roots):
            if kind is None:
                continue
            if isinstance(owner, Tensor):
                if is_lazy(owner):
                    self.lazy.append(name)
                    continue
                if owner.is_meta or (_is_parameter(owner) and not parameters):
                    continue
            was, content = known.get(id(owner)), kind.read(owner)
            if was is None or not kind.same(content, was.content):
                was = _Kept(name, owner, kind, kind.copy(content))
            self._kept[id(owner)] = was

    @classmethod
    def of(cls, *roots: Any, parameters: bool = False) -> ModelState:
        """Take a snapshot.

        Args:
            roots: the callables; names of attributes are relative to them.
            parameters: also copy the parameters, which a forward may write into (``nn.Embedding(max_norm=...)``).
        """
        return cls(roots, parameters, {})

    def now(self, *roots: Any) -> ModelState:
        """Return a snapshot of the same callables as of now, which is this one where nothing has changed.

        Args:
            roots: where given, other callables than before.
        """
        roots = roots or self._roots
        same_roots = list(map(id, roots)) == list(map(id, self._roots))
        if same_roots and not self.lazy and not any(True for _ in self._differing()):
            return self
        return ModelState(roots, self._parameters, self._kept)

    def restore(self, only: Callable[[Any], bool] = lambda owner: True) -> None:
        """Write the content back where it has changed.

        Args:
            only: says of which objects.

        Raises:
            RuntimeError: something cannot be put back; everything else has been.
        """
        failed = {}
        for kept in list(self._differing()):
            if only(kept.owner):
                try:
                    kept.kind.write(kept.owner, kept.content)
                except Exception as error:  # whatever a foreign object raises, the others have to be put back
                    failed[kept.name] = error
        if failed:
            reason = next(iter(failed.values()))
            raise RuntimeError(f"what the model keeps in {', '.join(failed)} cannot be put back: {reason}") from reason

    def changed(self) -> list[str]:
        """Return the names of what has another content now."""
        names: dict[str, None] = {}
        for name, owner, kind, content in self._differing():
            keys = [""]
            if kind.same is _same_items:
                now = kind.read(owner)
                keys = [key for key in {**content, **now} if not _same_item(content, now, key)]
            names.update((_join(name, key), None) for key in keys)
        return list(names)

    def graphs(self) -> list[str]:
        """Return the names of the tensors that were kept together with a graph.

        Those in a recurrent layer's list of weights are made again at every call.
        """
        held = [kept.name for kept in self._kept.values() if isinstance(kept.owner, Tensor) and kept.content[1]]
        return [name for name in held if "_flat_weights[" not in name]

    def _differing(self) -> Iterator[_Kept]:
        return (kept for kept in self._kept.values() if not kept.kind.same(kept.kind.read(kept.owner), kept.content))


def parameters_of(*roots: Any) -> list[tuple[str, Tensor]]:
    """Return the name and the tensor of every parameter that is reachable from `roots`."""
    return [(name, owner) for name, owner, _ in _walk(roots) if isinstance(owner, Tensor) and _is_parameter(owner)]


def library_buffers(*roots: Any) -> list[Tensor]:
    """Return the buffers of all torch modules (batch or spectral normalisation) that are reachable from `roots`."""
    modules = [owner for _, owner, kind in _walk(roots) if kind is None and _is_library(type(owner).__module__)]
    return [buffer for module in modules for buffer in module.buffers(recurse=False)]


GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


# Kinds of mutable objects: how the content is read, copied, compared and written


def _same_items(now: dict[Any, Any], was: dict[Any, Any]) -> bool:
    if list(map(id, now.values())) == list(map(id, was.values())):
        return list(now) == list(was)
    return list(now) == list(was) and all(_same_item(was, now, key) for key in was)


def _same_item(was: dict[Any, Any], now: dict[Any, Any], key: Any) -> bool:
    missing = object()
    first, second = was.get(key, missing), now.get(key, missing)
    return first is second or (type(first) is type(second) and isinstance(first, _LEAVES) and first == second)


def _itself(content: Any) -> Any:
    return content


class _Kind(NamedTuple):
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]
    same: Callable[[Any, Any], bool] = _same_items
    copy: Callable[[Any], Any] = _itself


class _Kept(NamedTuple):
    name: str
    owner: Any
    kind: _Kind
    content: Any


def _same_tensor(now: tuple[Tensor, Any], was: tuple[Tensor, Any]) -> bool:
    (data, graph), (data_was, graph_was) = now, was
    if graph is not graph_was or (data.dtype, data.device) != (data_was.dtype, data_was.device):
        return False
    return torch.equal(data, data_was) or (
        data.is_floating_point()
        and data.shape == data_was.shape
        and torch.allclose(data, data_was, rtol=0.0, atol=0.0, equal_nan=True)
    )


def _write_tensor(tensor: Tensor, was: tuple[Tensor, Any]) -> None:
    data, graph = was
    if tensor.grad_fn is not graph:
        if graph is not None:
            raise ValueError("the tensor has been written into in place, as part of another graph")
        tensor.detach_()
    # Past the version counter: what backward has saved of it is valid again.
    if (tensor.shape, tensor.dtype, tensor.device) == (data.shape, data.dtype, data.device):
        tensor.data.copy_(data)
    else:
        tensor.data = data.clone()


def _write_dict(owner: dict[Any, Any], was: dict[Any, Any]) -> None:
    if list(owner) == list(was):
        owner.update(was)
    else:
        owner.clear()
        owner.update(was)


def _write_all(owner: Any, was: dict[Any, Any]) -> None:
    owner.clear()
    (owner.update if isinstance(owner, set) else owner.extend)(was.values())


def _read_cell(cell: CellType) -> dict[str, Any]:
    try:
        return {"": cell.cell_contents}
    except ValueError:  # a name without a value yet
        return {}


def _write_cell(cell: CellType, was: dict[str, Any]) -> None:
    if was:
        cell.cell_contents = was[""]
    else:
        del cell.cell_contents


def _read_class(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


def _read_slots(owner: Any) -> dict[str, Any]:
    return {name: getattr(owner, name) for name in _slots(_class(owner)) if hasattr(owner, name)}


def _write_attributes(owner: Any, was: dict[str, Any]) -> None:
    put, drop = (
        (type.__setattr__, type.__delattr__) if isinstance(owner, type) else (object.__setattr__, object.__delattr__)
    )
    now = _read_class(owner) if isinstance(owner, type) else _read_slots(owner)
    for name in now.keys() - was.keys():
        drop(owner, name)
    for name, value in was.items():
        if name not in now or now[name] is not value:
            put(owner, name, value)


def _read_globals(function: FunctionType) -> dict[str, Any]:
    own = function.__globals__
    return {name: own[name] for name in _global_names(function.__code__) if name in own}


def _write_array(array: np.ndarray[Any, Any], was: np.ndarray[Any, Any]) -> None:
    if array.shape != was.shape:
        array.resize(was.shape, refcheck=False)
    array[...] = was


def _same_array(now: np.ndarray[Any, Any], was: np.ndarray[Any, Any]) -> bool:
    return now.shape == was.shape and now.dtype == was.dtype and now.tobytes() == was.tobytes()


def _generator(read: Callable[[Any], Any], write: Callable[[Any, Any], None]) -> _Kind:
    return _Kind(read, write, lambda now, was: _plain(now) == _plain(was))


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return tuple(map(_plain, state))
    return state.tolist() if isinstance(state, (Tensor, np.ndarray)) else state


_FUNCTION = _Kind(_read_globals, lambda function, was: function.__globals__.update(was))
_ATTRIBUTES = _Kind(_read_class, _write_attributes)
_SLOTS = _Kind(_read_slots, _write_attributes)
_KINDS: list[tuple[type | tuple[type, ...], _Kind]] = [
    (Tensor, _Kind(lambda t: (t.detach(), t.grad_fn), _write_tensor, _same_tensor, lambda c: (c[0].clone(), c[1]))),
    (dict, _Kind(dict, _write_dict)),
    ((list, deque, set), _Kind(lambda owner: dict(enumerate(owner)), _write_all)),
    (CellType, _Kind(_read_cell, _write_cell)),
    (np.ndarray, _Kind(_itself, _write_array, _same_array, np.ndarray.copy)),
    (bytearray, _Kind(bytes, lambda owner, was: owner.__setitem__(slice(None), was), bytes.__eq__)),
    (torch.Generator, _generator(lambda owner: owner.get_state(), lambda owner, was: owner.set_state(was))),
    (
        np.random.Generator,
        _generator(
            lambda owner: owner.bit_generator.state, lambda owner, was: setattr(owner.bit_generator, "state", was)
        ),
    ),
    (np.random.RandomState, _generator(lambda owner: owner.get_state(), lambda owner, was: owner.set_state(was))),
    (random.Random, _generator(lambda owner: owner.getstate(), lambda owner, was: owner.setstate(was))),
]


# The walk


@functools.lru_cache(maxsize=4096)
def _kind_of(cls: Any) -> _Kind | None:
    """Return how objects of a class are kept, None where they have no content of their own."""
    kind = next((kind for types, kind in _KINDS if issubclass(cls, types)), None)
    if kind is not None:
        return kind
    if issubclass(cls, FunctionType):
        return _FUNCTION
    if issubclass(cls, type):
        return _ATTRIBUTES
    return _SLOTS if not _is_library(cls.__module__) and _slots(cls) else None


def _walk(roots: tuple[Any, ...]) -> Iterator[tuple[str, Any, _Kind | None]]:
    """Yield every mutable object by its name, with its kind, and every module, with None."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root) for root in reversed(roots)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        if type(value) is OrderedDict and not value and name.rpartition(".")[2] in _HOOKS:
            continue  # ten of them in every module
        if isinstance(value, (type, FunctionType)) and _is_library(value.__module__ or "torch"):
            continue
        seen.add(id(value))
        kind = _kind_of(_class(value))
        if kind is not None:
            yield name, value, kind
            if kind is _FUNCTION:
                stack.extend((key, child) for key, child in _read_globals(value).items() if _belongs(child, value))
            elif kind.same is _same_items:
                stack.extend(reversed([(_join(name, key), child) for key, child in kind.read(value).items()]))
        elif isinstance(value, nn.Module):
            yield name, value, None
        stack.extend((_join(name, key), child) for key, child in _parts(value, kind))


def _parts(value: Any, kind: _Kind | None) -> list[tuple[Any, Any]]:
    """Return what else an object holds, by its name there."""
    if isinstance(value, (tuple, frozenset)):
        return list(enumerate(value))
    if isinstance(value, FunctionType):
        closure = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return [*closure, *(("", part) for part in (value.__defaults__, value.__kwdefaults__, vars(value)))]
    if isinstance(value, MethodType):
        return [("", value.__func__), ("", value.__self__)]
    if isinstance(value, functools.partial):
        return [("", value.keywords), ("", value.args), ("", value.func)]
    cls = type(value)
    if isinstance(value, nn.Module):
        if f"{cls.__module__}.".startswith(
            _WRAPPERS
        ):  # DistributedDataParallel, torch.compile: the model, not their own
            own = (*value.named_buffers(recurse=False), *value.named_parameters(recurse=False))
            return [
                *own,
                *(("" if key in ("module", "_orig_mod") else key, part) for key, part in value.named_children()),
            ]
    elif kind not in (None, _SLOTS) or (
        _is_library(cls.__module__) and cls not in (SimpleNamespace, UserDict, UserList)
    ):
        return []
    classes = [base for base in cls.__mro__ if not _is_library(base.__module__)]
    return [*(("", base) for base in classes), *([("", vars(value))] if hasattr(value, "__dict__") else [])]


def _belongs(value: Any, function: FunctionType) -> bool:
    """Say whether a global that a function names is the function's to change: not what its file imports from others."""
    if isinstance(value, nn.Module) or (not isinstance(value, (type, FunctionType)) and _kind_of(_class(value))):
        return True
    return getattr(value, "__module__", None) == function.__module__


@functools.lru_cache(maxsize=4096)
def _global_names(code: CodeType) -> tuple[str, ...]:
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _global_names(const)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


@functools.lru_cache(maxsize=4096)
def _slots(cls: Any) -> tuple[str, ...]:
    found = [vars(base).get("__slots__", ()) for base in cls.__mro__]
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _class(value: Any) -> Any:
    return type(value)  # Any: a key for the caches above, which mypy does not take a type for


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or (tensor.requires_grad and tensor.is_leaf)


def _join(name: str, key: Any) -> str:
    """Spell an attribute as one would write it: what torch keeps in dicts of its own is an attribute, too."""
    if key in ("_buffers", "_parameters", "_modules", ""):
        return name
    if isinstance(key, int):
        return f"{name}[{key}]"
    key = key if isinstance(key, str) else repr(key)
    return f"{name}.{key}" if name else key
