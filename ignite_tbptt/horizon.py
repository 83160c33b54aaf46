"""How far gradients reach back in the model in training, measured beside it.

`GradientHorizon` measures and reports; what the measured norms mean is the arithmetic of `GradientDecay`, and
`AdaptiveTruncation` acts on it. Parameters, their gradients, buffers, attributes, random numbers, the batch and the
carried state are put back after a measurement, so a run with it ends in the same weights as one without; a warning says
where that cannot be (see `model_state`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ignite_tbptt import nest
from ignite_tbptt.decay import GradientDecay, require_fit_from, require_tolerance
from ignite_tbptt.hidden import detach_hidden, device_of, move_hidden, restore_precision
from ignite_tbptt.model_state import ModelState
from ignite_tbptt.optimization import checked_loss
from ignite_tbptt.random_streams import RandomStreams
from ignite_tbptt.recompute import OUT_OF_REACH, alike, fingerprint
from ignite_tbptt.sequence import Cut
from ignite_tbptt.truncation import require_steps
from ignite_tbptt.warn import warn

_MEASURING = "the measurement of the gradient horizon"


class GradientHorizon:
    """Measures how the gradient of the loss decays on its way back in time, and which `tbtt_step` that asks for.

    Example:
        ::

            horizon = GradientHorizon(window=100, tolerance=0.5)
            horizon.attach(trainer, Events.ITERATION_STARTED(every=500))
            trainer.run(data)
            print(horizon.decay.rate, horizon.recommended, horizon.recommended_chunk)
            horizon.plot().savefig("horizon.png")

    At the event the model is run for `window` single steps from the start of the batch in hand, in training mode and
    full precision, and phi_k = ||dL_s/dh_{s-k}|| is taken for each of the last `samples` steps s and every lag k up to
    window - samples: their mean, and its standard error over s. Where only the end of a batch has targets, as in
    many-to-one tasks, the window lies there. `engine.state.gradient_decay_rate` and `engine.state.gradient_horizon`
    (infinity where gradients do not decay) are there for loggers, as
    ``OutputHandler("horizon", state_attributes=["gradient_decay_rate", "gradient_horizon"])``. It costs about
    `samples` times the backward of `window` steps, their memory, and a copy of the weights. `prepare_batch` and hooks
    of the model are called for its steps as well. Ranks take the mean of what they measure, so that they get the same
    recommendation.

    Attributes:
        listeners: what is called after every measurement at the event; see `on_measured`.
        batch_steps: time steps of the batch that was measured last, of the shortest where ranks differ.

    Args:
        window: time steps W that are run; a batch must have as many.
        samples: how many losses, at the last steps of the window, are followed back.
        tolerance: the relative bias that `recommended` and `recommended_chunk` are for.
        fit_from: lag from which the decay rate is fitted; None for the second half of the lags.

    Raises:
        TypeError: `window` or `samples` is not an integer.
        ValueError: `window` is not above `samples` by two at least, `tolerance` is not positive, or `fit_from` leaves
            too few of the window - samples lags. When measuring: the batch is shorter than the window, the model
            carries no state that a gradient goes through, or no step that is sampled has a loss.
        RuntimeError: when measuring, another rank raised: all of them stop, with its reason.

    Source: Aicher, Foti and Fox, Adaptively Truncating Backpropagation Through Time to Control Gradient Bias, UAI 2019,
    arXiv:1905.07473.
    """

    def __init__(self, window: int, samples: int = 8, tolerance: float = 0.5, fit_from: int | None = None) -> None:
        require_steps("window", window)
        require_steps("samples", samples)
        require_tolerance(tolerance)
        if window < samples + 2:
            raise ValueError(
                f"window must be at least samples + 2, got window={window} and samples={samples}: gradients are "
                f"followed back over window - samples steps. Give a longer window or fewer samples."
            )
        require_fit_from(fit_from, window - samples)
        self.window, self.samples, self.tolerance, self.fit_from = window, samples, tolerance, fit_from
        self.engine: Engine | None = None
        self._handle: Any = None
        self.batch_steps = 0
        self._decay: GradientDecay | None = None
        self.listeners: list[Callable[[Engine], None]] = []

    @property
    def decay(self) -> GradientDecay:
        """The last measurement.

        Raises:
            RuntimeError: nothing has been measured yet.
        """
        if self._decay is None:
            raise RuntimeError(
                "nothing has been measured yet: attach the horizon to a trainer and run it, or call measure(engine) "
                "in a handler."
            )
        return self._decay

    @property
    def recommended(self) -> int | None:
        """Least K whose relative bias is below `tolerance` for a loss that is followed back over K steps.

        ``tbtt_step=SlidingTruncation(k1, k1 + K)`` gives every loss as many. None where gradients do not decay.
        """
        return self.decay.recommended(self.tolerance)

    @property
    def recommended_chunk(self) -> int | None:
        """Least `tbtt_step` whose relative bias is below `tolerance` for the mean loss of a chunk.

        The first losses of a chunk are cut off after few steps, so it is longer than `recommended`. None where
        gradients do not decay.
        """
        return self.decay.recommended_chunk(self.tolerance)

    def attach(self, engine: Engine, event: Any = Events.ITERATION_STARTED) -> None:
        """Measure at `event`, on the batch in hand.

        Args:
            engine: a trainer of this package.
            event: best a filtered `Events.ITERATION_STARTED`, where a stateful trainer still has the state that the
                batch starts from.

        Raises:
            ValueError: the engine is no such trainer, or the horizon has been attached before.
        """
        _training_step(engine)
        if self.engine is not None:
            raise ValueError(
                "the horizon is attached already: make another GradientHorizon for another event or engine."
            )
        self.engine = engine
        engine.state.gradient_decay_rate = engine.state.gradient_horizon = math.nan  # type: ignore[attr-defined]
        self._handler = self._measure_and_tell  # one object: Ignite refers to it weakly
        self._handle = engine.add_event_handler(event, self._handler)

    def detach(self, engine: Engine) -> None:
        """Measure no more at the event; nothing happens where the horizon is not attached to `engine`."""
        if self.engine is engine and self._handle is not None:
            self._handle.remove()
            self.engine = self._handle = None

    def on_measured(self, listener: Callable[[Engine], None]) -> None:
        """Call `listener(engine)` after every measurement at the event."""
        self.listeners.append(listener)

    def _measure_and_tell(self, engine: Engine) -> None:
        if not self._measured(engine):
            warn(
                "a measurement of the gradient horizon was discarded, because gradients were NaN: look for NaN in the "
                "batch and the weights."
            )
            return
        state: Any = engine.state
        state.gradient_decay_rate = self.decay.rate
        state.gradient_horizon = math.inf if self.recommended is None else self.recommended
        for listener in list(self.listeners):
            listener(engine)

    def measure(self, engine: Engine) -> GradientDecay:
        """Measure on the batch in hand, keep the result as `decay` and return it.

        Raises:
            ValueError: as the class says, or a gradient is NaN; `decay` is then what it was.
            RuntimeError: as the class says, or inference mode is on, or the model keeps something that cannot be put
                back.
        """
        if not self._measured(engine):
            raise ValueError(
                "the gradients are NaN, so there is no horizon to measure: look for NaN in the batch and the weights."
            )
        return self.decay

    def _measured(self, engine: Engine) -> bool:
        """Measure, and return whether there was anything but NaN."""
        step, state = _training_step(engine), engine.state
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "the gradient horizon is measured by gradients, which torch.inference_mode() does not allow: call "
                "measure(engine) outside of it."
            )
        forward, ranks = step.forward, step.ranks
        callables = (forward.model_fn, forward.model_transform, forward.prepare_batch, step.loss_fn, step.loss_weight)
        data = (state.batch, getattr(state, "hidden", None))
        with (
            _no_trace(forward.model, *callables, step.split_batch, step.carry.initial_hidden, *data) as rewind,
            torch.enable_grad(),
        ):
            length, cut = ranks.all_or_none(_MEASURING, lambda: self._split(step, state))
            shortest = int(min(ranks.gather(length)))  # the same on all ranks, so that they take the same turns
            ranks.all_or_none(_MEASURING, lambda: _check_rewinding(step, cut, state, rewind))
            states, losses = ranks.all_or_none(
                _MEASURING, lambda: self._run(step, cut, 0, lambda x: _first_state(step.carry, state, x))
            )
            if shortest > self.window and not any(ranks.gather(len(losses))):
                rewind()
                states, losses = ranks.all_or_none(_MEASURING, lambda: self._run_at_the_end(step, cut, length, state))
            norms = ranks.all_or_none(_MEASURING, lambda: self._sampled_norms(states, losses))
        error = norms.std(0) / math.sqrt(len(norms)) if len(norms) > 1 else torch.full_like(norms[0], math.nan)
        phi, variance = ranks.mean(norms.mean(0)), ranks.mean(error.square()) / ranks.count
        if phi.isnan().any():
            return False
        deviation = None if variance.isnan().any() else variance.sqrt().tolist()
        self._decay, self.batch_steps = GradientDecay(phi.tolist(), deviation, self.fit_from), shortest
        return True

    def _split(self, step: Any, state: Any) -> tuple[int, Cut]:
        length, cut = step.split_batch(state.batch, step.carry.dim)
        if length < self.window:
            raise ValueError(
                f"the window of {self.window} steps is longer than the batch, which has {length}: give "
                f"GradientHorizon a window of {length} steps at most, or longer batches."
            )
        return length, cut

    def _run(
        self, step: Any, cut: Cut, start: int, first_state: Callable[[Any], Any]
    ) -> tuple[list[list[GradientEdge]], list[tuple[int, Any]]]:
        """Run the window step by step; return the state behind each step and the sampled losses with their places.

        A state is kept as its place in the graph, which stays where the model writes into the tensor afterwards.
        """
        states: list[list[GradientEdge]] = []
        losses: list[tuple[int, Any]] = []
        hidden: Any = None
        for place in range(self.window):
            x, y = step.forward.prepare(cut(start + place, 1))
            if place == 0:
                hidden = first_state(x)
            y_pred, hidden = step.forward.predict(x, hidden)
            states.append([get_gradient_edge(tensor) for tensor in nest.tensors(hidden) if tensor.requires_grad])
            if not states[-1]:
                raise ValueError(
                    "the model carries no hidden state that a gradient goes through, so there is no horizon to "
                    f"measure: it returned {type(hidden).__name__} without a tensor that requires grad. Return "
                    "(y_pred, hidden) with the state attached to its graph; the trainer detaches it between windows."
                )
            sampled = place >= self.window - self.samples and y is not None
            if sampled and (step.loss_weight is None or float(step.loss_weight(x, y)) > 0):
                losses.append((place, checked_loss(step.loss_fn(y_pred, y))))
        return states, losses

    def _run_at_the_end(
        self, step: Any, cut: Cut, length: int, state: Any
    ) -> tuple[list[list[GradientEdge]], list[tuple[int, Any]]]:
        """Bring the state forward without a graph, in chunks as long as the window, and run the last window."""
        start, hidden = length - self.window, None
        with torch.no_grad():
            for first in range(0, start, self.window):
                x, _ = step.forward.prepare(cut(first, min(self.window, start - first)))
                if first == 0:
                    hidden = _first_state(step.carry, state, x)
                _, hidden = step.forward.predict(x, hidden)
        return self._run(step, cut, start, lambda x: detach_hidden(hidden))

    def _sampled_norms(self, states: list[list[GradientEdge]], losses: list[tuple[int, Any]]) -> torch.Tensor:
        """Return the norms of the gradients, a row for each loss."""
        if not losses:
            raise ValueError(
                f"none of the last {self.samples} of the first {self.window} steps of the batch has a loss (a target "
                f"of None, or a loss_weight of 0), and none of its last {self.samples} steps either: give a window "
                "that ends where steps have targets. A sequence with one target has it at its last step "
                "(split_batch=functools.partial(split_sequence, final=[1]))."
            )
        return torch.stack([self._norms(loss, states[:place]) for place, loss in losses])

    def _norms(self, loss: Any, earlier: list[list[GradientEdge]]) -> torch.Tensor:
        """Return the norms of the gradients for the states before `loss`, the latest first."""
        wanted = earlier[-1 : -(self.window - self.samples) - 1 : -1]
        flat = [edge for edges in wanted for edge in edges]
        gradients = iter(torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True))
        squares = []
        for edges in wanted:
            parts = [gradient for gradient in (next(gradients) for _ in edges) if gradient is not None]
            squares.append(sum(float(part.double().square().sum()) for part in parts))
        return torch.tensor(squares, dtype=torch.float64).sqrt()

    def plot(self) -> Any:
        """Draw the decay with its fit, the relative bias of every K, and what is recommended.

        Returns:
            A matplotlib Figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed; the extra ``plot`` brings it.
            RuntimeError: nothing has been measured yet.
        """
        return self.decay.plot(self.tolerance)


def _training_step(engine: Engine) -> Any:
    """Return the process function of a trainer over time."""
    time_state: Any = getattr(engine.state, "tbptt", None)
    step = getattr(time_state, "step", None)
    if step is None:
        raise ValueError(
            "engine is no trainer of this package, so there is no model to measure: attach the horizon to an engine of "
            "create_supervised_tbptt_trainer, or to one that supervised_tbptt_training_step(...) is attached to."
        )
    return step


def _first_state(carry: Any, state: Any, x: Any) -> Any:
    hidden = state.hidden if carry.stateful else None
    if hidden is None and carry.initial_hidden is not None:
        hidden = carry.initial_hidden(x)
    return None if hidden is None else restore_precision(move_hidden(detach_hidden(hidden), device_of(x)))


@contextmanager
def _no_trace(model: Any, *others: Any) -> Iterator[Callable[[], None]]:
    """Run a block in training mode and put back random numbers, parameters, buffers, attributes, modes and data.

    Yields:
        What puts everything back in the middle of the block.
    """
    state, streams = ModelState.of(model, *others, parameters=True), RandomStreams.now()
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    modes = [module.training for module in modules]  # of wrappers, too, which a snapshot does not enter
    if state.lazy:
        raise ValueError(
            f"the model has lazy parameters, {', '.join(state.lazy)}, whose shapes its first forward decides: call the "
            "model once before the horizon is measured."
        )

    def rewind() -> None:
        streams.restore()
        state.restore()
        if isinstance(model, torch.nn.Module):
            model.train()

    try:
        rewind()
        yield rewind
    finally:
        streams.restore()
        for module, training in zip(modules, modes, strict=True):
            module.training = training
        state.restore()


def _check_rewinding(step: Any, cut: Cut, state: Any, rewind: Callable[[], None]) -> None:
    """Warn where the first step gives something else the second time, so that a measurement leaves a trace."""
    found = []
    for _ in range(2):
        with torch.no_grad():
            x, _ = step.forward.prepare(cut(0, 1))
            found.append(fingerprint(step.forward.predict(x, _first_state(step.carry, state, x))))
        rewind()
    if not alike(*found):
        warn(
            "the model gave other values when a time step was run again from where it had started: it keeps a state, "
            f"or draws random numbers, where they cannot be put back ({OUT_OF_REACH}). The measurement of the gradient "
            "horizon changes the run."
        )
