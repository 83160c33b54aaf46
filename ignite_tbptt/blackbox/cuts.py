"""Finds where a model's autograd graph is cut, by watching one forward pass.

Every parameter, and every input that requires grad, is a source with a bit of its own. `reach` says which bits a tensor
depends on; `cut_watch` records which bits each module and each call of torch took in and handed on. Here every source
that was used and does not arrive at the output is attributed to the innermost module call that lost it, whether or not
a call of torch explains the loss. `cut_report` prints the findings; `handler` binds finite differences to the modules
in which values leave torch.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ignite_tbptt import nest
from ignite_tbptt.blackbox.cut_report import CutCall, CutKind, GraphCut, GraphCutReport
from ignite_tbptt.blackbox.cut_watch import CallRecord, CallWatch, Event, ForwardWatch
from ignite_tbptt.blackbox.module_state import attributes_kept
from ignite_tbptt.blackbox.reach import Reach, carries_gradient
from ignite_tbptt.random_streams import random_streams_kept

__all__ = ["find_graph_cuts", "is_compiled", "unwrapped"]

_Model = TypeVar("_Model", bound=Callable[..., Any])


def find_graph_cuts(model: Callable[..., Any], /, *inputs: Any, **kwargs: Any) -> GraphCutReport:
    """Find the modules and source lines in which gradients get lost.

    Example::

        >>> import torch
        >>> from ignite_tbptt.blackbox import find_graph_cuts
        >>> class Actuator(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.tensor([round(value, 1) for value in x.tolist()])
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), Actuator())
        >>> report = find_graph_cuts(model, torch.ones(2))
        >>> print(report.modules, report[0].calls[0].label)
        ['1'] .tolist()

    The model runs once, with gradients enabled and in the train/eval mode it is in. Its parameters, buffers, attributes
    and the random streams of torch, numpy and ``random`` are afterwards as they were; objects that its ``forward``
    changes inside, such as a list it appends to, are not. A model that is wrapped in DistributedDataParallel,
    DataParallel or ``torch.compile`` is watched inside its wrapper, and named from there. The backward of an autograd
    Function of your own runs once, to see which of its inputs it gives a gradient.

    What is followed: parameters that require grad and are used in this pass, and inputs that require grad. Where there
    are neither, the floating-point inputs are followed as if they did. What was used and reaches no output is reported,
    whether or not a call explains it: a branch whose result is dropped, or kept on ``self``, is reported as well.

    Args:
        model: a module, or any function of tensors.
        inputs: positional arguments of one forward pass, tensors or nests of them.
        kwargs: keyword arguments of that pass.

    Returns:
        A list of `GraphCut`, innermost module first, empty where every gradient arrives; print it to read it.

    Raises:
        TypeError: model is not callable.
        ValueError: there is nothing that a gradient could reach.
    """
    if not callable(model):
        raise TypeError(f"model must be a module or a function, got {model!r} of type {type(model).__name__}")
    model = unwrapped(model)
    inputs, kwargs, sources = _sources(model, inputs, kwargs)
    watch = ForwardWatch(Reach(sources), _module_names(model))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_nothing_left_behind(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(watch.hooks(model))
        stack.enter_context(CallWatch(watch))
        outputs = _run(model, watch, inputs, kwargs)
    return _report(watch, outputs)


def unwrapped(model: _Model) -> _Model:
    """The model inside DistributedDataParallel, DataParallel and ``torch.compile``."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was applied to the model or to a module in it."""
    return any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in model.modules())


def _module_names(model: Callable[..., Any]) -> dict[int, str]:
    if not isinstance(model, nn.Module):
        return {}
    return {id(module): name for name, module in model.named_modules()}


def _sources(
    model: Callable[..., Any], inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
    """Name everything that should receive a gradient."""
    named = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
    parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    def wanted() -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        labelled = [(_told(model, index), value) for index, value in enumerate(inputs)]
        for label, value in labelled + [(f"input {name!r}", value) for name, value in kwargs.items()]:
            required = [tensor for tensor in nest.tensors(value) if tensor.requires_grad]
            # a nest of several tensors is one argument: number what is inside it
            seen |= {f"{label} ({k})" if k > 1 else label: tensor for k, tensor in enumerate(required, 1)}
        return seen

    sources = parameters | wanted()
    if not sources:
        inputs, kwargs = nest.map_tensors(_requiring_grad, (inputs, kwargs))
        sources = wanted()
    if not sources:
        raise ValueError(
            "nothing here can receive a gradient: no parameter requires grad and no input is a floating-point tensor; "
            f"{len(named)} parameters are frozen. Call model.requires_grad_() or pass an input that requires grad"
        )
    return inputs, kwargs, sources


def _told(model: Callable[..., Any], index: int) -> str:
    """What a positional argument is called: by its name, where the signature has one."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # functions of other languages have none
        return f"input {index}"
    names = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return f"input {names[index]!r}" if index < len(names) else f"input {index}"


def _requiring_grad(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_() if carries_gradient(tensor) else tensor


def _run(model: Callable[..., Any], watch: ForwardWatch, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        # the hooks of the model itself open and close the record of the whole
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return torch.func.functional_call(model, buffers, inputs, kwargs)
    call = watch.enter("", model, (inputs, kwargs))
    outputs = model(*inputs, **kwargs)
    watch.leave(call, outputs)
    return outputs


@contextlib.contextmanager
def _nothing_left_behind(model: Callable[..., Any]) -> Iterator[None]:
    """Keep random streams, attributes and gradients, run compiled modules eagerly, and do not warn of conversions."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    gradients = [parameter.grad for parameter in parameters]
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_streams_kept())
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # a backward inside the forward must not add to it
            stack.callback(setattr, parameter, "grad", gradient)
            parameter.grad = None
        if isinstance(model, nn.Module):
            stack.enter_context(attributes_kept(model))
            if is_compiled(model) and hasattr(torch.compiler, "set_stance"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True")
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        yield


def _report(watch: ForwardWatch, outputs: Any) -> GraphCutReport:
    root = watch.root
    assert root is not None
    arrived, findings = root.left.live, _Findings()
    explained = _explain(root, arrived, findings)
    _attribute(root, _used(root) & ~arrived & ~explained, findings)
    named = watch.reach.named
    return GraphCutReport(
        GraphCut(
            module=path,
            module_type=finding.type_name,
            kind=kind,
            lost=named(finding.lost),
            partial=named(finding.lost & arrived),
            calls=finding.told(),
            is_function=root.is_function,
            stopped=named(finding.stopped),
            moved=finding.moved,
            leaving=finding.leaving,
        )
        for (path, kind), finding in findings.items()
    )


@dataclass(eq=False)
class _Finding:
    """What the calls of one module, taken together, lost in one way."""

    type_name: str
    lost: int = 0
    stopped: int = 0
    moved: int = 0
    leaving: int = 0
    calls: dict[tuple[str, tuple[str, int]], tuple[int, CutCall]] = field(default_factory=dict)

    def told(self) -> tuple[CutCall, ...]:
        return tuple(call for _, call in sorted(self.calls.values(), key=lambda ranked: ranked[0]))


class _Findings(dict[tuple[str, CutKind], _Finding]):
    """Findings by module and kind."""

    def add(self, call: CallRecord, lost: int) -> None:
        """Take in what one call of a module lost."""
        dead = lost & call.left.any
        kinds = {CutKind.UNREACHABLE: lost & ~dead, CutKind.ZERO_GRADIENT: dead}
        for kind, bits in kinds.items() if call.gives_grad else [(CutKind.NO_GRAD_FN, lost)]:
            if bits:
                self._add(call, kind, bits)

    def _add(self, call: CallRecord, kind: CutKind, lost: int) -> None:
        finding = self.setdefault((call.path, kind), _Finding(call.type_name))
        finding.lost |= lost
        finding.moved = max(finding.moved, call.moved)
        finding.leaving = max(finding.leaving, sum(call.leaving.values()))
        left_torch = stopped = 0
        for event in call.events:
            left_torch |= event.lost if event.leaves_torch else 0
            stopped |= event.lost if event.stops else 0
        finding.stopped |= lost & stopped & ~left_torch
        for event in _witnesses(call.events, lost):
            known = finding.calls.get((event.name, event.site))
            if known is None or event.leaves_torch:
                finding.calls[event.name, event.site] = event.rank, event.call


def _explain(call: CallRecord, arrived: int, findings: _Findings) -> int:
    """Attribute what is seen to be lost to the innermost calls; returns the bits accounted for in this call and below.

    A module that returns no floating-point tensor cannot carry a gradient whatever is done to it, and one that its
    caller ran without gradients is not at fault: both leave the matter, and their events, to the caller.
    """
    explained = 0
    for child in call.children:
        explained |= _explain(child, arrived, findings)
    if not _answers(call):
        assert call.parent is not None
        call.parent.events.extend(call.events)
        call.parent.leaving |= call.leaving
        return explained
    severed = not call.gives_grad
    lost = 0
    for event in call.events:
        lost |= event.lost
    # What went in and was not seen to be read may have been meant to be ignored, unless nothing at all came through.
    lost = (lost | (call.entered if severed and call.gives_float else 0)) & ~call.left.live & ~explained
    if not severed:
        lost &= ~arrived
    findings.add(call, lost)
    return explained | lost


def _attribute(call: CallRecord, lost: int, findings: _Findings) -> int:
    """Attribute what was used and does not arrive, no call says why, to the last call that had it and lost it."""
    own = lost & _used(call) & ~call.left.live
    found = 0
    for child in reversed(call.children):
        found |= _attribute(child, own & ~found, findings)
    if not _answers(call):
        return found
    findings.add(call, own & ~found)
    return own


def _answers(call: CallRecord) -> bool:
    return (call.gives_float and call.grad_enabled) or call.parent is None


def _used(call: CallRecord) -> int:
    bits = call.used
    for child in call.children:
        bits |= _used(child)
    return bits


def _witnesses(events: list[Event], lost: int) -> list[Event]:
    """For every lost bit the most telling calls that read it; the others are bystanders."""
    best: list[Event] = []
    for wanted in range(3):
        best += [event for event in events if event.rank == wanted and event.lost & lost]
        for event in events:
            if event.rank == wanted:
                lost &= ~event.lost
    return best
