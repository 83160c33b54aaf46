"""Activation checkpointing of segments: the forward pass is run again in backward, from where it started.

A segment keeps its arguments, and its activations are made again when backward comes to it. The second run starts from
the random numbers, the autocast state and the attributes and buffers that the first run started from, and leaves none
of them changed. Its results are compared with those of the first.

A segment is one node of the graph. torch.utils.checkpoint takes every tensor that a graph saves through Python, which
for a GRU on the CPU costs more than the operations; it is used where one node does not do: parameters with hooks,
attributes that carry a graph from segment to segment, gradients that belong to anything but parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ignite_tbptt import nest
from ignite_tbptt.model_state import GENERATORS, ModelState, library_buffers, parameters_of
from ignite_tbptt.random_streams import RandomStreams

_KINDS = ("cpu", "cuda")  # devices whose random numbers are replayed here
# Reentrant checkpoints refuse to run in torch.autograd.grad; the other ends DistributedDataParallel's backward pass.
_UNFIT = {"CheckpointFunctionBackward", "_DDPSinkBackward"}


class Recompute:
    """Calls a segment now and, for its gradient, once more in backward.

    Example:
        ::

            recompute = Recompute(model, loss_fn)
            y_pred, hidden, loss = recompute(run_segment, x, y, hidden, count)

    Args:
        roots: the callables that a segment runs, whose attributes and buffers are put back.
    """

    def __init__(self, *roots: Any) -> None:
        self._roots = roots
        self._state: ModelState | None = None
        self._parameters: dict[Tensor, str] = {}
        self._fits_one_node = True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_state": None, "_parameters": {}}

    def __call__(self, function: Callable[..., Any], x: Any, y: Any, hidden: Any, *rest: Any) -> Any:
        """Return ``function(x, y, hidden, *rest)``, whose graph holds these arguments and the results alone.

        Raises:
            ValueError: the function has written into `x`, `y` or a parameter.
            RuntimeError: in backward: the second run gave something else than the first.
        """
        leaves = (leaf for _, leaf in nest.leaves((x, y, hidden)))
        roots = (
            *self._roots,
            *(leaf for leaf in leaves if not isinstance(leaf, (Tensor, int, float, str, type(None)))),
        )
        self._state = state = ModelState.of(*roots) if self._state is None else self._state.now(*roots)
        if state.lazy or not torch.is_grad_enabled():
            return function(x, y, hidden, *rest)
        streams = RandomStreams.latest()
        if not self._parameters:
            self._parameters = {tensor: name for name, tensor in parameters_of(*self._roots)}
        read_only = {**dict.fromkeys(nest.tensors((x, y)), "the input or the target"), **self._parameters}
        before = _versions(read_only)
        segment = _Segment(function, (x, y, hidden, *rest), _Again(state, streams))
        results = self._run(segment, state)
        for (tensor, name), was, now in zip(read_only.items(), before, _versions(read_only), strict=True):
            if was != now:
                raise ValueError(
                    f"checkpoint_segments: the model or loss_fn has written into a tensor of shape "
                    f"{tuple(tensor.shape)} that it was given, {name}, and would meet what it wrote there when the "
                    "segment is run again for its gradient. Let it work on a copy (x = x * 2, not x *= 2; an embedding "
                    "without max_norm), or leave out checkpoint_segments."
                )
        return results

    def _run(self, segment: _Segment, state: ModelState) -> Any:
        devices = {tensor.device.type for tensor in (*segment.given, *self._parameters)}
        if not self._fits_one_node or not devices.issubset(_KINDS):
            # It looks for devices among the arguments that it is given, and does not see those inside a dataclass. The
            # second run goes to its end, where it is compared with the first.
            with set_checkpoint_early_stop(False):
                return checkpoint(
                    lambda *_: segment.run(segment.inputs)[0],
                    *segment.given,
                    use_reentrant=False,
                    context_fn=lambda: (nullcontext(), segment.again),
                )
        start = _sequence_number()
        torch.clear_autocast_cache()  # its casts lead to parameters past this segment
        results, given = segment.run(segment.inputs)
        recorded = _sequence_number() - start
        torch.clear_autocast_cache()
        outputs = _differentiable(results)
        if not outputs:
            return results
        graph = _Graph(outputs, given, start)
        self._state = now = state.now()
        if (
            graph.closed
            and not (now is not state and now.graphs())
            and all(map(self._is_plain_parameter, graph.leaves))
        ):
            sources = *segment.inputs, *graph.leaves
            ours = iter(_Node.apply(segment, recorded, graph, outputs, *sources))  # type: ignore[no-untyped-call]
            return nest.map_tensors(lambda tensor: next(ours) if tensor.requires_grad else tensor, results)
        # This segment keeps its graph, the next ones are left to torch.utils.checkpoint.
        self._fits_one_node = False
        return results

    def _is_plain_parameter(self, leaf: Tensor) -> bool:
        """Say whether a node can hand a gradient to `leaf` as its own graph would.

        Hooks on it would see the gradient of every segment, besides the sum of them; a subclass may have its own ways.
        """
        if leaf not in self._parameters:
            self._parameters = {tensor: name for name, tensor in parameters_of(*self._roots)}
        return leaf in self._parameters and type(leaf) is torch.nn.Parameter and not leaf._backward_hooks


class _Segment:
    """A call that can be run again, with containers and a state of its own each time: the function may write there."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], again: _Again) -> None:
        self.function, self.args, self.again = function, args, again
        self.given = list(nest.tensors(args))
        # Views, for an edge in the graph that is theirs alone: an initial state may be a parameter of the model, too.
        self.inputs = [tensor.view_as(tensor) for tensor in _differentiable(args)]
        self._kept = {id(tensor): tensor.clone() for tensor in nest.tensors(args[2]) if not tensor.requires_grad}
        self._needs = {id(tensor) for tensor in self.given if tensor.requires_grad}
        self._first: list[Tensor] | None = None

    def run(self, inputs: list[Tensor]) -> tuple[Any, list[Tensor]]:
        """Run the function with `inputs` for the arguments that require grad; return the results and what it got."""
        left, given = iter(inputs), list(inputs)

        def stand_in(tensor: Tensor) -> Tensor:
            if id(tensor) in self._needs:
                return next(left).clone()
            kept = self._kept.get(id(tensor))
            given.append(tensor.detach() if kept is None else kept.clone())
            return given[-1]

        results = self.function(*[nest.map_tensors(stand_in, arg) for arg in self.args])
        found = fingerprint(results)
        if self._first is None:
            self._first = found
        elif not alike(self._first, found):
            raise RuntimeError(
                "checkpoint_segments: a segment that was run again for its gradient gave other results than the first "
                "time. The model or loss_fn keeps a state, or draws random numbers, where they cannot be put back: "
                f"{OUT_OF_REACH}. Return the state as part of the hidden state, or leave out checkpoint_segments."
            )
        return results, given


OUT_OF_REACH = "in an iterator, a file, an extension, another process or the globals of another file, say"


class _Again(AbstractContextManager[None]):
    """The random numbers, the autocast state and the model's state of one moment; may be entered more than once."""

    def __init__(self, state: ModelState, streams: RandomStreams) -> None:
        self._state, self._streams = state, streams
        self._autocast = [
            functools.partial(
                torch.autocast,
                kind,
                dtype=torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                cache_enabled=torch.is_autocast_cache_enabled(),
            )
            for kind in _KINDS
            if kind == "cpu" or torch.cuda.is_available()
        ]
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.callback(torch.clear_autocast_cache)
            if self._streams.have_moved():
                stack.enter_context(self._streams.replayed())
            for context in self._autocast:
                stack.enter_context(context())
            torch.clear_autocast_cache()
            stack.callback(self._state.now().restore)
            self._state.restore()
            self._entered.append(stack.pop_all())

    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().__exit__(*exception)


class _Graph:
    """What hangs on the results of a run.

    Attributes:
        leaves: the tensors without a history that it ends in, but for those that the run was given.
        nodes: how many operations and leaves it has.
        closed: the operations are all of this run, and may be run for the gradient of some tensors alone.
    """

    def __init__(self, outputs: list[Tensor], given: list[Tensor], start: int) -> None:
        with torch.enable_grad():  # without it torch 2.4 finds no edge to a leaf
            known = {(e.node, e.output_nr) for e in map(get_gradient_edge, _differentiable(given))}
            edges: list[Any] = [(e.node, e.output_nr) for e in map(get_gradient_edge, outputs)]
        seen: set[Any] = set()
        self.leaves: list[Tensor] = []
        self.closed = True
        while edges:
            edge = edges.pop()
            node = edge[0]
            if node is None or node in seen:
                continue
            below = node.next_functions
            if below and node._sequence_nr() >= start:
                seen.add(node)
                edges.extend(below)
            elif edge not in known:
                seen.add(node)
                self.closed = self.closed and not below
                if hasattr(node, "variable"):
                    self.leaves.append(node.variable)
        self.nodes = len(seen)
        self.closed = self.closed and _UNFIT.isdisjoint(type(node).__name__ for node in seen)

    def require_same(self, outputs: list[Tensor], given: list[Tensor], start: int) -> None:
        """Refuse a second run that has done something else."""
        second = _Graph(outputs, given, start)
        if (second.nodes, second.closed, set(second.leaves)) != (self.nodes, self.closed, set(self.leaves)):
            raise RuntimeError(
                f"a segment that is run again for its gradient has a graph of {second.nodes} nodes with "
                f"{len(second.leaves)} parameters, and had one of {self.nodes} with {len(self.leaves)}"
                f"{'' if set(second.leaves) == set(self.leaves) else ', not the same ones'}: the model and "
                "loss_fn must do the same both times, but for random numbers. Leave out checkpoint_segments where they "
                "cannot."
            )


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, segment: _Segment, recorded: int, graph: _Graph, results: list[Tensor], *sources: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.segment, ctx.recorded, ctx.graph = segment, recorded, graph
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
        segment, graph = ctx.segment, ctx.graph
        inputs = [value.detach().requires_grad_() for value in ctx.saved_tensors[: len(segment.inputs)]]
        with segment.again, torch.enable_grad():
            start = _sequence_number()
            results, given = segment.run(inputs)
            recorded = _sequence_number() - start
        outputs = _differentiable(results)
        if recorded != ctx.recorded or len(outputs) != len(gradients):
            graph.require_same(outputs, given, start)  # compilers, say, record more when they are called first
        needed = ctx.needs_input_grad[4:]
        found = torch.autograd.grad(
            [output for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None],
            [source for source, need in zip((*inputs, *graph.leaves), needed, strict=True) if need],
            [gradient for gradient in gradients if gradient is not None],
            allow_unused=True,
        )
        if any(gradient is None for gradient in found):  # as many operations, it may be, of other parameters
            graph.require_same(outputs, given, start)
        left = iter(found)
        return None, None, None, None, *(next(left) if need else None for need in needed)


def fingerprint(results: Any) -> list[Tensor]:
    """Return a norm and a random projection of every tensor, which tell whether a second run gave the same values.

    The values themselves would take the memory that recomputing saves. The projection changes with a sign, an order or
    a single element.
    """
    found = []
    with torch.no_grad():
        for tensor in nest.tensors(results):
            flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().reshape(-1)
            flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
            eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else torch.finfo(flat.dtype).eps
            tolerance = eps**0.5 if eps < 1e-4 else 4 * eps  # some operations of a GPU add in an order of their own
            norm = torch.linalg.vector_norm(flat)
            found.append(torch.stack([norm, flat @ _directions(len(flat), flat.dtype, flat.device), norm * tolerance]))
    return found


def alike(first: list[Tensor], second: list[Tensor]) -> bool:
    """Say whether two fingerprints are of the same values, up to rounding."""
    return len(first) == len(second) and all(
        torch.allclose(was[:2], now[:2], rtol=0.0, atol=float(torch.nan_to_num(was[2])) + 1e-30, equal_nan=True)
        for was, now in zip(first, second, strict=True)
    )


@functools.lru_cache(maxsize=8)
def _directions(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=dtype).add_(0.5).to(device)


class RerunCheck:
    """Notices, where time steps are run more than once, that a model keeps a state that is not rewound with `hidden`.

    The first prefix is run twice from the same hidden state. Where the results differ, the second run has met what the
    first left behind.
    """

    def __init__(self, *roots: Any) -> None:
        self._roots, self._done = roots, False

    def __call__(self, function: Callable[..., Any], x: Any, y: Any, hidden: Any, *rest: Any) -> None:
        """Run ``function(x, y, hidden, *rest)`` twice, the first time that this is called.

        Raises:
            ValueError: the results differ.
        """
        if self._done:
            return
        self._done = True
        found, changed = twice(lambda: function(*_copies((x, y, hidden)), *rest), *self._roots)
        if not alike(*found):
            raise ValueError(
                "windows that run time steps again start from an earlier hidden state, but the model keeps a state of "
                f"its own that is not rewound: {', '.join(changed) or OUT_OF_REACH}. Return it as part of the hidden "
                "state, (y_pred, hidden), or use a policy whose windows do not overlap (FixedTruncation)."
            )


def twice(function: Callable[[], Any], *roots: Any) -> tuple[list[list[Tensor]], list[str]]:
    """Run a function twice with the same random numbers, the second time on what the first has left behind.

    Weights, and the statistics of torch's own modules, are no state of a sequence: they are put back in between.

    Returns:
        The fingerprints of both, and the names of what the first run has changed in `roots`, which is put back.
    """
    state, streams, found = ModelState.of(*roots, parameters=True), RandomStreams.now(), []
    buffers = set(map(id, library_buffers(*roots)))
    with torch.no_grad():
        try:
            for _ in range(2):
                state.restore(
                    lambda owner: isinstance(owner, (*GENERATORS, torch.nn.Parameter)) or id(owner) in buffers
                )
                with streams.replayed():
                    found.append(fingerprint(function()))
                if len(found) == 1:
                    changed = state.changed()
        finally:
            state.restore()
    return found, changed


def _copies(node: Any) -> Any:
    return nest.map_tensors(torch.Tensor.clone, node)


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor has been written into, as far as torch counts it."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _differentiable(node: Any) -> list[Tensor]:
    return [tensor for tensor in nest.tensors(node) if tensor.requires_grad]


def _sequence_number() -> int:
    """Return the number of an operation recorded here and now: those of this thread are counted up."""
    return torch.empty(0, requires_grad=True).view(0).grad_fn._sequence_nr()  # type: ignore[union-attr]
