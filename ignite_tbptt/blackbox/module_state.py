"""How a module stood when its forward began, and how it is left alone when its forward is run again.

Differences are taken long after the forward they belong to: by then BatchNorm has counted a batch, a spectral norm has
turned its vectors, `eval()` may have been called and a stateful cell has moved on. So a forward is preceded by a
`ModuleState.of(module)`; each later evaluation starts from that state and leaves the module as it found it. What is
covered: buffers, train/eval flags, and attributes that are bound to tensors (a hidden state kept on ``self``). An
attribute of any other kind is left to hold what the forward made of it (a solver that is built on first use stays
built), but one that an evaluation binds anew is bound back. Objects that are changed inside (a list that is appended
to) are out of reach.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ignite_tbptt.random_streams import RandomStreams

__all__ = ["ModuleState", "attributes_kept"]

# Evaluations swap tensors inside the module itself, so that only one may run at a time, whatever thread it is in.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True, eq=False)
class ModuleState:
    """The state of a module and of the random streams at one moment.

    Attributes:
        streams: the random streams.
        buffers: copies of all buffers by name.
        attributes: for every submodule, what its attributes were bound to.
    """

    streams: RandomStreams
    buffers: dict[str, Tensor]
    attributes: tuple[tuple[nn.Module, dict[str, Any]], ...]

    @classmethod
    def of(cls, module: nn.Module) -> ModuleState:
        """Hold the present state of a module."""
        attributes = tuple((part, dict(vars(part))) for part in module.modules())
        return cls(RandomStreams.now(), {name: b.detach().clone() for name, b in module.named_buffers()}, attributes)

    @contextlib.contextmanager
    def entered(self, module: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Put the module into this state for the block, which receives copies of the buffers to run with."""
        with _ONE_AT_A_TIME, attributes_kept(module):
            for part, before in self.attributes:
                now = vars(part)
                for name in [name for name in now if name not in before and _holds_tensors(now[name])]:
                    del now[name]
                for name, value in before.items():
                    later = now.get(name)
                    if later is not value and (name == "training" or _holds_tensors(value) or _holds_tensors(later)):
                        now[name] = value
            yield {name: buffer.clone() for name, buffer in self.buffers.items()}

    def tensors_in_a_graph(self, module: nn.Module) -> list[str]:
        """Names of attributes that hold tensors with a gradient to give, which are neither parameters nor inputs."""
        names = {id(part): name for name, part in module.named_modules()}
        return [
            f"{names.get(id(part), '')}.{name}".lstrip(".")
            for part, values in self.attributes
            for name, value in values.items()
            for tensor in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter) and tensor.requires_grad
        ]


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value)


@contextlib.contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Bind every attribute that the block binds anew, in any submodule, back to what it was."""
    kept = [(part, dict(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, before in kept:
            now = vars(part)
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)
