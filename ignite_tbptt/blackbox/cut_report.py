"""What a cut in the autograd graph looks like to the person who has to mend it.

A `GraphCut` joins four answers: what lost its gradient (a module and the parameters upstream of it), how (the output
has no ``grad_fn``, or a parameter cannot be reached from it, or only through a function with derivative zero), where
(the calls that left the graph, with file, line and source text) and what finite differences would cost. The facts are
gathered by `cuts`, which is the only maker of these objects; this module names, orders and prints them.
"""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from enum import Enum

__all__ = ["CutCall", "CutKind", "GraphCut", "GraphCutReport"]


class CutKind(Enum):
    """How a gradient was lost; the value is the sentence that the report prints."""

    NO_GRAD_FN = "its output has no grad_fn, backward() ends there"
    UNREACHABLE = "its output has a grad_fn, but no path leads from it to what is lost"
    ZERO_GRADIENT = "every path to what is lost has derivative zero or none"


_UNSEEN = {
    CutKind.NO_GRAD_FN: "cut by a call that torch's Python interface does not show",
    CutKind.UNREACHABLE: "no call shows why: what was computed goes into no output, or went on by a way that torch's "
    "Python interface does not show (nn.Parameter(tensor), an extension, an autograd Function that returns None)",
    CutKind.ZERO_GRADIENT: "no call shows why",
}

# Display text and remedy of the calls that people meet; the rest are named as torch names them.
_BLACKBOX = "take finite differences: {blackbox}"
_KEEP_TENSOR = "compute with the tensor instead of its Python value; where that cannot be, " + _BLACKBOX
_NUMPY = "write it with torch functions, or " + _BLACKBOX
_STOP = "leave it out where the gradient is wanted; if the next lines leave torch, " + _BLACKBOX
_STACK = "torch.stack([...]) keeps the graph; where the values come from outside torch, " + _BLACKBOX
_GRAD_MODE = "move this line out of torch.no_grad() (or of torch.inference_mode(), set_grad_enabled(False))"
_STEP_FUNCTION = (
    "use a smooth or straight-through version, or finite differences with a step wider than the jumps: {blackbox}"
)
_INDEX = "an index or a mask has no gradient: use a soft version (softmax, sigmoid), or " + _STEP_FUNCTION

_KNOWN_CALLS = {
    "item": (".item()", _KEEP_TENSOR),
    "__float__": ("float(tensor)", _KEEP_TENSOR),
    "__int__": ("int(tensor)", _KEEP_TENSOR),
    "__complex__": ("complex(tensor)", _KEEP_TENSOR),
    "__index__": ("using a tensor as an index", _INDEX),
    "__bool__": ("bool(tensor)", _INDEX),
    "__format__": ("formatting a tensor into a string", _KEEP_TENSOR),
    "tolist": (".tolist()", _KEEP_TENSOR),
    "numpy": (".numpy()", _NUMPY),
    "__array__": ("numpy.asarray(tensor)", _NUMPY),
    "detach": (".detach()", _STOP),
    "detach_": (".detach_()", _STOP),
    "data": (".data", _STOP),
    "tensor": ("torch.tensor(...)", _STACK),
    "as_tensor": ("torch.as_tensor(...)", _STACK),
    "new_tensor": (".new_tensor(...)", _STACK),
    "no_grad": ("gradients being switched off", _GRAD_MODE),
    "grad": ("torch.autograd.grad(...)", "pass create_graph=True"),
}


@dataclass(frozen=True)
class CutCall:
    """One call that left the autograd graph.

    Attributes:
        name: the function's name as torch knows it, such as ``"item"``, ``"detach"`` or ``"round"``.
        file: path of the source file.
        line: line number in it, from 1.
        zero_gradient: the call keeps a ``grad_fn`` whose derivative is zero (or that has no derivative).
        integral: the call gives indices, masks or integers.
        leaves_torch: the value went on to Python or another library before its module returned.
    """

    name: str
    file: str
    line: int
    zero_gradient: bool = False
    integral: bool = False
    leaves_torch: bool = False

    @property
    def label(self) -> str:
        """The call as a reader would write it, e.g. ``.item()``."""
        known = _KNOWN_CALLS.get(self.name)
        return known[0] if known else f"{self.name}()"

    @property
    def source(self) -> str:
        """The source line, stripped; empty where Python has no source text (code run by ``exec``)."""
        return linecache.getline(self.file, self.line).strip()

    def remedy(self, blackbox: str) -> str:
        """What to do about this call, with ``blackbox`` as the ways to differentiate it as it is."""
        if self.zero_gradient:
            return _STEP_FUNCTION.format(blackbox=blackbox)
        known = _KNOWN_CALLS.get(self.name)
        text = known[1] if known else _INDEX if self.integral else _NUMPY
        return text.format(blackbox=blackbox)


@dataclass(frozen=True)
class GraphCut:
    """A module call in which gradients are lost.

    Attributes:
        module: path of the innermost module in which the graph is cut, as in ``model.named_modules()``; ``""`` is the
            model itself.
        module_type: the name of its class, or of the function.
        kind: how the gradient is lost.
        lost: names of the parameters (as in ``model.named_parameters()``) and of the inputs (``"input 0"``) whose
            gradient does not come through this module.
        partial: those among ``lost`` that still receive a gradient by another path, so that what they receive is not
            None but incomplete.
        calls: the calls that cut, most telling first; empty where no call through torch's Python interface was seen
            (compiled extensions, an autograd Function without a gradient).
        is_function: what was watched is a function, not a module.
        stopped: those among ``lost`` that never left torch here: ``detach()`` or ``no_grad()`` stopped their gradient,
            which may be meant (a target network). Finite differences on the module would undo it.
        moved: how many numbers finite differences on this module would move in one call: its parameters and inputs.
        leaving: how many numbers leave torch in it in one call; 0 where that was not seen.
    """

    module: str
    module_type: str
    kind: CutKind
    lost: tuple[str, ...]
    partial: tuple[str, ...]
    calls: tuple[CutCall, ...]
    is_function: bool = False
    stopped: tuple[str, ...] = ()
    moved: int = 0
    leaving: int = 0

    @property
    def leaves_torch(self) -> bool:
        """Whether values leave torch here, by a call that was seen or, where nothing comes out, by one that was not."""
        unseen = self.kind is CutKind.NO_GRAD_FN and not self.calls
        return self.kind is not CutKind.ZERO_GRADIENT and (unseen or any(call.leaves_torch for call in self.calls))

    @property
    def cost(self) -> str:
        """What the two remedies cost in evaluations, where both can be told; else empty."""
        if not (self.leaving and self.leaves_torch) or self.is_function:
            return ""
        less = "the lines cost less" if self.leaving < self.moved else "the module costs less"
        return (
            f"{2 * self.moved} evaluations a call by central differences on the module ({self.moved} parameters and "
            f"inputs), {2 * self.leaving} by @blackbox on the lines that leave torch (values: {self.leaving}); "
            f"{less}"
        )

    @property
    def remedy(self) -> str:
        """What to do, in one sentence."""
        if self.is_function:
            name = self.module_type if self.module_type.isidentifier() else "fn"
            blackbox = f"blackbox({name}), from ignite_tbptt.blackbox"
        else:
            chosen = f"'{self.module}'" if self.module else "model"
            blackbox = (
                f"FiniteDifferenceGradients(model, modules=[{chosen}]).attach(trainer), or blackbox(fn) around these "
                "lines, both from ignite_tbptt.blackbox"
            )
        if self.calls:
            return self.calls[0].remedy(blackbox)
        dropped = "" if self.kind is CutKind.NO_GRAD_FN else "let the output depend on it; where it does, "
        return dropped + _BLACKBOX.format(blackbox=blackbox)

    def __str__(self) -> str:
        where = "the function" if self.is_function else f"module '{self.module}'" if self.module else "the model itself"
        lines = [f"{where} ({self.module_type}): {self.kind.value}"]
        if self.lost:
            lines.append(f"    gradient lost for: {_shortened(self.lost)}")
        if self.partial:
            lines.append(f"    of these, reached by another path (gradient incomplete): {_shortened(self.partial)}")
        if self.stopped:
            lines.append(f"    of these, stopped without leaving torch, on purpose perhaps: {_shortened(self.stopped)}")
        for call in self.calls:
            lines.append(f"    cut at {call.file}:{call.line} by {call.label}")
            if call.source:
                lines.append(f"        {call.source}")
        if not self.calls:
            lines.append(f"    {_UNSEEN[self.kind]}")
        lines.append(f"    remedy: {self.remedy}")
        if self.cost:
            lines.append(f"    cost: {self.cost}")
        return "\n".join(lines)


class GraphCutReport(list[GraphCut]):
    """The cuts of one forward pass, innermost first: a list that prints as a report."""

    def __str__(self) -> str:
        if not self:
            return "no cut found: every parameter used in this forward pass is reached from its output"
        one = len(self) == 1
        head = "1 cut in the autograd graph" if one else f"{len(self)} cuts in the autograd graph, innermost first"
        return "\n".join([head, *(f"{number}. {cut}" for number, cut in enumerate(self, start=1))])

    @property
    def modules(self) -> list[str]:
        """Paths of the modules in which the graph is cut, innermost first, each once."""
        return list(dict.fromkeys(cut.module for cut in self))

    @property
    def to_bind(self) -> list[str]:
        """Paths of the modules that finite differences mend, those in which values leave torch and nothing is undone.

        A module in which a gradient was stopped without leaving torch is not among them, nor one around it.
        """
        stopped = [cut.module for cut in self if cut.stopped]
        found = dict.fromkeys(cut.module for cut in self if cut.leaves_torch)
        return [
            path for path in found if not any(path in ("", other) or other.startswith(path + ".") for other in stopped)
        ]


def _shortened(names: tuple[str, ...], limit: int = 8) -> str:
    if len(names) <= limit:
        return ", ".join(names)
    return ", ".join(names[:limit]) + f" and {len(names) - limit} more"
