"""The model run once more than it was asked to be, without a trace: activations recomputed in backward, measurements.

Memory is bought with a second forward pass: a segment keeps only what it was called with, and its activations are made
again when backward comes to it. Random numbers and autocast are those of the first time; buffers too, by
`buffers_set_to`: running statistics are neither updated twice nor seen in a later state. A segment is one node of the
graph where it can be, for that is fast, and else torch.utils.checkpoint's. It pairs with every truncation policy, for
it knows no more of a segment than a function and its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ignite_tbptt import nest
from ignite_tbptt.one_node import Call, in_one_node

_KINDS = ("cpu", "cuda")  # devices whose random numbers are replayed here

Buffers = Mapping[tuple[torch.nn.Module, str], torch.Tensor]
"""The value of each buffer, by the module that holds it and its name there."""


class Recompute:
    """Calls a function now and, for its gradient, once more in backward.

    Example:
        ::

            recompute = Recompute(model)
            y_pred, hidden, loss = recompute(run_segment, x, y, hidden, count)

    Args:
        modules: what the function runs; those that are no torch modules have no buffers to look after.
    """

    def __init__(self, *modules: Any) -> None:
        self._modules = [module for module in modules if isinstance(module, torch.nn.Module)]
        self._snapshot: Buffers = {}
        self._parameters: set[torch.Tensor] = set()
        self._fits_one_node = True

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``, whose graph holds `args` and the results alone.

        Raises:
            ValueError: the function has written into its arguments.
            RuntimeError: in backward: the second run gave something else than the first.
        """
        seen = tuple(nest.tensors(args))
        before = _versions(seen)
        results = self._called(_Repeated(function), args, seen)
        for tensor, was, now in zip(seen, before, _versions(seen), strict=True):
            if was != now:
                raise ValueError(
                    "checkpoint_segments: the model or loss_fn has written into a tensor of shape "
                    f"{tuple(tensor.shape)} that it was given, and would meet what it wrote there when the segment is "
                    "run again for its gradient. Let it work on a copy (x = x * 2, not x *= 2), or leave "
                    "out checkpoint_segments."
                )
        return results

    def _called(self, function: Callable[..., Any], args: tuple[Any, ...], seen: tuple[torch.Tensor, ...]) -> Any:
        self._snapshot = _snapshot(self._modules, self._snapshot)
        buffers = partial(buffers_set_to, self._snapshot)
        devices = {tensor.device for tensor in seen} | {torch.device("cpu")}
        if not (self._fits_one_node and torch.is_grad_enabled() and all(device.type in _KINDS for device in devices)):
            # It looks for devices among the arguments that it is given, and does not see those inside a dataclass. The
            # second run goes to its end, where it is compared with the first.
            with set_checkpoint_early_stop(False):
                return checkpoint(
                    lambda *_: function(*args),
                    *seen,
                    use_reentrant=False,
                    context_fn=lambda: (nullcontext(), buffers()),
                )
        call = Call(function, args, _as_now(devices, buffers))
        run = call.run(call.inputs)
        if not run.differentiable:
            return run.results
        graph = run.graph()
        if graph.closed and all(leaf.device in devices and self._is_plain_parameter(leaf) for leaf in graph.leaves):
            return in_one_node(call, run, graph)
        # This segment keeps its graph, the next ones are left to torch.utils.checkpoint.
        self._fits_one_node = False
        return run.results

    def _is_plain_parameter(self, leaf: torch.Tensor) -> bool:
        """Say whether a node can hand a gradient to `leaf` as its own graph would.

        Hooks on it would see the gradient of every segment, besides the sum of them; a subclass may have its own ways.
        """
        if leaf not in self._parameters:
            self._parameters = {parameter for module in self._modules for parameter in module.parameters()}
        return leaf in self._parameters and type(leaf) is torch.nn.Parameter and not leaf._backward_hooks


class _Repeated:
    """A function that has to give the same each time: else the gradient would be that of something else.

    A norm of each result is compared, up to the square root of its precision: some operations of a GPU add in an order
    of their own each time.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._first: list[torch.Tensor] | None = None

    def __call__(self, *args: Any) -> Any:
        results = self._function(*args)
        with torch.no_grad():
            norms = [torch.linalg.vector_norm(result) for result in nest.tensors(results) if result.is_floating_point()]
        if self._first is None:
            self._first = norms
            return results
        for was, now in zip(self._first, norms, strict=False):  # how many there are is looked at elsewhere
            eps = torch.finfo(was.dtype).eps
            if not torch.allclose(now, was, rtol=eps**0.5, atol=eps, equal_nan=True):
                raise RuntimeError(
                    "checkpoint_segments: a segment that was run again for its gradient gave a result of norm "
                    f"{float(now):.6g} where the first run gave {float(was):.6g}. Either the model keeps a state of "
                    "its own from segment to segment: return it as part of the hidden state, or register a buffer for "
                    "it; or it draws random numbers that are not torch's, which are not replayed. Or leave out "
                    "checkpoint_segments."
                )
        return results


def _versions(tensors: Iterable[torch.Tensor]) -> list[int]:
    """How often each tensor has been written into, as far as torch counts it."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _as_now(
    devices: Iterable[torch.device], buffers: Callable[[], AbstractContextManager[None]]
) -> Callable[[], AbstractContextManager[None]]:
    """Return what makes a context with the random numbers and the autocast state of now, and with `buffers`."""
    gpus = [device for device in devices if device.type == "cuda"]
    random_states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in gpus]
    autocast = [
        partial(
            torch.autocast,
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )
        for kind in _KINDS
        if kind == "cpu" or torch.cuda.is_available()
    ]

    @contextmanager
    def as_then() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(gpus))
            torch.set_rng_state(random_states[0])
            for device, state in zip(gpus, random_states[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            for context in autocast:
                stack.enter_context(context())
            stack.enter_context(buffers())
            yield

    return as_then


@contextmanager
def buffers_set_to(buffers: Buffers) -> Iterator[None]:
    """Run a block with copies of `buffers` in their places; afterwards the places hold what they held before.

    Nothing is written into a tensor, so what backward has saved of them stays valid.
    """
    # The dict itself: setattr would go through whatever a module does with its attributes.
    held = {place: place[0]._buffers[place[1]] for place in buffers}
    try:
        for (module, name), value in buffers.items():
            module._buffers[name] = value.clone()
        yield
    finally:
        for (module, name), tensor in held.items():
            module._buffers[name] = tensor


def buffers_of(*modules: torch.nn.Module) -> dict[tuple[torch.nn.Module, str], torch.Tensor]:
    """Return the buffers of modules as they are."""
    return {
        (child, name): buffer
        for module in modules
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None
    }


def _snapshot(modules: list[torch.nn.Module], last: Buffers) -> Buffers:
    """Return copies of all buffers, sharing with the last ones what has not changed since.

    A large constant buffer is so copied once, not once a segment. (The version counter of a tensor would not do: batch
    normalisation updates its statistics past it.)
    """
    values = {}
    for place, buffer in buffers_of(*modules).items():
        before = last.get(place)
        unchanged = (
            before is not None
            and (before.dtype, before.device, before.shape) == (buffer.dtype, buffer.device, buffer.shape)
            and torch.equal(before, buffer)
        )
        values[place] = before if before is not None and unchanged else buffer.detach().clone()
    return values
