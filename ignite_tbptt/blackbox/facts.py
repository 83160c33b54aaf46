"""What was verified of a blackbox, keyed by what it depends on, and what is still to be verified.

A fact belongs to one blackbox or binding, not to a counter, which may be shared, and to the training modes and batch
axes under which it was found. It is verified at the first gradient and again at gradients 2, 4, 8, ... Pairs with
`probes`, which find out.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ignite_tbptt.blackbox.errors import UntrustedGradientWarning
from ignite_tbptt.warn import warn

__all__ = ["Facts"]

_NAMED: dict[int, dict[int, weakref.ref[Facts]]] = {}


class Facts:
    """Of one blackbox.

    Args:
        identity: the same for the same blackbox in every run of a program: what it is called and where it stands.

    Attributes:
        stackable: whether the rows of several points may share a call, by key.
        told: warnings that were given.
        calls: nodes of forward calls whose graph is alive, by number.
        step_sizes: steps that were measured, by the inputs that they belong to.
        suited: the estimator of the last gradient.
        measurements: what was measured for them.
        jump: the largest jump of an output that was seen.
        inputs: what was settled of the arguments of the last call.
        outputs: likewise of its outputs.
        measures: whether steps are measured though nobody asked for it, because the default one does not suit.
        certificates: of the last gradients that were certified.
        noises: variances of an output, as certificates saw them.
        under_way: evaluations that have begun before their backward, by the number of the call.
        bytes_ahead: of what comes out of these.
        keeps_to_backward: whether none begin any more.
        certified: how many gradients there were, where some are certified.
    """

    def __init__(self, identity: str) -> None:
        self.stackable: dict[Any, bool] = {}
        self.told: set[Any] = set()
        self.calls: dict[int, Any] = {}
        self.certificates: deque[Any] = deque(maxlen=4096)
        self.certified = 0
        self.noises: deque[float] = deque(maxlen=64)
        self.under_way: dict[int, weakref.ref[Any]] = {}
        self.bytes_ahead = 0
        self.keeps_to_backward = False
        self.step_sizes: dict[Any, Any] = {}
        self.suited: Any = None
        self.measurements: dict[Any, Any] = {}
        self.measures = False
        self.jump = 0.0
        self.inputs: Any = None
        self.outputs: Any = None
        self._gradients: dict[Any, int] = {}
        self._memories: dict[str, list[Tensor]] = {}
        self._number = 0
        # of blackboxes that are alive and called alike each draws directions of its own
        text = 0
        for character in identity:
            text = (text * 1000003 + ord(character)) % 2**61
        alive = _NAMED.setdefault(text, {})
        ordinal = next(k for k in range(len(alive) + 1) if k not in alive or alive[k]() is None)
        alive[ordinal] = weakref.ref(self)
        self._seed = text + 0x9E3779B97F4A7C15 * ordinal

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "calls": {}, "under_way": {}, "bytes_ahead": 0}

    def __deepcopy__(self, memo: dict[int, Any]) -> Facts:
        twin = object.__new__(Facts)
        vars(twin).update(vars(self), stackable=dict(self.stackable), told=set(self.told), calls={}, under_way={})
        twin.bytes_ahead = 0
        twin.step_sizes, twin.measurements = dict(self.step_sizes), dict(self.measurements)
        twin.certificates, twin.noises = self.certificates.copy(), self.noises.copy()
        twin._gradients = dict(self._gradients)
        twin._memories = {key: list(memory) for key, memory in self._memories.items()}
        return twin

    def memory(self, positions: Sequence[int]) -> list[Tensor]:
        """What directions remember of the differentiated inputs at some positions."""
        return self._memories.setdefault(",".join(map(str, positions)), [])

    def state_dict(self) -> dict[str, Any]:
        """What the directions of the next gradients depend on."""
        memories = {key: [tensor.clone() for tensor in memory] for key, memory in self._memories.items() if memory}
        return {"calls": self._number, "memories": memories}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the directions where a state was taken.

        Raises:
            ValueError: it is no such state.
        """
        if not {"calls", "memories"} <= set(state):
            raise ValueError(
                f"state_dict must have 'calls' and 'memories', got {sorted(state)}: give what state_dict() of a "
                "blackbox returned"
            )
        self._number = int(state["calls"])
        self._memories = {key: [tensor.clone() for tensor in memory] for key, memory in state["memories"].items()}

    @property
    def certificate(self) -> Any:
        """Of the last gradient that was certified, None before."""
        return self.certificates[-1] if self.certificates else None

    def certificate_due(self, every: int) -> bool:
        """Count gradients; whether this one is certified, as the first is."""
        self.certified += 1
        return (self.certified - 1) % every == 0

    def next_number(self) -> int:
        """The number of a forward call, from which its random directions are drawn."""
        self._number += 1
        return self._number

    def draw(self, number: int, times: int, rank: int) -> int:
        """What random directions of a call are drawn from: others for each blackbox, call, gradient and rank."""
        return self._seed + (number * 0xBF58476D1CE4E5B9 + times * 0x94D049BB133111EB + rank * 0xD6E8FEB86659FD93)

    def is_first(self, key: Any) -> bool:
        """Whether no gradient was counted yet."""
        return key not in self._gradients

    def due(self, key: Any, more: int = 1) -> bool:
        """Count gradients; whether the first, second, fourth, ... is among them."""
        before = self._gradients.get(key, 0)
        self._gradients[key] = before + more
        return before.bit_length() != (before + more).bit_length()

    def forget(self, key: Any) -> None:
        """Verify again at the next gradient, since this time it could not be done."""
        self._gradients.pop(key, None)

    def name_closed(self, label: str, closed: list[str]) -> None:
        """Say once which tensors inside objects receive no gradient."""
        new = [name for name in closed if name not in self.told]
        if new and torch.is_grad_enabled():
            self.told.update(new)
            warn(
                f"{label} was given {', '.join(new)}, which requires grad and receives none: an object of that kind "
                "cannot be taken apart; pass the tensor itself, or in a dataclass, a mapping or a list",
                UntrustedGradientWarning,
            )

    def name_passed(self, label: str, kinds: list[str]) -> None:
        """Say once which outputs have no gradient."""
        new = [kind for kind in kinds if kind not in self.told]
        if new:
            self.told.update(new)
            warn(
                f"{label} returned {', '.join(new)}, which passes through without a gradient; return the numbers in it "
                "as a tensor or an array where they are to be differentiated",
                UntrustedGradientWarning,
            )
