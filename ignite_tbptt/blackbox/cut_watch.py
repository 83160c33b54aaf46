"""One forward pass under observation: which modules were called, and which torch calls in them left the graph.

Hooks on every module note what went in and what came out. A `torch.overrides.TorchFunctionMode` notes which sources
each call of torch uses, and those that its result does not carry on, with the source line of the nearest frame outside
torch and numpy. Values that have lost their gradient are followed further: a ``detach()`` on the way to numpy differs
from one that stays in torch. `cuts` reads the record and attributes the losses to modules.
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
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ignite_tbptt import nest
from ignite_tbptt.blackbox.compiled_code import outside_compiled_code
from ignite_tbptt.blackbox.cut_report import CutCall
from ignite_tbptt.blackbox.reach import Bits, Reach, carries_gradient, is_dead_node

__all__ = ["CallRecord", "CallWatch", "Event", "ForwardWatch"]

# Questions about a tensor that do not ask for its values. Whatever else gives Python something is a value that leaves.
# fmt: off
_QUESTIONS = frozenset({
    "__dir__", "__dlpack_device__", "__hash__", "__iter__", "__len__", "__repr__", "__str__",
    "_set_grad_enabled", "backward", "can_cast", "dense_dim", "dim", "dim_order", "element_size", "get_device",
    "has_names", "is_coalesced", "is_complex", "is_conj", "is_contiguous", "is_floating_point", "is_inference",
    "is_neg", "is_pinned", "is_same_size", "is_set_to", "is_shared", "is_signed", "ndimension", "nelement",
    "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "numel", "promote_types",
    "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "result_type", "retain_grad",
    "set_grad_enabled", "size", "sparse_dim", "storage_offset", "stride", "type",
})
# fmt: on
# Truth values and comparisons: they often only decide a branch next to the call that really cut.
_TRUTHS = frozenset({"__bool__", "__contains__", "is_nonzero", "equal", "allclose"})
# Stopped where gradients are not wanted, as it seems, unless the value leaves torch afterwards.
_STOPS = frozenset({"detach", "detach_", "data", "no_grad"})
_LIBRARY_FOLDERS = tuple(os.path.dirname(str(package.__file__)) + os.sep for package in (torch, np))
_OWN_FOLDER = os.path.dirname(__file__) + os.sep
_FUNCTION_FILE = os.path.join("torch", "autograd", "function.py")


@dataclass(eq=False)
class Event:
    """A call that some sources did not come through alive.

    Attributes:
        name: what the call is called.
        site: its source file and line.
        lost: the sources that its result does not carry on.
        rank: how telling it is, 0 most and 2 least.
        owner: the module call in which it happened.
        zero_gradient: its derivative is zero.
        integral: it gives indices, masks or integers.
        leaves_torch: the value, or what was made of it in the same module call, went to Python or another library.
    """

    name: str
    site: tuple[str, int]
    lost: int
    rank: int
    owner: CallRecord
    zero_gradient: bool = False
    integral: bool = False
    leaves_torch: bool = False

    @property
    def stops(self) -> bool:
        """Whether it looks deliberate: gradients were stopped and the value stayed in torch."""
        return self.name in _STOPS and not self.leaves_torch

    @property
    def call(self) -> CutCall:
        """The call as the report tells it."""
        return CutCall(self.name, *self.site, self.zero_gradient, self.integral, self.leaves_torch)


@dataclass(eq=False)
class CallRecord:
    """What went into one call of a module, what was used and read in it, and what came out.

    Sources are bits, see `Reach`. `moved` counts the numbers that finite differences on this module would move, and
    `leaving` those in the tensors that leave torch in it.
    """

    path: str
    type_name: str
    is_function: bool
    entered: int
    grad_enabled: bool
    parent: CallRecord | None
    moved: int = 0
    used: int = 0
    events: list[Event] = field(default_factory=list)
    children: list[CallRecord] = field(default_factory=list)
    leaving: dict[Any, int] = field(default_factory=dict)
    left: Bits = field(default_factory=Bits)
    gives_float: bool = False
    gives_grad: bool = False
    is_open: bool = True


class ForwardWatch:
    """The record of one forward pass: a tree of module calls, each with the cutting calls that happened in it."""

    def __init__(self, reach: Reach, names: dict[int, str]) -> None:
        self.reach = reach
        self.root: CallRecord | None = None
        self._names = names
        self._current: CallRecord | None = None
        # What was made of sources and carries no gradient for them, with the calls that lost it on the way.
        self._dark: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @outside_compiled_code
    def enter(self, path: str, module: Any, arguments: Any) -> CallRecord:
        """Open the record of a call; calls until it is left are its children."""
        is_module = isinstance(module, nn.Module)
        with torch._C.DisableTorchFunction():  # its own questions need not be watched
            moved = {id(tensor): tensor for tensor in nest.tensors(arguments) if tensor.requires_grad}
            entered = self.reach.of(arguments).any
            if is_module:
                # An extension may read a module's own parameters where no call of torch shows it.
                entered |= self.reach.of(list(module.parameters(recurse=False))).any
                moved |= {id(p): p for p in module.parameters() if p.requires_grad and not is_lazy(p)}
        name = type(module).__name__ if is_module else getattr(module, "__name__", "function")
        call = CallRecord(path, name, not is_module, entered, torch.is_grad_enabled(), self._current)
        if is_module:
            scripted = [part for part in (module, *module.children()) if isinstance(part, torch.jit.ScriptModule)]
            call.used = self.reach.of([list(part.parameters()) for part in scripted]).any
        call.moved = sum(tensor.numel() for tensor in moved.values())
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
            floats = [tensor for tensor in _tensors_in(outputs) if carries_gradient(tensor)]
            call.left = self.reach.of(floats)
            call.gives_float = bool(floats)
            # a view that was made without gradients still says that it requires them
            call.gives_grad = any(t.requires_grad and (t.grad_fn is not None or not t._is_view()) for t in floats)
        call.is_open = False
        self._current = call.parent

    def saw(self, name: str, is_property: bool, given: list[Tensor], bits: Bits, result: Any) -> None:
        """Note what a call of torch made of the tensors that it was given, and of the sources that they depended on."""
        origins = [event for tensor in given if tensor in self._dark for event in self._dark[tensor]]
        record = self._current
        if record is None or not (bits.any or origins):
            return
        results = list(nest.tensors(result))
        if name in ("__setitem__", "__set__"):
            results = given[:1]
        if name in _QUESTIONS or name.endswith("_like") or (is_property and (name == "grad" or not results)):
            return
        site, function_inputs = _call_site()
        record.used |= bits.any if site else self.reach.of(function_inputs).any
        if site is None:
            return
        if not results:
            leaves = name not in _TRUTHS
            if bits.any:
                rank = 0 if leaves else 2
                record.events.append(Event(name, site, bits.any, rank, record, leaves_torch=leaves))
            floats = [tensor for tensor in given if carries_gradient(tensor)]
            if leaves and floats:
                self._value_left(record, origins, floats)
            return
        dark = [tensor for tensor in results if not tensor.requires_grad]
        event = self._loss(name, site, record, bits, results, dark)
        origins = list(dict.fromkeys([*origins, event] if event else origins))
        for tensor in dark or (results if any(event.zero_gradient for event in origins) else []):
            self._dark[tensor] = origins

    def _value_left(self, record: CallRecord, origins: list[Event], floats: list[Tensor]) -> None:
        """Mark the calls through which a value went that now leaves torch, as far as their module is still running."""
        open_origins = [event for event in origins if event.owner.is_open]
        for event in open_origins:
            event.leaves_torch = True
        for owner in [event.owner for event in open_origins] or [record]:
            owner.leaving |= {(tensor.data_ptr(), tensor.shape): tensor.numel() for tensor in floats}

    def _loss(
        self,
        name: str,
        site: tuple[str, int],
        record: CallRecord,
        bits: Bits,
        results: list[Tensor],
        dark: list[Tensor],
    ) -> Event | None:
        """The event of a call that gives tensors, None where all sources come through it alive."""
        # A derivative that is zero is lost once, at the call that makes it so.
        lost = bits.live if dark else bits.live & ~self.reach.of(results).live
        if not torch.is_grad_enabled():
            lost = bits.any
            name = name if name in _STOPS else "no_grad"
        if not lost:
            return None
        integral = not any(carries_gradient(tensor) for tensor in dark or results)
        rank = 0 if not integral else 2 if all(tensor.dtype == torch.bool for tensor in dark) else 1
        zero = any(tensor.grad_fn is not None and is_dead_node(tensor.grad_fn) for tensor in results)
        event = Event(name, site, lost, rank, record, zero, integral)
        record.events.append(event)
        return event

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
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks; `enter` counts what it may have used
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
            yield
        finally:
            for handle in handles:
                handle.remove()


class CallWatch(TorchFunctionMode):
    """Shows every call of torch in a forward pass to its record."""

    def __init__(self, watch: ForwardWatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        is_property = name == "__get__"
        if is_property:
            name = func.__self__.__name__  # type: ignore[attr-defined]
        with torch._C.DisableTorchFunction():  # subclasses need not hear of what is asked here
            given = list(nest.tensors((args[1:] if name == "new_tensor" else args, kwargs)))
            bits = self._watch.reach.of(given)  # before the call, which may detach them in place
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._watch.saw(name, is_property, given, bits, result)
        return result


def _tensors_in(outputs: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors of a nest, and of objects in it that hold some (a distribution, a namespace)."""
    for _, leaf in nest.leaves(outputs):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)):
            yield from _tensors_in(vars(leaf), depth - 1)


def _call_site() -> tuple[tuple[str, int] | None, Any]:
    """File and line of the nearest frame that belongs neither to torch or numpy nor to this package.

    Where a model is made of torch's own modules alone, the frame of torch that made the call. Inside an autograd
    Function (and so in a re-entrant checkpoint), which runs without gradients because it answers for them itself, None
    and the inputs of the Function.
    """
    frame: FrameType | None = sys._getframe(3)
    site: tuple[str, int] | None = None
    nearest = None
    while frame is not None:
        file = frame.f_code.co_filename
        nearest = nearest or (file, frame.f_lineno)
        if file.endswith(_FUNCTION_FILE) and not torch.is_grad_enabled():
            return None, frame.f_locals.get("args", ())
        if file.startswith(_OWN_FOLDER):
            break
        if site is None and not file.startswith(_LIBRARY_FOLDERS):
            site = file, frame.f_lineno
        frame = frame.f_back
    return site or nearest, ()
