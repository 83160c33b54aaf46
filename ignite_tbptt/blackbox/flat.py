"""A function of nested arguments as a function of a flat list of tensors, and its outputs as a flat list of tensors.

The idea: once the nest is remembered, only its tensors matter. A module among the arguments stands for its parameters
that require grad, in the state in which it was when the call began; numpy arrays are copied for each evaluation, like
tensors; everything else is passed through. `FlatCall` is made by `function` and by `module`, and below it nobody knows
which. `Outputs` are taken in the precision in which they came, each in memory of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ignite_tbptt import nest
from ignite_tbptt.blackbox.module_state import ModuleState

__all__ = [
    "Captured",
    "FlatCall",
    "Outputs",
    "call_forward",
    "call_module",
    "copied",
    "name_of",
    "same_bits",
    "same_kind",
]

_PASSED = (type(None), bool, int, float, complex, str, bytes, type)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor, or the first parameter of a module, goes."""

    index: int
    module: ModuleState | None = None
    subclass: tuple[type[Tensor], dict[str, Any]] | None = None


_LEAF = _Place(0)


class Captured(NamedTuple):
    """A module as it was before a forward that has run already."""

    state: ModuleState
    parameters: list[nn.Parameter]
    module: nn.Module


def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module with its hooks."""
    return module(*args, **kwargs)


def call_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module without its own hooks."""
    return module.forward(*args, **kwargs)


def _named(module: str, qualname: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _undecorated(module: str, qualname: str) -> Any:
    return _named(module, qualname).__wrapped__


def _is_decorated(fn: Callable[..., Any]) -> bool:
    """Whether what has the name of a function is made of it, so that it cannot be pickled by its name."""
    if not isinstance(fn, types.FunctionType) or fn.__module__ not in sys.modules:
        return False
    found = _named(fn.__module__, fn.__qualname__)
    return found is not fn and getattr(found, "__wrapped__", None) is fn


class _Undecorated:
    """A decorated function, pickled as what is inside of the one that has its name."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __reduce__(self) -> Any:
        return _undecorated, (self.fn.__module__, self.fn.__qualname__)


class FlatCall:
    """One call of a function, to be evaluated again with other tensors.

    Args:
        fn: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        numpy: whether the function is to be given arrays in the place of tensors.
        label: what the function is called in messages.
        captured: the module that is called, which the function is given before its arguments.

    Attributes:
        tensors: all tensors that the outputs depend on; taken out by whoever makes the call differentiable.
        closed: objects among the arguments that hold tensors which require grad, and cannot be taken apart.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        numpy: bool = False,
        label: str | None = None,
        captured: Captured | None = None,
    ) -> None:
        self.fn, self.numpy = fn, numpy
        self.label = name_of(fn) if label is None else label
        self.tensors: list[Tensor] = []
        self.closed: list[str] = []
        self.in_dims: tuple[int | None, ...] | None = None
        self.states: list[ModuleState] = []
        self._originals: dict[int, nn.Module] = {}
        self._count = len(args)
        self._own = 0  # how many of the tensors are parameters of the module that is called
        self._called = captured is not None
        if captured is not None:
            self.tensors += captured.parameters
            self._own = len(captured.parameters)
            self.states.append(captured.state)
            self._originals[-1] = captured.module
        self._only_tensors = not kwargs and all(
            type(arg) in (Tensor, nn.Parameter) and arg.layout is torch.strided for arg in args
        )
        if self._only_tensors:
            self.tensors += args
        else:
            self._args = [self._taken(arg) for arg in args]
            self._kwargs = {name: self._taken(value) for name, value in kwargs.items()}

    def _taken(self, value: Any) -> Any:
        """A nest with places where tensors and modules were."""
        if isinstance(value, Tensor):
            if value.layout is not torch.strided:
                if value.requires_grad:
                    raise TypeError(
                        f"a sparse tensor of {self.label} requires grad: its values are moved one by one, but not its "
                        "indices; pass values and indices, and put them together inside the function"
                    )
                return value.detach().clone()
            self.tensors.append(value)
            kind = type(value)
            subclass = None if kind in (Tensor, nn.Parameter) else (kind, dict(vars(value)))
            return _Place(len(self.tensors) - 1, subclass=subclass)
        if isinstance(value, _PASSED):
            return value
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, nn.Module):
            if isinstance(value, torch.jit.ScriptModule):
                return value
            state, parameters = ModuleState.of(value)
            place = _Place(len(self.tensors), module=state)
            self.tensors += parameters
            self.states.append(state)
            self._originals[place.index] = value
            return place
        pairs = nest.children(value)
        if pairs is not None:
            return nest.rebuild(value, [self._taken(child) for _, child in pairs])
        held = getattr(value, "__dict__", None)
        if held and not callable(value):
            self.closed += [
                f"{type(value).__name__}.{name}"
                for name, item in held.items()
                if isinstance(item, Tensor) and item.requires_grad
            ]
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_originals": {}, "fn": _Undecorated(self.fn) if _is_decorated(self.fn) else self.fn}

    @property
    def constants(self) -> Any:
        """What the function is given besides tensors."""
        return self.numpy, None if self._only_tensors else (self._args, self._kwargs)

    def first_time(self, *tensors: Tensor) -> Any:
        """The value of the function in the call itself, where modules are not copies but the caller's own."""
        return self._value(tensors, self._originals)

    def __call__(self, *tensors: Tensor) -> Any:
        """The value of the function at these tensors, which it may keep and change."""
        return self._value(tensors, {})

    def _value(self, tensors: Sequence[Tensor], originals: dict[int, nn.Module]) -> Any:
        called: tuple[Any, ...] = ()
        if self._called:
            called = (originals[-1] if originals else self.states[0].with_parameters(tensors[: self._own]),)
        if self._only_tensors:
            given = tensors[self._own :] if self._own else tensors
            return self.fn(*called, *map(_as_array, given)) if self.numpy else self.fn(*called, *given)
        args = [self._put(arg, tensors, originals) for arg in self._args]
        kwargs = {name: self._put(value, tensors, originals) for name, value in self._kwargs.items()}
        return self.fn(*called, *args, **kwargs)

    def _put(self, value: Any, tensors: Sequence[Tensor], originals: dict[int, nn.Module]) -> Any:
        if isinstance(value, _Place):
            if value.module is not None and value.index in originals:
                return originals[value.index]
            if value.module is not None:
                return value.module.with_parameters(tensors[value.index : value.index + len(value.module.names)])
            tensor = tensors[value.index]
            if value.subclass is not None:
                kind, held = value.subclass
                tensor = tensor.as_subclass(kind)
                vars(tensor).update(held)
            return _as_array(tensor) if self.numpy else tensor
        if isinstance(value, _PASSED):
            return value
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, Tensor):
            return value.clone()
        pairs = nest.children(value)
        if pairs is None:
            return value
        return nest.rebuild(value, [self._put(child, tensors, originals) for _, child in pairs])

    @property
    def key(self) -> Any:
        """Equal in calls that are the same function of their tensors; None where that cannot be told."""
        found: list[Any] = [id(self.fn), self._count]
        if self._called:
            if self.states[0].key is None:
                return None
            found.append(self.states[0].key)
        if self._only_tensors:
            return tuple(found)
        pending = [*self._args, *self._kwargs.items()]
        while pending:
            value = pending.pop()
            if isinstance(value, _Place):
                if value.subclass is not None or (value.module is not None and value.module.key is None):
                    return None
                found.append((value.index, value.module and value.module.key))
            elif isinstance(value, _PASSED):
                found.append(value)
            elif isinstance(value, (tuple, list)):
                pending += value
                found.append(len(value))
            elif isinstance(value, dict):
                pending += value.items()
                found.append(len(value))
            else:
                return None
        return tuple(found)

    @property
    def flags(self) -> tuple[tuple[bool, ...], ...]:
        """Which modules among the arguments are training."""
        return tuple(state.flags for state in self.states)

    def kinds(self, tensors: Sequence[Tensor], autocast: bool) -> Any:
        """Equal in calls of one blackbox that differ in numbers alone; None where more than the tensors counts."""
        if not self._only_tensors:
            return None
        return (self._own, autocast, [(t.shape, t.dtype, t.device, t.requires_grad) for t in tensors])

    def bound(self, in_dims: Any, tensors: Sequence[Tensor]) -> tuple[int | None, ...]:
        """One batch axis, or None, for each tensor; keyword arguments and parameters have none.

        Raises:
            TypeError: an entry that is neither an int nor None.
            ValueError: in_dims do not have the structure of the arguments, give an axis to what is no tensor, or name
                axes that are not there or not of one size.
        """
        if isinstance(in_dims, list):
            in_dims = tuple(in_dims)
        entries: Any = (in_dims,) * self._count if isinstance(in_dims, int) else in_dims
        if not isinstance(entries, tuple) or len(entries) != self._count:
            raise self._mismatch(in_dims)
        dims: list[int | None] = [None] * len(tensors)
        if self._only_tensors:
            for k, dim in enumerate(entries, self._own):
                if isinstance(dim, (tuple, list, dict)):
                    raise self._mismatch(in_dims)
                _check_dim(dim, in_dims)
                dims[k] = dim
        else:
            for dim, arg in zip(entries, self._args, strict=True):
                self._spread(dim, arg, dims, in_dims)
        return self._checked(dims, tensors)

    def _spread(self, dim: Any, arg: Any, dims: list[int | None], in_dims: Any) -> None:
        """Give every tensor below an argument the entry that stands for it."""
        if isinstance(arg, _Place):
            if isinstance(dim, (tuple, list, dict)):
                raise self._mismatch(in_dims)
            _check_dim(dim, in_dims)
            if arg.module is None:
                dims[arg.index] = dim
            return
        pairs = None if isinstance(arg, (*_PASSED, np.ndarray, Tensor)) else nest.children(arg)
        if pairs is None:
            if isinstance(dim, (tuple, list, dict)):
                raise self._mismatch(in_dims)
            _check_dim(dim, in_dims)
            if dim is not None:
                raise ValueError(
                    f"in_dims gives axis {dim} to {self._spelled(arg)}, which is no tensor but {type(arg).__name__}; "
                    "give None there"
                )
            return
        below = nest.children(dim)
        if below is None:
            for _, child in pairs:
                self._spread(dim, child, dims, in_dims)
            return
        if [key for key, _ in below] != [key for key, _ in pairs] and dict(below).keys() != dict(pairs).keys():
            raise self._mismatch(in_dims)
        entries = dict(below)
        for key, child in pairs:
            self._spread(entries[key], child, dims, in_dims)

    def _mismatch(self, in_dims: Any) -> ValueError:
        return ValueError(
            f"in_dims={in_dims} does not match the {self._count} positional arguments of {self.label}: give an int, or "
            "a tuple with an entry for each, None for one that has no rows"
        )

    def _checked(self, dims: list[int | None], tensors: Sequence[Tensor]) -> tuple[int | None, ...]:
        """Batch axes, none of them negative, all of one size."""
        first = None
        for k, (dim, tensor) in enumerate(zip(dims, tensors, strict=True)):
            if dim is None:
                continue
            if not -tensor.dim() <= dim < tensor.dim():
                raise ValueError(
                    f"in_dims gives axis {dim} for {self.name(k)} of {self.label}, whose shape is "
                    f"{tuple(tensor.shape)}: there is no such axis; give None where all rows share it"
                )
            size = tensor.shape[dim]
            if first is None:
                first, rows = k, size
            elif size != rows:
                raise ValueError(
                    f"in_dims: {self.name(first)} has {rows} rows and {self.name(k)} has {size}; the batch axes of all "
                    f"arguments of {self.label} must be of one size"
                )
            dims[k] = dim % tensor.dim()
        if first is None:
            raise ValueError(f"in_dims names a batch axis for none of the tensors of {self.label}; leave it out")
        return tuple(dims)

    def name(self, k: int) -> str:
        """What a tensor is called in messages, as one would write it inside the function: ``batch['image']``."""
        if k < self._own:
            return f"parameter {self.states[0].names[k]}"
        if self._only_tensors:
            return self._parameter(k - self._own)
        return self._spelled(k)

    def _spelled(self, wanted: Any) -> str:
        """The path to a leaf of the template: to the place of a tensor, given its number, or to a value itself."""
        roots = [(self._parameter(k), arg) for k, arg in enumerate(self._args)] + list(self._kwargs.items())
        return next((text for name, value in roots if (text := _path(value, name, wanted))), "an argument")

    def _parameter(self, index: int) -> str:
        with_names = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        fn = self.states[0].forward if self._called else self.fn
        try:
            parameters = [p.name for p in inspect.signature(fn).parameters.values() if p.kind in with_names]
        except (TypeError, ValueError):
            parameters = []
        return parameters[index] if index < len(parameters) else f"args[{index}]"


def _path(value: Any, name: str, wanted: Any) -> str | None:
    if isinstance(value, _Place):
        if value.module is not None and type(wanted) is int:
            inside = wanted - value.index
            known = value.module.names
            return f"parameter {known[inside]}" if 0 <= inside < len(known) else None
        return name if type(wanted) is int and value.index == wanted else None
    pairs = None if isinstance(value, (*_PASSED, np.ndarray, Tensor)) else nest.children(value)
    if pairs is None:
        return name if value is wanted and type(wanted) is not int else None
    by_field = dataclasses.is_dataclass(value) or hasattr(value, "_fields")
    found = (_path(child, f"{name}.{key}" if by_field else f"{name}[{key!r}]", wanted) for key, child in pairs)
    return next((text for text in found if text), None)


def _check_dim(dim: Any, in_dims: Any) -> None:
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        raise TypeError(f"in_dims must be made of ints and None, as in torch.vmap, got {dim!r} in {in_dims}")


def _as_array(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        raise TypeError(
            "numpy has no bfloat16: leave dtype out, which evaluates in float64, or choose another one than bfloat16"
        )
    return tensor.numpy()


def name_of(fn: Callable[..., Any]) -> str:
    """What a function is called in messages."""
    return getattr(fn, "__name__", None) or type(fn).__name__.lstrip("_")


@dataclasses.dataclass(eq=False)  # frozen ones take four times as long to make
class Outputs:
    """One value of a blackbox.

    Attributes:
        tensors: the numbers in it, each a tensor of its own: floats that can be differentiated, and integers.
        foreign: for each of them, whether it came as something else than a tensor.
        template: the nest, with a place where each of them was; the place itself where there is no nest.
        passed: kinds of objects in it that are neither numbers nor known to hold none.
    """

    tensors: list[Tensor]
    foreign: list[bool]
    template: Any
    passed: list[str]

    @classmethod
    def of(cls, value: Any, label: str) -> Outputs:
        """Take the numbers out of what a blackbox returned.

        Raises:
            TypeError: there is no tensor, array or float in it, or one is complex or masked.
        """
        tensor = _as_tensor(value, label)
        if tensor is not None and tensor.is_floating_point():
            return cls([tensor], [not isinstance(value, Tensor)], _LEAF, [])
        found = cls([], [], None, [])
        kinds: set[str] = set()
        template = found._taken(value, label, kinds)
        if not any(tensor.is_floating_point() for tensor in found.tensors):
            only = ", ".join(sorted(kinds)) or "integer tensors"
            raise TypeError(
                f"{label} returned nothing to differentiate: no tensor, numpy array or Python float of floating point "
                f"among its outputs, only {only}; return the numbers themselves, or leave {label} unwrapped"
            )
        return cls(found.tensors, found.foreign, template, found.passed)

    # Recursion is by method: an inner function that calls itself would keep the outputs, and their graph, until the
    # next garbage collection.
    def _taken(self, leaf: Any, label: str, kinds: set[str]) -> Any:
        tensor = _as_tensor(leaf, label)
        if tensor is None:
            pairs = None if isinstance(leaf, _PASSED) else nest.children(leaf)
            if pairs is not None:
                return nest.rebuild(leaf, [self._taken(child, label, kinds) for _, child in pairs])
            kinds.add(type(leaf).__name__)
            if not isinstance(leaf, _PASSED):
                self.passed.append(type(leaf).__name__)
            return leaf
        if tensor.is_complex():
            raise TypeError(
                f"{label} returned complex numbers, which have no gradient here; return "
                "torch.view_as_real(output), or its real and imaginary parts"
            )
        if not isinstance(leaf, Tensor):
            kinds.add(type(leaf).__name__)
        self.tensors.append(tensor)
        self.foreign.append(not isinstance(leaf, Tensor))
        return _Place(len(self.tensors) - 1)

    @property
    def is_leaf(self) -> bool:
        """Whether the blackbox returned one tensor or array and no nest."""
        return type(self.template) is _Place

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """The nest again, with other tensors in the places of these."""
        return _filled(self.template, tensors)


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.index]
    pairs = None if isinstance(value, (*_PASSED, Tensor)) else nest.children(value)
    return value if pairs is None else nest.rebuild(value, [_filled(child, tensors) for _, child in pairs])


def copied(value: Any) -> Tensor:
    """A tensor or an array as a tensor of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return torch.from_numpy(np.array(value, order="C"))


def _as_tensor(leaf: Any, label: str) -> Tensor | None:
    if isinstance(leaf, Tensor):
        return copied(leaf) if leaf.layout is torch.strided else None
    if isinstance(leaf, float) and not isinstance(leaf, np.generic):
        return torch.tensor(leaf, dtype=torch.float64)
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(
            f"{label} returned a masked array, whose mask a tensor cannot hold; return its .filled(0), or the numbers "
            "that count, .compressed()"
        )
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
    one, other = _shape_of(first.template), _shape_of(later.template)
    if one != other:
        return f"a nest {other} instead of {one}"
    for k, (was, now) in enumerate(zip(first.tensors, later.tensors, strict=True)):
        shape = list(was.shape)
        if copies > 1 and out_dims is not None:
            shape[out_dims[k]] *= copies
        if list(now.shape) != shape:
            return f"shape {tuple(now.shape)} instead of {tuple(shape)} (output {k})"
        if was.dtype != now.dtype:
            return f"dtype {now.dtype} instead of {was.dtype} (output {k})"
    return None


def _shape_of(template: Any) -> Any:
    """The structure of a nest: its containers, and where its tensors are."""
    if isinstance(template, _Place):
        return "*"
    pairs = None if isinstance(template, (*_PASSED, Tensor)) else nest.children(template)
    if pairs is None:
        return "-"
    return (type(template).__name__, tuple((key, _shape_of(child)) for key, child in pairs))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; NaN is the same as NaN."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
