"""The state of a module when its forward began, as a module of its own for every evaluation.

Differences are taken long after the forward that they belong to. By then BatchNorm has counted a batch, `eval()` may
have been called and a cell that keeps its state on itself has moved on. So a forward is preceded by
`ModuleState.of(module)`, and every evaluation runs on a copy in that state whose parameters are the moved tensors. The
module itself is never touched, in whatever thread an evaluation runs. Pairs with `flat`, where a module among the
arguments of a call stands for its parameters.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["ModuleState", "attributes_kept"]

_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
_NEVER_CHANGE = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, tuple, dict, set)


class ModuleState:
    """What a module holds beside its parameters, at one moment.

    Attributes:
        names: of the parameters that require grad, each once.
        shared: attributes that cannot be copied, so that all evaluations use the one that the module has.
    """

    def __init__(self, module: nn.Module, every: dict[str, nn.Parameter]) -> None:
        parameters = {name: p for name, p in every.items() if p.requires_grad}
        self.shared: list[str] = []
        self.names = list(parameters)
        self._ids = [id(parameter) for parameter in parameters.values()]
        self._origin = id(module)
        self._frozen = [(p, p._version) for p in every.values() if not p.requires_grad]
        memo: dict[int, Any] = {id(parameter): parameter for parameter in every.values()}
        self.plain: list[Any] | None = []
        self._module = _twin(module, memo, self)

    @classmethod
    def of(cls, module: nn.Module) -> tuple[ModuleState, list[nn.Parameter]]:
        """The present state of a module, and its parameters that require grad; the last one where it is the same."""
        marks = _marks(module)
        before, kept, parameters = _LATEST.get(module, (None, None, []))
        state = None if kept is None or before != marks else kept()
        if state is None:
            every = dict(module.named_parameters())
            state, parameters = cls(module, every), [p for p in every.values() if p.requires_grad]
            if state.plain is not None:
                _LATEST[module] = marks, weakref.ref(state), parameters
        return state, list(parameters)

    def __getstate__(self) -> dict[str, Any]:
        """In another process parameters are other objects; their values stay here, every evaluation brings its own."""
        memo = {ident: nn.Parameter(torch.empty(0)) for ident in self._ids}
        return {"names": self.names, "shared": self.shared, "module": _twin(self._module, memo, None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names, module = set(state["names"]), state["module"]
        parameters = {name: p for name, p in module.named_parameters() if name in names}
        vars(self).update(vars(ModuleState(module, parameters)), shared=state["shared"])

    @functools.cached_property
    def key(self) -> Any:
        """Equal where two states give the same function; None where that cannot be told."""
        return None if self.plain is None else (self._origin, tuple(self.plain))

    @property
    def forward(self) -> Callable[..., Any]:
        """The method whose signature names the arguments."""
        return self._module.forward

    @property
    def tensors(self) -> list[Tensor]:
        """Its buffers and the parameters that do not require grad."""
        return [*self._module.buffers(), *(parameter for parameter, _ in self._frozen)]

    @functools.cached_property
    def flags(self) -> tuple[bool, ...]:
        """Whether each submodule is training."""
        return tuple(part.training for part in self._module.modules())

    def with_parameters(self, tensors: Sequence[Tensor]) -> nn.Module:
        """A module in this state whose parameters are these tensors; nothing that it changes is seen elsewhere."""
        for parameter, version in self._frozen:
            if parameter._version != version:
                raise RuntimeError(
                    "a parameter without gradient that is needed for gradient computation has been modified by an "
                    f"inplace operation: it is at version {parameter._version}, expected {version}"
                )
        memo: dict[int, Any] = {id(parameter): parameter for parameter, _ in self._frozen}
        memo.update(zip(self._ids, tensors, strict=True))
        return _twin(self._module, memo, None)

    def adopt(self, module: nn.Module) -> None:
        """Take over what the forward built on first use, a solver say, instead of building it again each time."""
        for mine, part in zip(_parts(self._module), _parts(module), strict=False):
            now = vars(mine)
            if len(now) == len(vars(part)) and all(now[name] is not None for name in now.keys() - _OF_TORCH):
                continue
            for name, value in vars(part).items():
                built = value is not None and not isinstance(
                    value, (*_NEVER_CHANGE, *_CONTAINERS, Tensor, np.ndarray, np.generic)
                )
                if built and now.get(name) is None and name not in _OF_TORCH:
                    now[name] = value

    def tensors_in_a_graph(self, module: nn.Module) -> list[str]:
        """Names of attributes that hold tensors with a gradient to give, which are neither parameters nor inputs."""
        return [
            f"{prefix}.{name}".lstrip(".")
            for prefix, part in module.named_modules()
            for name, value in vars(part).items()
            if name not in _OF_TORCH
            for tensor in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter) and tensor.requires_grad
        ]


def _parts(module: nn.Module) -> Iterable[nn.Module]:
    """A module and all inside of it; of most blackboxes that is the module itself."""
    return module.modules() if module._modules else (module,)


def _marks(module: nn.Module) -> list[Any]:
    """Equal where nothing was bound anew in a module, or written into its buffers and frozen parameters.

    Of a module whose attributes cannot change in place that is all; the state that is kept holds them alive.
    """
    found: list[Any] = []
    for part in _parts(module):
        held = vars(part)
        found += map(id, held.values())
        found += [(name, id(p), p is None or p.requires_grad or p._version) for name, p in part._parameters.items()]
        found += [(name, id(b), b is None or b._version) for name, b in part._buffers.items()]
    return found


# By module: its marks, the state that was held then as long as a call needs it, and its parameters.
_LATEST: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def _twin(module: nn.Module, memo: dict[int, Any], state: ModuleState | None) -> nn.Module:
    """A module with attributes of its own, whose parameters are those of the memo."""
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    twin: nn.Module = object.__new__(type(module))
    memo[id(module)] = twin
    held = dict(vars(module))
    object.__setattr__(twin, "__dict__", held)  # past the checks of nn.Module, which take longer than all else here
    held["_parameters"] = {name: memo.get(id(p), p) for name, p in module._parameters.items()}
    if module._buffers:
        held["_buffers"] = {name: _copied(buffer, memo) for name, buffer in module._buffers.items()}
        if state is not None and state.plain is not None:
            state.plain += [(id(b), b._version) for b in module._buffers.values() if b is not None]
    # submodules before attributes, which may lead to them
    held["_modules"] = {name: None if m is None else _twin(m, memo, state) for name, m in module._modules.items()}
    for name, value in held.items():
        if name in _OF_TORCH:
            continue
        if isinstance(value, _NEVER_CHANGE):
            if state is not None and state.plain is not None:
                state.plain.append(value)
            continue
        try:
            held[name] = _copied(value, memo)
        except Exception:  # whatever its own __deepcopy__ or __reduce__ raises
            if state is not None:
                state.shared.append(name)
        if state is not None and not isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            state.plain = None
    return twin


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy that shares nothing that can be changed, in which moved parameters and copied modules stand for theirs."""
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    found: Any
    if isinstance(value, _NEVER_CHANGE):
        return value
    if isinstance(value, Tensor):
        found = value.detach().clone()
    elif kind is np.ndarray and value.dtype != object:
        found = value.copy()
    elif kind in (list, tuple, set):
        found = kind(_copied(item, memo) for item in value)
    elif kind is dict:
        found = {key: _copied(item, memo) for key, item in value.items()}
    elif isinstance(value, nn.Module):
        found = _twin(value, memo, None)
    elif isinstance(value, torch.Generator):
        found = torch.Generator(value.device)
        found.set_state(value.get_state())
    elif kind is types.MethodType:
        found = types.MethodType(value.__func__, _copied(value.__self__, memo))
    elif kind is types.FunctionType:
        found = _rebound(value, memo)
    else:
        found = copy.deepcopy(value, memo)
    memo[id(value)] = found
    memo.setdefault(-1, []).append(value)  # an id is that of the value only while this is alive
    return found


def _rebound(function: Callable[..., Any], memo: dict[int, Any]) -> Any:
    """A function whose closure holds a copied module, or one of its methods, made to hold the copy."""
    cells = function.__closure__ or ()
    inside = [cell.cell_contents if _filled(cell) else None for cell in cells]
    mapped = [
        types.MethodType(value.__func__, memo[id(value.__self__)])
        if isinstance(value, types.MethodType) and id(value.__self__) in memo
        else memo.get(id(value), value)
        for value in inside
    ]
    if all(new is old for new, old in zip(mapped, inside, strict=True)):
        return function
    closure = tuple(types.CellType(value) for value in mapped)
    twin = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Bind every attribute that the block binds anew, in any submodule, back to what it was."""
    kept = [(part, dict(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, before in kept:
            now = vars(part)
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)
