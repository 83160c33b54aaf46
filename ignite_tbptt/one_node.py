"""A call that is one node of the graph: it keeps no more than its arguments, and makes its own graph in backward.

torch.utils.checkpoint leaves the graph of a call in place and takes every tensor that it saves through Python, three
times. Where operations are small, a GRU on the CPU, that costs more than the operations. Here the graph is dropped as a
whole and made again as a whole.

The price: whatever the graph leads to has to be known, for it gets its gradient through the node. So the graph is
looked at after the call. `recompute` takes a node where it ends in the call's arguments and in parameters, and leaves
the rest to torch.utils.checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ignite_tbptt import nest

# Reentrant checkpoints refuse to run in torch.autograd.grad; the other ends DistributedDataParallel's backward pass.
_UNFIT = {"CheckpointFunctionBackward", "_DDPSinkBackward"}


@dataclass(frozen=True)
class Graph:
    """What hangs on the results of a run, as far as the tensors that it was given.

    Attributes:
        leaves: the tensors without a history that it ends in, but for those that the run was given.
        nodes: how many operations and leaves it has.
        closed: the operations are all of this run, and may be run for the gradient of some tensors alone.
    """

    leaves: tuple[Tensor, ...]
    nodes: int
    closed: bool

    def like(self, other: Graph) -> bool:
        """Say whether two runs have done the same."""
        return (self.nodes, self.closed, set(self.leaves)) == (other.nodes, other.closed, set(other.leaves))


@dataclass(frozen=True)
class Run:
    """What one run of a call has left behind.

    Attributes:
        results: what the function returned.
        differentiable: the tensors of it that require grad.
        inputs: the tensors that require grad that it was given.
        first: the sequence number of the first operation that it recorded.
        recorded: how many it recorded, those not for its results included.
    """

    results: Any
    differentiable: list[Tensor]
    inputs: list[Tensor]
    first: int
    recorded: int

    def graph(self) -> Graph:
        """Walk the graph of the results."""
        with torch.enable_grad():  # without it torch 2.4 finds no edge to a leaf
            given = {(edge.node, edge.output_nr) for edge in map(get_gradient_edge, self.inputs)}
            edges: list[tuple[Node | None, int]] = [
                (edge.node, edge.output_nr) for edge in map(get_gradient_edge, self.differentiable)
            ]
        seen: set[Node] = set()
        leaves: list[Tensor] = []
        closed = True
        while edges:
            edge = edges.pop()
            node = edge[0]
            if node is None or node in seen:
                continue
            below = node.next_functions
            if below and node._sequence_nr() >= self.first:
                seen.add(node)
                edges.extend(below)
            elif edge not in given:
                seen.add(node)
                closed = closed and not below
                if hasattr(node, "variable"):
                    leaves.append(node.variable)
        return Graph(tuple(leaves), len(seen), closed and _UNFIT.isdisjoint(type(node).__name__ for node in seen))


class Call:
    """A call of a function, which can be run again.

    Args:
        function: what is called.
        args: with what. Of the tensors that require grad the function gets copies: it may write into them.
        again: makes a context in which the random numbers, and whatever else the function reads, are as they are now.
    """

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], again: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.function = function
        self.args = args
        self.again = again
        # Views, for an edge in the graph that is theirs alone: an initial state may be a parameter of the model, too.
        self.inputs = [tensor.view_as(tensor) for tensor in _differentiable(args)]

    def run(self, inputs: list[Tensor]) -> Run:
        """Run the function with `inputs` in the places of the arguments that require grad."""
        left = iter(inputs)

        def stand_in(tensor: Tensor) -> Tensor:
            return next(left).clone() if tensor.requires_grad else tensor

        first = _sequence_number()
        args = [nest.map_tensors(stand_in, arg) if _differentiable(arg) else arg for arg in self.args]
        results = self.function(*args)
        return Run(results, _differentiable(results), inputs, first, _sequence_number() - first)


def in_one_node(call: Call, run: Run, graph: Graph) -> Any:
    """Return the results of a call, whose graph is a single node that leads to its inputs and to the leaves."""
    sources = *call.inputs, *graph.leaves
    outputs = iter(_Node.apply(call, run.recorded, graph, run.differentiable, *sources))  # type: ignore[no-untyped-call]
    return nest.map_tensors(lambda tensor: next(outputs) if tensor.requires_grad else tensor, run.results)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, recorded: int, graph: Graph, results: list[Tensor], *sources: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.recorded, ctx.graph = call, recorded, graph
        ctx.save_for_backward(*sources)  # the leaves, too: autograd complains if a step has changed them meanwhile
        return tuple(result.detach() for result in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of a segment that is run again has no graph of its own: create_graph=True needs a "
                "trainer without checkpoint_segments."
            )
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)  # a later segment made nothing of its state
        call, graph = ctx.call, ctx.graph
        values = ctx.saved_tensors[: len(call.inputs)]
        with call.again(), torch.enable_grad():
            run = call.run([value.detach().requires_grad_() for value in values])
        if run.recorded != ctx.recorded or len(run.differentiable) != len(gradients):
            # compilers, say, record more when they are called first
            _require_same(run.graph(), graph)
        needed = ctx.needs_input_grad[4:]
        found = torch.autograd.grad(
            [result for result, gradient in zip(run.differentiable, gradients, strict=True) if gradient is not None],
            [source for source, need in zip((*run.inputs, *graph.leaves), needed, strict=True) if need],
            [gradient for gradient in gradients if gradient is not None],
            allow_unused=True,
        )
        if any(gradient is None for gradient in found):
            _require_same(run.graph(), graph)  # it may have gone through as many operations, of other parameters
        left = iter(found)
        return None, None, None, None, *(next(left) if need else None for need in needed)


def _require_same(second: Graph, first: Graph) -> None:
    if not second.like(first):
        raise RuntimeError(
            f"a segment that is run again for its gradient has a graph of {second.nodes} nodes with "
            f"{len(second.leaves)} parameters, and had one of {first.nodes} with {len(first.leaves)}"
            f"{'' if set(second.leaves) == set(first.leaves) else ', not the same ones'}: the model and "
            "loss_fn must do the same both times, but for the random numbers of torch. Leave out checkpoint_segments "
            "where they cannot."
        )


def _differentiable(node: Any) -> list[Tensor]:
    return [tensor for tensor in nest.tensors(node) if tensor.requires_grad]


def _sequence_number() -> int:
    """Return the number of an operation recorded here and now: those of this thread are counted up."""
    return torch.empty(0, requires_grad=True).view(0).grad_fn._sequence_nr()  # type: ignore[union-attr]
