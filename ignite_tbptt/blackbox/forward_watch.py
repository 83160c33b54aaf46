"""One forward pass under observation: which modules were called, and which torch calls in them left the graph.

The idea: two witnesses write one record. Hooks on every module note what went in and what came out; a
`torch.overrides.TorchFunctionMode` notes each call that takes a tensor that requires grad and gives something that does
not, with the source line of the nearest frame outside torch and numpy. `graph_cuts` reads the record and says who is at
fault.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ignite_tbptt import nest
from ignite_tbptt.blackbox.compiled_code import outside_compiled_code
from ignite_tbptt.blackbox.cut_report import CutCall
from ignite_tbptt.blackbox.reach import Bits, Reach, carries_gradient, is_dead_node

__all__ = ["CallRecord", "CallWatch", "ForwardWatch"]

# Comparisons and truth values: they often only decide a branch next to the call that really cut.
_MASK_READS = frozenset({"__bool__", "equal", "allclose"})
# Calls that hand a tensor's values to Python or numpy. Questions about shape or dtype are not among them.
_READS = _MASK_READS | {"item", "tolist", "numpy", "__array__", "__format__"}
_READS |= {"__float__", "__int__", "__complex__", "__index__"}
_LIBRARY_FOLDERS = tuple(os.path.dirname(str(package.__file__)) + os.sep for package in (torch, np))
_OWN_FOLDER = os.path.dirname(__file__) + os.sep
_FUNCTION_FILE = os.path.join("torch", "autograd", "function.py")


@dataclass(eq=False)
class CallRecord:
    """What went into one call of a module, what was read in it, and what came out."""

    path: str
    type_name: str
    is_function: bool
    entered: int
    grad_enabled: bool
    parent: CallRecord | None
    events: list[tuple[CutCall, int, int]] = field(default_factory=list)
    children: list[CallRecord] = field(default_factory=list)
    left: Bits = field(default_factory=Bits)
    gives_float: bool = False
    gives_grad: bool = False


class ForwardWatch:
    """The record of one forward pass: a tree of module calls, each with the cutting calls that happened in it."""

    def __init__(self, reach: Reach, names: dict[int, str]) -> None:
        self.reach = reach
        self.root: CallRecord | None = None
        self._names = names
        self._current: CallRecord | None = None

    @outside_compiled_code
    def enter(self, path: str, module: Any, arguments: Any) -> CallRecord:
        """Open the record of a call; calls until it is left are its children."""
        with torch._C.DisableTorchFunction():  # its own questions need not be watched
            entered = self.reach.of(arguments).any
        name = type(module).__name__ if isinstance(module, nn.Module) else getattr(module, "__name__", "function")
        function = not isinstance(module, nn.Module)
        call = CallRecord(path, name, function, entered, torch.is_grad_enabled(), self._current)
        if self._current is not None:
            self._current.children.append(call)
        else:
            self.root = call
        self._current = call
        return call

    @outside_compiled_code
    def leave(self, call: CallRecord, outputs: Any) -> None:
        """Close the record of a call with what came out."""
        with torch._C.DisableTorchFunction():
            floats = [tensor for tensor in nest.tensors(outputs) if carries_gradient(tensor)]
            call.left = self.reach.of(floats)
            call.gives_float = bool(floats)
            # a view that was made without gradients still says that it requires them
            call.gives_grad = any(t.requires_grad and (t.grad_fn is not None or not t._is_view()) for t in floats)
        self._current = call.parent

    def note(self, call: CutCall, arguments: Any, rank: int) -> None:
        """Write down a call that left the graph, in the module that is running."""
        bits = self.reach.of(arguments).any
        if bits and self._current is not None:
            self._current.events.append((call, bits, rank))

    @contextlib.contextmanager
    def hooks(self, model: Callable[..., Any]) -> Iterator[None]:
        """Hooks on every module, last in line so that they see what the user's own hooks made of the outputs."""
        handles = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.enter(self._names[id(module)], module, (args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
            if self._current is not None:
                self.leave(self._current, outputs)

        try:
            for module in model.modules() if isinstance(model, nn.Module) else ():
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
            yield
        finally:
            for handle in handles:
                handle.remove()


class CallWatch(TorchFunctionMode):
    """Notes every torch call that takes a tensor that requires grad and gives something that does not."""

    def __init__(self, watch: ForwardWatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__  # type: ignore[attr-defined]
            if name != "data" and torch.is_grad_enabled():
                return result  # of a tensor's properties that one alone leaves the graph
        values = args[1:] if name == "new_tensor" else args
        verdict = _verdict(name, (values, kwargs), result)
        if verdict is not None:
            label, rank = verdict
            site = _call_site()
            if site is not None:
                results = list(nest.tensors(result))
                integral = bool(results) and not any(carries_gradient(tensor) for tensor in results)
                call = CutCall(label, *site, zero_gradient=_is_dead(results), integral=integral)
                self._watch.note(call, (values, kwargs), rank)
        return result


def _is_dead(results: list[Tensor]) -> bool:
    return any(tensor.grad_fn is not None and is_dead_node(tensor.grad_fn) for tensor in results)


def _verdict(name: str, arguments: Any, result: Any) -> tuple[str, int] | None:
    """The call's name and how telling it is (0 most, 2 least); None where it cuts nothing.

    A comparison is the least telling: it often only decides a branch next to the call that really cut.
    """
    if name in _READS:
        return (name, 2 if name in _MASK_READS else 0) if _in_graph(arguments) else None
    results = list(nest.tensors(result))
    if not results and name != "__setitem__":
        return None
    grad_enabled = torch.is_grad_enabled()
    if grad_enabled and not _is_dead(results) and (not results or any(tensor.requires_grad for tensor in results)):
        return None
    shape_only = name.endswith("_like") or (name.startswith("new_") and name != "new_tensor") or name == "grad"
    if shape_only or not _in_graph(arguments):
        return None
    if not grad_enabled:
        return ("no_grad" if name not in ("detach", "data") else name), 0
    if any(carries_gradient(tensor) for tensor in results):
        return name, 0
    return name, 2 if all(tensor.dtype == torch.bool for tensor in results) else 1


def _in_graph(arguments: Any) -> bool:
    return any(tensor.requires_grad for tensor in nest.tensors(arguments))


def _call_site() -> tuple[str, int] | None:
    """File and line of the nearest frame that belongs neither to torch or numpy nor to this package.

    Where a model is made of torch's own modules alone, the frame of torch that made the call. None inside an autograd
    Function (and so in a re-entrant checkpoint), which runs without gradients because it answers for them itself.
    """
    frame: FrameType | None = sys._getframe(2)
    site: tuple[str, int] | None = None
    nearest = None
    while frame is not None:
        file = frame.f_code.co_filename
        nearest = nearest or (file, frame.f_lineno)
        if file.endswith(_FUNCTION_FILE) and not torch.is_grad_enabled():
            return None
        if file.startswith(_OWN_FOLDER):
            break
        if site is None and not file.startswith(_LIBRARY_FOLDERS):
            site = file, frame.f_lineno
        frame = frame.f_back
    return site or nearest
