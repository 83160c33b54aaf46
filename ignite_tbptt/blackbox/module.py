"""Finite differences for an nn.Module: gradients for its inputs and its parameters, by hooks on the module itself.

The idea: let the module's own forward run, once and untouched; a forward hook then detaches what came out and gives it
a ``grad_fn`` whose backward evaluates ``module.forward`` at moved inputs and parameters. The module stays the object it
is, so state_dict keys, optimizers, deepcopy, pickling and DistributedDataParallel notice nothing. Evaluations run
on copies of the module, in the `ModuleState` in which the forward began, never through in-place moves of a weight.
Pairs with every estimator and executor; `handler` decides which modules are bound and for how long.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ignite_tbptt import nest
from ignite_tbptt.blackbox.certificate import Certificate
from ignite_tbptt.blackbox.compiled_code import outside_compiled_code
from ignite_tbptt.blackbox.coordinates import Coordinates
from ignite_tbptt.blackbox.estimator import Estimator
from ignite_tbptt.blackbox.executors import Pool
from ignite_tbptt.blackbox.facts import Facts
from ignite_tbptt.blackbox.flat import Captured, FlatCall, call_forward, call_module, name_of
from ignite_tbptt.blackbox.module_state import ModuleState
from ignite_tbptt.blackbox.node import called, with_known_outputs
from ignite_tbptt.blackbox.options import Certify, Options, make_options
from ignite_tbptt.blackbox.reach import Reach
from ignite_tbptt.blackbox.record import Record
from ignite_tbptt.blackbox.report import report_of
from ignite_tbptt.blackbox.task import ALONE, EvaluationCount, Executor, is_on_stack
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["Binding", "Blackbox", "bind", "bindings_of", "unbind"]


# The entry of a Blackbox in the state_dict of a model, where its directions are random.
_STATE = "directions"


@dataclass(frozen=True, eq=False)
class _Begun:
    """A forward that is under way: torch's call, the state it began in and the inputs it was called with."""

    frame: FrameType
    captured: Captured
    streams: RandomStreams
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _call_of_torch() -> FrameType:
    """The call of a module that has called a hook, and will call the next; the outermost call where torch is not seen.

    Between it and the hook is `outside_compiled_code`, and what torch.compile puts there.
    """
    frame = sys._getframe(1)
    while frame.f_code.co_filename != _TORCH_CALLS_FROM and frame.f_back is not None:
        frame = frame.f_back
    return frame


_TORCH_CALLS_FROM = nn.modules.module.__file__


class Binding:
    """Finite differences on one module, as a pair of forward hooks.

    Make one with `bind`. While it is active, a forward with gradients enabled gives outputs whose backward evaluates
    the module's forward at moved inputs and parameters, as the estimator says. Only inputs and parameters that require
    grad cost evaluations. The hook on the output goes before the user's own hooks and the one on the inputs after them,
    so that theirs are differentiated by autograd and run once a forward, not once an evaluation.

    A state that the module keeps on itself is a constant to each call: gradients flow from call to call only through
    arguments. Copies of the module (deepcopy) share its binding: they stop when it is removed.

    Attributes:
        name: what the module is called in messages.
        active: False once removed.
    """

    def __init__(self, name: str, options: Options, count: EvaluationCount) -> None:
        self.name = name
        self.active = True
        self._options = options
        self._count = count
        self._facts = Facts(name)
        self._begun: dict[tuple[int, int], list[_Begun | None]] = {}
        self._checked = self._told = False
        self._forwards = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return self

    @property
    def certificates(self) -> Sequence[Certificate]:
        """How far off the last gradients were that were certified, the last one last."""
        return self._facts.certificates

    def state_dict(self) -> dict[str, Any]:
        """What the random directions of the next gradients depend on."""
        return self._facts.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the directions where the state was taken."""
        self._facts.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_begun": {}}

    @outside_compiled_code
    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The hook before a forward: hold the state it starts from, and hand the module copies of its inputs."""
        waiting = self._begun.setdefault((threading.get_ident(), id(module)), [])
        if waiting:  # of a module inside itself, or of forwards that Ctrl-C ended: torch calls no hook then
            waiting[:] = [one for one in waiting if one is None or is_on_stack(one.frame, sys._getframe())]
        if not (torch.is_grad_enabled() and self._in_charge(module)):
            waiting.append(None)
            return None
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                f"{self.name}: DataParallel runs copies whose parameters are not parameters, so that theirs cannot be "
                "moved; use DistributedDataParallel, or one device"
            )
        captured = Captured(*ModuleState.of(module), module)
        self._warn_once_of_hidden_gradients(module, captured.state)
        copies = nest.map_tensors(torch.clone, args), nest.map_tensors(torch.clone, kwargs) if kwargs else {}
        frame = _call_of_torch()
        ALONE.begin(frame)  # until `finish`: nobody else draws random numbers meanwhile
        waiting.append(_Begun(frame, captured, RandomStreams.latest(), args, kwargs))
        return copies

    @outside_compiled_code
    def finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """The hook after a forward, also one that raised: give what came out a gradient by finite differences."""
        key = threading.get_ident(), id(module)
        waiting = self._begun.get(key, [])
        begun = waiting.pop() if waiting else None
        if not waiting:
            self._begun.pop(key, None)
        if begun is None:
            return None
        try:
            return None if outputs is None else self._with_gradient(module, begun, args, kwargs, outputs)
        finally:
            ALONE.end()

    def _with_gradient(
        self, module: nn.Module, begun: _Begun, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> Any:
        # A full backward hook hands its inputs through a node of its own, which the gradient has to pass.
        hooked = bool(module._backward_hooks or module._backward_pre_hooks)
        args, kwargs = args if hooked else begun.args, begun.kwargs
        flat = FlatCall(call_forward, args, kwargs, label=self.name, captured=begun.captured)
        self._facts.name_closed(self.name, flat.closed)
        if not any(tensor.requires_grad for tensor in flat.tensors):
            return None
        self._warn_once_where_autograd_sees(flat.tensors, outputs)
        begun.captured.state.adopt(module)
        record = Record(flat, self._options, self._count, self._facts)
        return with_known_outputs(record, outputs, begun.streams)

    def _in_charge(self, module: nn.Module) -> bool:
        """Of several bindings on one module the one that came last answers, the others stand by."""
        return next((binding for binding in bindings_of(module) if binding.active), None) is self

    def _warn_once_of_hidden_gradients(self, module: nn.Module, state: ModuleState) -> None:
        self._forwards += 1
        due = not self._told and self._forwards & (self._forwards - 1) == 0  # at 1, 2, 4, ...
        names = state.tensors_in_a_graph(module) if due else []
        if names:
            self._told = True
            warnings.warn(
                f"{self.name}: attribute {names[0]!r} holds a tensor that requires grad but is neither a parameter nor "
                "an input of forward; if forward uses it, its gradient is lost. Pass it to forward as an argument, or "
                "detach it; for weight_norm and spectral_norm use those of torch.nn.utils.parametrizations",
                UserWarning,
                stacklevel=2,
            )

    def _warn_once_where_autograd_sees(self, tensors: list[Tensor], outputs: Any) -> None:
        if self._checked:
            return
        self._checked = True
        reach = Reach({str(index): tensor for index, tensor in enumerate(tensors) if tensor.requires_grad})
        if reach.of(outputs).live == (1 << len(reach.names)) - 1:
            warnings.warn(
                f"{self.name}: autograd sees through this module without help; finite differences now replace exact "
                "gradients, at the price of many evaluations. Leave it out of modules=...",
                UserWarning,
                stacklevel=2,
            )


def bind(
    module: nn.Module,
    *,
    name: str | None = None,
    estimator: Estimator | Literal["auto"] | None = None,
    executor: Executor | Pool | None = None,
    in_dims: Any = None,
    out_dims: int | Sequence[int | None] | None = 0,
    repeatable: bool = True,
    progress: bool = False,
    certify: int | Certify | None = None,
    count: EvaluationCount | None = None,
    evaluator: Executor | None = None,
) -> Callable[[], None]:
    """Give a module finite-difference gradients, in place; returns the function that takes them away again.

    Example::

        >>> import torch
        >>> from ignite_tbptt.blackbox.module import bind
        >>> class Square(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.from_numpy(x.detach().numpy() ** 2)
        >>> square, x = Square(), torch.tensor([3.0, 4.0], requires_grad=True)
        >>> remove = bind(square)
        >>> square(x).sum().backward()
        >>> x.grad.round(decimals=2)
        tensor([6., 8.])
        >>> remove()

    Args:
        module: any module that runs in Python.
        name: what to call it in messages; its class by default.
        estimator: how the gradient is estimated; central differences by default, "auto" as in `blackbox`.
        executor: where the evaluations run, as in `blackbox`.
        in_dims: the batch axis of each positional argument whose rows are independent, as in `blackbox`; parameters are
            shared by all rows.
        out_dims: the batch axis of the outputs, where in_dims is given.
        repeatable: False for a module that is noisy by nature, as in `blackbox`.
        progress: show a bar where a gradient takes longer than 2 s, as in `blackbox`.
        certify: estimate the error of some gradients, as in `blackbox`.
        count: where to count evaluations and seconds.
        evaluator: the old name of `executor`.

    Raises:
        TypeError: module is not an nn.Module, or a ScriptModule, whose forward takes no hooks of this kind.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be a torch.nn.Module, got {type(module).__name__}; for a function use blackbox(fn)"
        )
    _refuse_script(module)
    options = make_options(
        estimator=estimator,
        executor=executor,
        in_dims=in_dims,
        out_dims=out_dims,
        repeatable=repeatable,
        progress=progress,
        certify=certify,
        evaluator=evaluator,
    )
    count = EvaluationCount() if count is None else count
    binding = Binding(type(module).__name__ if name is None else name, options, count)
    before = module.register_forward_pre_hook(binding.begin, with_kwargs=True)
    after = module.register_forward_hook(binding.finish, with_kwargs=True, prepend=True, always_call=True)

    def remove() -> None:
        binding.active = False
        before.remove()
        after.remove()

    return remove


def bindings_of(module: nn.Module) -> list[Binding]:
    """The bindings on a module, the one that came last first."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Binding)]


def unbind(model: nn.Module) -> int:
    """Remove every binding from a model and its submodules, e.g. from one loaded by pickle; returns how many.

    Copies of the model that share a binding keep theirs.
    """
    removed = 0
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            ours = [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Binding)]
            for key in ours:
                del hooks[key]
        # of each pair the one on the output was the last to be looked through
        removed += len(ours)
    return removed


class Blackbox(nn.Module):
    """A module, or a function, with gradients by finite differences for its inputs and parameters.

    Example::

        >>> import torch
        >>> from ignite_tbptt.blackbox import Blackbox
        >>> class Gain(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gain = torch.nn.Parameter(torch.tensor(2.0))
        ...     def forward(self, x):
        ...         return torch.tensor([float(self.gain) * value for value in x.tolist()])
        >>> gain = Blackbox(Gain())
        >>> gain(torch.tensor([1.0, 2.0])).sum().backward()
        >>> round(gain.module.gain.grad.item(), 3), gain.nfev
        (3.0, 2)

    The module runs without gradients, on copies of its inputs, hooks and all; it may call ``.numpy()``, change what it
    is given and return the same buffer every time. Where its place in a model has to keep its name and its state_dict
    keys, use `bind` or `FiniteDifferenceGradients` instead.

    Args:
        module_or_fn: an nn.Module, or a function of tensors.
        estimator: how the gradient is estimated; central differences by default, "auto" as in `blackbox`.
        executor: where the evaluations run, as in `blackbox`.
        in_dims: the batch axis of each positional argument whose rows are independent, as in `blackbox`.
        out_dims: the batch axis of the outputs, where in_dims is given.
        numpy: hand the function numpy arrays, as `blackbox` does; for functions only.
        repeatable: False for what is noisy by nature, as in `blackbox`.
        vectorized: False for what takes one row, as in `blackbox`. On a pool a module is evaluated on copies then, and
            what it changes in itself is not kept.
        progress: show a bar where a gradient takes longer than 2 s, as in `blackbox`.
        certify: estimate the error of some gradients, as in `blackbox`.
        count: where to count evaluations and seconds.
        evaluator: the old name of `executor`.

    Raises:
        TypeError: module_or_fn is not callable, or is a ScriptModule.
        ValueError: numpy is asked for with a module.
    """

    def __init__(
        self,
        module_or_fn: Callable[..., Any],
        *,
        estimator: Estimator | Literal["auto"] | None = None,
        executor: Executor | Pool | None = None,
        in_dims: Any = None,
        out_dims: int | Sequence[int | None] | None = 0,
        numpy: bool = False,
        dtype: torch.dtype | None = None,
        repeatable: bool = True,
        vectorized: bool = True,
        progress: bool = False,
        certify: int | Certify | None = None,
        count: EvaluationCount | None = None,
        evaluator: Executor | None = None,
    ) -> None:
        super().__init__()
        if not callable(module_or_fn):
            raise TypeError(
                f"module_or_fn must be a torch.nn.Module or a function, got {module_or_fn!r} of type "
                f"{type(module_or_fn).__name__}: there is nothing to evaluate; pass it itself, not what it returns"
            )
        self._options = make_options(
            estimator=estimator,
            executor=executor,
            in_dims=in_dims,
            out_dims=out_dims,
            numpy=numpy,
            dtype=dtype,
            repeatable=repeatable,
            vectorized=vectorized,
            progress=progress,
            certify=certify,
            evaluator=evaluator,
        )
        self._chosen = estimator
        self.count = EvaluationCount() if count is None else count
        self.module: nn.Module | None = None
        self._numpy = numpy
        if isinstance(module_or_fn, nn.Module):
            if numpy:
                raise ValueError("numpy=True is for functions of arrays; a module is handed tensors, leave it out")
            _refuse_script(module_or_fn)
            self.module = module_or_fn
        else:
            self.fn = module_or_fn
        self._facts = Facts(name_of(module_or_fn))

    @property
    def nfev(self) -> int:
        """Evaluations spent on gradients so far."""
        return self.count.nfev

    @property
    def seconds(self) -> float:
        """Time spent in those evaluations."""
        return self.count.seconds

    @property
    def certificate(self) -> Certificate | None:
        """How far off the last gradient was that was certified."""
        found: Certificate | None = self._facts.certificate
        return found

    def report(self) -> str:
        """What gradients have cost, which steps were measured and what was verified, to be printed."""
        label = type(self.module).__name__ if self.module is not None else name_of(self.fn)
        return report_of(label, self._options, self._facts, self.count)

    @outside_compiled_code
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The value of the module or function, with a ``grad_fn`` that evaluates it again."""
        if self.module is None:
            flat = FlatCall(self.fn, args, kwargs, numpy=self._numpy)
        else:
            captured = Captured(*ModuleState.of(self.module), self.module)
            flat = FlatCall(call_module, args, kwargs, label=type(self.module).__name__, captured=captured)
        self._facts.name_closed(flat.label, flat.closed)
        return called(Record(flat, self._options, self.count, self._facts))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self._facts.state_dict()
        if state["memories"] or not isinstance(self._options.estimator.directions, Coordinates):
            destination[prefix + _STATE] = state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state = state_dict.pop(prefix + _STATE, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if state is not None:
            self._facts.load_state_dict(state)

    def extra_repr(self) -> str:
        """The function, where there is one, and the estimator."""
        function = [] if self.module is not None else [getattr(self.fn, "__name__", repr(self.fn))]
        chosen = [] if self._chosen is None else [f"estimator={self._chosen}"]
        return ", ".join(function + chosen)


def _refuse_script(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            "module is a ScriptModule, whose forward cannot be run with other tensors in the place of its parameters; "
            "use the Python module that it was made of"
        )
