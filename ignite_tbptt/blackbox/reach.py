"""Which leaves of the autograd graph a tensor depends on, and on which of those a gradient would survive.

Every source (a parameter, an input) has a bit; the bits of a node are those of its parents, so that one visit to every
node answers all questions about a forward pass. `cuts` asks them at each module and at each call it watches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ignite_tbptt import nest

__all__ = ["Bits", "Reach", "carries_gradient", "is_dead_node"]

# The derivatives of these are zero everywhere, or missing (the last).
_DEAD_NODES = ("Round", "Sign", "Sgn", "Floor", "Ceil", "Trunc", "Bernoulli", "torch::autograd::NotImplemented")


def carries_gradient(tensor: Tensor) -> bool:
    """Whether the dtype can require grad at all."""
    return tensor.is_floating_point() or tensor.is_complex()


@dataclass(frozen=True)
class Bits:
    """Which sources a tensor depends on: through any path, and through paths on which a gradient survives."""

    any: int = 0
    live: int = 0


class Reach:
    """Answers which sources a tensor depends on; every node of the graph is visited once."""

    def __init__(self, sources: dict[str, Tensor]) -> None:
        self.names = list(sources)
        self._leaf_bit: dict[int, int] = {}
        # Holding the node objects keeps them alive, so that a key is never the address of a dead one.
        self._known: dict[Any, Bits] = {}
        for index, tensor in enumerate(sources.values()):
            if tensor.grad_fn is None:
                self._leaf_bit[id(tensor)] = 1 << index
            else:
                self._known[tensor.grad_fn] = Bits(1 << index, 1 << index)
        self._kept = sources

    def of(self, value: Any) -> Bits:
        """The sources that the tensors in a nest depend on."""
        through_any = live = 0
        for tensor in nest.tensors(value):
            bits = self._of_tensor(tensor)
            through_any, live = through_any | bits.any, live | bits.live
        return Bits(through_any, live)

    def named(self, bits: int) -> tuple[str, ...]:
        """The names of the sources in ``bits``."""
        return tuple(name for index, name in enumerate(self.names) if bits >> index & 1)

    def _of_tensor(self, tensor: Tensor) -> Bits:
        if not tensor.requires_grad:
            return Bits()
        if tensor.grad_fn is None:
            bit = self._leaf_bit.get(id(tensor), 0)
            return Bits(bit, bit)
        # Depth first without recursion: graphs of recurrent models are deeper than Python's stack.
        pending = [tensor.grad_fn]
        while pending:
            node = pending[-1]
            if node in self._known:
                pending.pop()
                continue
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            unknown = [parent for parent in parents if parent not in self._known]
            if unknown:
                pending.extend(unknown)
                continue
            self._known[node] = self._joined(node, parents)
            pending.pop()
        return self._known[tensor.grad_fn]

    def _joined(self, node: Any, parents: list[Any]) -> Bits:
        variable = getattr(node, "variable", None)
        through_any = live = self._leaf_bit.get(id(variable), 0) if variable is not None else 0
        for parent, passes in zip(parents, _passes(node, len(parents)), strict=True):
            through_any |= self._known[parent].any
            live |= self._known[parent].live if passes else 0
        return Bits(through_any, 0 if is_dead_node(node) else live)


def is_dead_node(node: Any) -> bool:
    """Whether a ``grad_fn`` has a derivative that is zero everywhere (rounding, sign) or is not implemented."""
    name = node.name()
    if name.startswith("DivBackward"):
        return getattr(node, "_saved_rounding_mode", None) is not None
    return _is_dead_name(name)


@functools.cache
def _is_dead_name(name: str) -> bool:
    return any(name == dead or name.startswith(dead + "Backward") for dead in _DEAD_NODES)


def _passes(node: Any, parents: int) -> list[bool]:
    """To which of its parents an autograd Function of the user's own gives a gradient: it is asked, with ones.

    Those of torch and of this package give one to all: asking a checkpoint or a blackbox would cost what they cost. A
    backward that raises tells whoever trains, so that nothing is lost in silence.
    """
    to_all = [True] * parents
    if not isinstance(node, BackwardCFunction) or not hasattr(node, "_input_metadata"):
        return to_all
    if node._forward_cls.__module__.split(".")[0] in ("torch", "ignite_tbptt"):  # type: ignore[attr-defined]
        return to_all
    cotangents = [torch.ones(each.shape, dtype=each.dtype, device=each.device) for each in node._input_metadata]
    try:
        with torch.no_grad():
            given = node.apply(*cotangents)
    except Exception:
        return to_all
    given = given if isinstance(given, tuple) else (given,)
    passes = [gradient is not None for gradient, needed in zip(given, node.needs_input_grad, strict=False) if needed]
    return passes if len(passes) == parents else to_all
