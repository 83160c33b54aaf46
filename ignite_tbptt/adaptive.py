"""Chunks as long as the gradients ask for, set while the model trains.

`GradientHorizon` measures how gradients decay, `GradientDecay` tells the bias of every length, and `AdaptiveTruncation`
sets the trainer's `tbtt_step`.
"""

from __future__ import annotations

import math
from typing import Any

from ignite.engine import Engine
from ignite.handlers.param_scheduler import BaseParamScheduler
from ignite.handlers.state_param_scheduler import StateParamScheduler
from torch.optim import Optimizer

from ignite_tbptt.decay import require_tolerance
from ignite_tbptt.horizon import GradientHorizon
from ignite_tbptt.truncation import TruncationPolicy, require_steps


class AdaptiveTruncation:
    """Sets the trainer's `tbtt_step` to what the measured decay asks for, whenever the horizon has been measured.

    Example:
        ::

            trainer = create_supervised_tbptt_trainer(model, optimizer, loss_fn, tbtt_step=20)
            horizon = GradientHorizon(window=100)
            horizon.attach(trainer, Events.ITERATION_STARTED(every=100))
            AdaptiveTruncation(horizon, tolerance=0.5, minimum=5, maximum=80, optimizer=optimizer).attach(trainer)

    It sets the least length of chunks whose relative bias is below `tolerance` (`GradientDecay.chunk_bias`), or the
    nearest one with which a batch does not end in a chunk of less than half that length: such a stub would take an
    optimizer step like any other, on a gradient that is noisier and cut off earlier. Every step is taken to have a
    loss: in a many-to-one task chunks of ``horizon.recommended`` steps are long enough.

    Until the first measurement the `tbtt_step` that the trainer was made with holds. In a fresh model gradients decay
    fast whatever the task, and a model trained in short chunks alone may never show that it needs longer ones: measure
    after some training, and let `minimum` be a length that is worth trying.

    Args:
        horizon: attached to the same trainer before.
        tolerance: relative bias that is allowed for.
        minimum: least `tbtt_step`.
        maximum: largest `tbtt_step`, also where gradients do not decay.
        optimizer: where given, its learning rates are multiplied by the root of the ratio of the new `tbtt_step` to the
            old: longer chunks take fewer steps, on gradients of less noise. The paper does so. No scheduler may set
            them as well: `attach`, and every update, refuses those that it can see (Ignite's on the same engine,
            torch's on the same optimizer; ``ReduceLROnPlateau``, which multiplies, goes with it).

    Raises:
        TypeError: `horizon` is no GradientHorizon, or `minimum` or `maximum` not an integer.
        ValueError: `tolerance` is not positive, `minimum` is below 1 or above `maximum`.

    Source: Aicher, Foti and Fox, 2019, arXiv:1905.07473, algorithm 2. There every loss is followed back over K steps at
    least, in windows that overlap and cost twice as much; here it is the mean over a chunk that keeps the tolerance.
    """

    def __init__(
        self, horizon: GradientHorizon, tolerance: float, minimum: int, maximum: int, optimizer: Optimizer | None = None
    ) -> None:
        if not isinstance(horizon, GradientHorizon):
            raise TypeError(
                f"horizon must be a GradientHorizon, which measures the decay, got {horizon!r}: make one, "
                "GradientHorizon(window=200) say, and attach it first."
            )
        require_tolerance(tolerance)
        require_steps("minimum", minimum)
        require_steps("maximum", maximum)
        if minimum > maximum:
            raise ValueError(f"minimum must not be above maximum, got minimum={minimum} and maximum={maximum}.")
        self.horizon, self.tolerance, self.minimum, self.maximum = horizon, tolerance, minimum, maximum
        self.optimizer = optimizer

    def attach(self, engine: Engine) -> None:
        """Follow the horizon.

        Raises:
            ValueError: the trainer's `tbtt_step` is a policy, the horizon is not attached to `engine`, or something
                else that can be seen sets `tbtt_step` or the learning rates: another AdaptiveTruncation, a scheduler.
        """
        self._require_alone(engine)
        if self.horizon.engine is not engine:
            raise ValueError(
                "the horizon is not attached to this engine, so it would never be measured: call "
                "horizon.attach(trainer, Events.ITERATION_STARTED(every=100)) first."
            )
        if self._update in self.horizon.listeners:
            raise ValueError("this AdaptiveTruncation is attached already.")
        self.horizon.on_measured(self._update)

    def detach(self, engine: Engine) -> None:
        """Follow the horizon no more; `tbtt_step` and the learning rates stay what they are."""
        if self.horizon.engine is engine and self._update in self.horizon.listeners:
            self.horizon.listeners.remove(self._update)

    def _update(self, engine: Engine) -> None:
        state: Any = engine.state
        self._require_alone(engine)
        wanted = self.horizon.decay.recommended_chunk(self.tolerance)
        steps = self.maximum if wanted is None else min(max(wanted, self.minimum), self.maximum)
        steps = self._without_a_stub(steps, self.horizon.batch_steps)
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] *= math.sqrt(steps / state.tbtt_step)
        state.tbtt_step = steps

    def _require_alone(self, engine: Engine) -> None:
        """Refuse a policy, and whatever else that can be seen sets what this sets."""
        tbtt_step: Any = getattr(engine.state, "tbtt_step", None)
        if isinstance(tbtt_step, TruncationPolicy):
            raise ValueError(
                f"the trainer's tbtt_step is a policy, {tbtt_step!r}, and AdaptiveTruncation sets the length of "
                "chunks: make the trainer with an int to start from, tbtt_step=50."
            )
        owners = [getattr(handler, "__self__", handler) for handler in _handlers(engine)]
        horizons = [owner for owner in (self.horizon, *owners) if isinstance(owner, GradientHorizon)]
        followers = [getattr(listener, "__self__", None) for horizon in horizons for listener in horizon.listeners]
        if any(isinstance(other, AdaptiveTruncation) and other is not self for other in followers):
            raise ValueError(
                "another AdaptiveTruncation sets the tbtt_step of this engine: detach(engine) it first, or give one of "
                "them both tasks."
            )
        for owner in owners:
            if isinstance(owner, StateParamScheduler) and owner.param_name == "tbtt_step":
                raise ValueError(
                    f"a {type(owner).__name__} sets tbtt_step as well: AdaptiveTruncation would be overwritten. Attach "
                    "one of them."
                )
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        schedulers = [owner for owner in owners if groups and isinstance(owner, BaseParamScheduler)]
        scheduled = [scheduler for scheduler in schedulers if self._sets_rates(scheduler)]
        if scheduled or any("initial_lr" in group for group in groups):
            name = type(scheduled[0]).__name__ if scheduled else "a scheduler of torch.optim.lr_scheduler"
            raise ValueError(
                f"{name} sets the learning rates of the optimizer, which AdaptiveTruncation multiplies: one would undo "
                "or compound what the other does. Leave optimizer=None here, or the scheduler out (an optimizer that "
                "one was made for keeps 'initial_lr' in its groups)."
            )

    def _sets_rates(self, scheduler: Any) -> bool:
        if self.optimizer is None or isinstance(scheduler, StateParamScheduler):
            return False
        ours = [id(group) for group in self.optimizer.param_groups]
        parts = [part for part in getattr(scheduler, "schedulers", [scheduler]) if part.param_name == "lr"]
        return any(id(group) in ours for part in parts for group in part.optimizer_param_groups)

    def _without_a_stub(self, wanted: int, batch_steps: int) -> int:
        """Return the length next to `wanted`, the longer of two, of which the rest of a batch is 0 or at least half."""
        lengths = range(self.minimum, self.maximum + 1)
        even = [steps for steps in lengths if not 0 < batch_steps % steps < steps / 2]
        return min(even, key=lambda steps: (abs(steps - wanted), -steps), default=wanted)


def _handlers(engine: Engine) -> list[Any]:
    """Return what is attached to an engine, without the wrappers of filtered events."""
    handlers = [entry[0] for entries in list(engine._event_handlers.values()) for entry in entries]
    return [handler._parent() if hasattr(handler, "_parent") else handler for handler in handlers]
