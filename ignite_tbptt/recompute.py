"""The model run once more than it was asked to be, without a trace: activations recomputed in backward, measurements.

Memory is bought with a second forward pass: a segment keeps only what it was called with, and its activations are made
again when backward comes to it. Random numbers and autocast are those of the first time, by torch.utils.checkpoint;
buffers too, by `buffers_set_to`: running statistics are neither updated twice nor seen in a later state. It pairs with
every truncation policy, for it knows no more of a segment than a function and its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ignite_tbptt import nest

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

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``, whose graph holds `args` and the results alone."""
        # The random state of a device is kept for those of the tensors that are seen: inside a dataclass they are not.
        seen = tuple(nest.tensors(args))
        return checkpoint(lambda *_: function(*args), *seen, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        self._snapshot = _snapshot(self._modules, self._snapshot)
        return nullcontext(), buffers_set_to(self._snapshot)


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
