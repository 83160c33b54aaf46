"""The trainer: runs the windows of a policy through forward, backward and step, and fires an event at each turn.

It executes what others decide: a truncation policy lays out the windows, an accumulation says which of them share an
optimizer step, a splitter cuts the batch. None of them is known here by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine, Events

from ignite_tbptt import ranks
from ignite_tbptt.carry import HiddenCarry, HiddenThroughBatch
from ignite_tbptt.events import Tbptt_Events, fire, fire_and_ask, has_listeners, register_time_events, stop_requested
from ignite_tbptt.forward import ChunkForward, call_model, prepare_batch, unchanged, warn_if_underflow
from ignite_tbptt.hidden import detach_hidden, scale_gradient, warn_if_bidirectional
from ignite_tbptt.optimization import Accumulation, OptimizerStep, as_accumulation, checked_loss, zero_through
from ignite_tbptt.ranks import REFUSED
from ignite_tbptt.recompute import Recompute
from ignite_tbptt.resume import DeterministicTimeEngine, TimeEngine, carry_hidden, settled
from ignite_tbptt.sequence import Cut, SplitBatch, split_sequence
from ignite_tbptt.truncation import (
    TruncationPolicy,
    Window,
    as_policy,
    check_tbtt_step,
    plan_windows,
    warn_if_normalised,
)

_prepare_batch = prepare_batch  # the arguments of that name hide the function


def loss_item(x: Any, y: Any, y_pred: Any, loss: Any) -> Any:
    """Return the loss as a number: the default of `output_transform`."""
    return loss.item()


@dataclass
class _Chunks:
    """The batch in hand: where its chunks come from, the state they start from, the loss that they left behind.

    `heard` says that a handler may have changed the model's mode since the batch began; Module.train() for every chunk
    would cost a small model more than all events together.
    """

    cut: Cut
    hidden: HiddenThroughBatch
    total: Any = 0.0
    steps: float = 0.0
    has_target: bool = False
    heard: bool = True

    def mean_loss(self) -> float:
        return float(self.total) / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class TbpttTrainingStep:
    """The process function of the trainer: one batch, window by window. See `supervised_tbptt_training_step`."""

    forward: ChunkForward
    step: OptimizerStep
    accumulation: Accumulation
    tbtt_step: int | TruncationPolicy
    loss_fn: Callable[[Any, Any], Any]
    loss_weight: Callable[[Any, Any], Any] | None
    output_transform: Callable[[Any, Any, Any, Any], Any]
    split_batch: SplitBatch
    carry: HiddenCarry
    recompute: Recompute | None = None

    def attach(self, engine: Engine) -> None:
        """Give `engine`, whose process function this is, the events, the counters and the carried state."""
        if self.carry.stateful and not isinstance(engine, TimeEngine):
            warnings.warn(
                f"checkpoints of a plain {type(engine).__name__} do not hold the carried hidden state: the run cannot "
                "be resumed inside an epoch. create_supervised_tbptt_trainer makes an engine whose checkpoints do.",
                UserWarning,
                stacklevel=2,
            )
        register_time_events(engine, *Tbptt_Events)
        engine.state.tbtt_step = self.tbtt_step  # type: ignore[attr-defined]
        engine.tbptt_training_step = self  # type: ignore[attr-defined]  # for handlers that run the model as it does
        carry_hidden(engine, self.carry.stateful)
        engine.add_event_handler(Events.STARTED, _require_one_epoch_length)

    def __call__(self, engine: Engine, batch: Any) -> float:
        """Train on one batch and return its mean loss over the time steps that count."""
        state: Any = engine.state
        if not hasattr(state, "tbtt_step"):
            raise RuntimeError("the engine has no time events: call attach(engine) on the training step before a run.")
        cut, windows = self._plan(state, batch)
        state.time_iterations_per_sequence = len(windows)
        chunks = _Chunks(cut, self.carry.through(state, windows, cut, detach_hidden))
        state.inside_batch = True
        try:
            for group in self.accumulation.groups(windows):
                if self._run_group(engine, group, chunks):
                    return chunks.mean_loss()
        finally:
            chunks.hidden.leave()
        state.inside_batch = False
        if not chunks.has_target:
            raise ValueError(
                "no chunk of the batch had a target: prepare_batch returned y=None for all of them, so there is no "
                "loss to train on."
            )
        return chunks.mean_loss()

    def _plan(self, state: Any, batch: Any) -> tuple[Cut, list[Window]]:
        try:
            length, cut = self.split_batch(batch, self.carry.dim)
            windows = plan_windows(as_policy(state.tbtt_step), length, state.iteration)
        except Exception:
            ranks.gather(REFUSED)  # the others wait for this rank's number, and must not wait for ever
            raise
        ranks.require_same(f"time iterations in iteration {state.iteration}", len(windows))
        return cut, windows

    def _run_group(self, engine: Engine, group: Sequence[Window], chunks: _Chunks) -> bool:
        """Run windows that share an optimizer step, and take it.

        Returns:
            Whether the batch was cut short: a handler asked to stop and there are windows left.
        """
        state: Any = engine.state
        expected, share = self.accumulation.expected(group), 0.0
        for window in group:
            first = window[0]
            x, y = self.forward.prepare(chunks.cut(first.start, first.stop - first.start))
            if first.start != chunks.hidden.end:
                chunks.hidden.go_back_to(first.start)
            state.time_iteration += 1
            chunks.heard |= fire(engine, Tbptt_Events.TIME_ITERATION_STARTED)
            # A handler, or a callable of the user's, may have run an evaluator.
            if chunks.heard or not getattr(self.forward.model, "training", False):
                self.forward.model.train()
                chunks.heard = False
            if window is group[0]:
                self.step.zero()
            x, y, y_pred, loss, objective, steps = self._run_window(window, x, y, chunks)
            state.counted_steps = steps
            part = self.accumulation.share(steps)
            # Which steps count is known to each rank alone, yet all must take part in the same backward passes.
            joint = part if self.loss_weight is None else ranks.mean_number(part)
            if part:
                self.step.backward(objective if part == expected else objective * (part / expected))
            elif joint:
                self.step.backward(zero_through(y_pred))
            share += joint
            state.output = self.output_transform(x, y, y_pred, loss)
            chunks.steps += steps
            chunks.total += steps * (state.output if self.output_transform is loss_item else _without_sync(loss))
            del x, y, y_pred, loss, objective  # the next chunk does not have to fit beside this one
            if share and window is group[-1]:
                chunks.heard |= self._take_step(engine, expected / share)
            chunks.heard |= fire(engine, Tbptt_Events.TIME_ITERATION_COMPLETED)
            if stop_requested(engine):
                return chunks.hidden.windows_left()
        return False

    def _run_window(self, window: Window, x: Any, y: Any, chunks: _Chunks) -> tuple[Any, Any, Any, Any, Any, float]:
        """Run the segments of a window in one graph.

        Returns:
            (x, y, y_pred) of the last segment; the mean loss over the steps that count (a zero without a graph where
            none does); the objective, in which segments have their weights; and how many steps count.
        """
        hidden = chunks.hidden.start(x)
        losses: list[Any] = []
        counts: list[float] = []
        run_segment = self._run_segment if self.recompute is None else self._run_segment_again_in_backward
        for start, stop, carry_scale, loss_weight in window:
            if counts:
                x, y = self.forward.prepare(chunks.cut(start, stop - start))
                hidden = scale_gradient(hidden, carry_scale)
            count: float = 0
            if y is not None:
                chunks.has_target = True
                if loss_weight:
                    count = stop - start if self.loss_weight is None else self._count(x, y)
            if self.forward.amp_mode is None:
                y_pred, hidden, loss = run_segment(x, y, hidden, count)
            else:
                with self.forward.autocast(x):
                    y_pred, hidden, loss = run_segment(x, y, hidden, count)
            losses.append(loss)
            counts.append(count)
            chunks.hidden.reach(stop, hidden)
        if len(window) == 1 and loss_weight == 1.0 and count:
            return x, y, y_pred, loss, loss, count
        steps = sum(counts)
        if not steps:
            return x, y, y_pred, torch.zeros(()), None, 0
        mean = _weighted_sum([count / steps for count in counts], losses)
        return x, y, y_pred, mean, _weighted_sum(self.accumulation.coefficients(window, counts), losses), steps

    def _run_segment_again_in_backward(self, x: Any, y: Any, hidden: Any, count: float) -> tuple[Any, Any, Any]:
        y_pred, hidden, loss = self.recompute(self._run_segment, x, y, hidden, count)  # type: ignore[misc]
        # A copy: on the CPU the scalar of mse_loss lies in a storage of all elements, which would stay till backward.
        return y_pred, hidden, None if loss is None else loss.clone()

    def _run_segment(self, x: Any, y: Any, hidden: Any, count: float) -> tuple[Any, Any, Any]:
        y_pred, hidden = self.forward.predict(x, hidden)
        return y_pred, hidden, checked_loss(self.loss_fn(y_pred, y)) if count else None

    def _count(self, x: Any, y: Any) -> float:
        """Return how many time steps of a chunk count, by the user's `loss_weight`."""
        count = float(self.loss_weight(x, y))  # type: ignore[misc]
        if not (math.isfinite(count) and count >= 0):
            raise ValueError(
                f"loss_weight must return a finite number that is not negative, the steps that count, got {count}."
            )
        return count

    def _take_step(self, engine: Engine, factor: float) -> bool:
        """Step on the gradients, unless a handler that looks at them asks to terminate.

        Returns:
            Whether a handler ran.
        """
        heard = has_listeners(engine, Tbptt_Events.BACKWARD_COMPLETED)
        look = (lambda: not _stop_before_step(engine)) if heard or ranks.count() > 1 else None
        if self.step.take(factor, look):
            engine.state.optimizer_step += 1  # type: ignore[attr-defined]
            heard |= fire(engine, Tbptt_Events.OPTIMIZER_STEP_COMPLETED)
        return heard


def _stop_before_step(engine: Engine) -> bool:
    """Fire BACKWARD_COMPLETED and return whether the step is to be withheld, on this rank and so on all."""
    asked = fire_and_ask(engine, Tbptt_Events.BACKWARD_COMPLETED)
    if ranks.count() == 1:
        return asked
    # A rank that saw a NaN in its own loss has poisoned the gradients of all by now.
    stop_all, stop_epoch = (any(ranks.gather(bool(flag))) for flag in (engine.should_terminate, asked))
    if stop_epoch and not asked:
        engine.terminate() if stop_all else engine.terminate_epoch()
    return stop_epoch


def _weighted_sum(factors: Sequence[float], losses: Sequence[Any]) -> Any:
    terms = [
        loss if factor == 1.0 else factor * loss
        for factor, loss in zip(factors, losses, strict=True)
        if loss is not None
    ]
    return terms[0] if len(terms) == 1 else sum(terms)


def _without_sync(loss: Any) -> Any:
    """Return the loss as a tensor that adds up: an output_transform without .item() keeps a GPU from waiting."""
    loss = loss.detach()
    return loss if loss.device.type == "mps" else loss.double()


def supervised_tbptt_training_step(
    model: Any,
    optimizer: Any,
    loss_fn: Callable[[Any, Any], Any],
    tbtt_step: int | TruncationPolicy,
    dim: int = 0,
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., Any] = _prepare_batch,
    *,
    output_transform: Callable[[Any, Any, Any, Any], Any] = loss_item,
    model_transform: Callable[[Any], Any] = unchanged,
    model_fn: Callable[[Any, Any, Any], Any] = call_model,
    gradient_accumulation_steps: int | str = 1,
    amp_mode: str | None = None,
    scaler: Any = None,
    stateful: bool = False,
    initial_hidden: Callable[[Any], Any] | None = None,
    split_batch: SplitBatch = split_sequence,
    loss_weight: Callable[[Any, Any], Any] | None = None,
    checkpoint_segments: bool = False,
) -> TbpttTrainingStep:
    """Make the process function of a TBPTT trainer, for an engine of your own.

    Example:
        ::

            step = supervised_tbptt_training_step(model, optimizer, loss_fn, 50)
            trainer = Engine(step)
            step.attach(trainer)  # events, counters, carried state

    The arguments, and what they raise, are those of `create_supervised_tbptt_trainer`; `scaler` is a scaler here.
    """
    check_tbtt_step(tbtt_step)
    if scaler is not None and amp_mode is None:
        raise ValueError("scaler is given, but amp_mode is None: gradients are scaled for amp_mode='amp' alone.")
    if isinstance(scaler, bool):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {scaler}: only the trainer makes one.")
    forward = ChunkForward(
        model=model,
        device=device,
        non_blocking=non_blocking,
        prepare_batch=prepare_batch,
        model_fn=model_fn,
        model_transform=model_transform,
        amp_mode=amp_mode,
    )
    warn_if_underflow(amp_mode, scaler, device, model)
    warn_if_bidirectional(model)
    warn_if_normalised(tbtt_step, gradient_accumulation_steps, loss_weight)
    return TbpttTrainingStep(
        forward=forward,
        step=OptimizerStep(optimizer, scaler),
        accumulation=as_accumulation(gradient_accumulation_steps),
        tbtt_step=tbtt_step,
        loss_fn=loss_fn,
        loss_weight=loss_weight,
        output_transform=output_transform,
        split_batch=split_batch,
        carry=HiddenCarry(stateful, initial_hidden, dim, amp_mode),
        recompute=Recompute(model, loss_fn) if checkpoint_segments else None,
    )


def create_supervised_tbptt_trainer(
    model: Any,
    optimizer: Any,
    loss_fn: Callable[[Any, Any], Any],
    tbtt_step: int | TruncationPolicy,
    dim: int = 0,
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., Any] = _prepare_batch,
    *,
    output_transform: Callable[[Any, Any, Any, Any], Any] = loss_item,
    model_transform: Callable[[Any], Any] = unchanged,
    model_fn: Callable[[Any, Any, Any], Any] = call_model,
    gradient_accumulation_steps: int | str = 1,
    amp_mode: str | None = None,
    scaler: Any = False,
    deterministic: bool = False,
    stateful: bool = False,
    initial_hidden: Callable[[Any], Any] | None = None,
    split_batch: SplitBatch = split_sequence,
    loss_weight: Callable[[Any, Any], Any] | None = None,
    checkpoint_segments: bool = False,
) -> TimeEngine:
    """Create a trainer for truncated back-propagation through time.

    A sequence that is too long to back-propagate whole is cut into chunks; the hidden state goes from chunk to chunk,
    the gradient does not. The positional arguments are those of ``ignite.contrib.engines``, whose factory this one
    replaces: a script written for it runs unchanged, to the bit.

    Example:
        ::

            model = torch.nn.LSTM(input_size=8, hidden_size=32, proj_size=1)
            optimizer = torch.optim.Adam(model.parameters())
            trainer = create_supervised_tbptt_trainer(model, optimizer, torch.nn.functional.mse_loss, tbtt_step=50)

            @trainer.on(Tbptt_Events.BACKWARD_COMPLETED)
            def clip():
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

            trainer.run(loader, max_epochs=10)  # batches (x, y) of shape (T, B, 8) and (T, B, 1)

    `engine.state` has, besides Ignite's: `time_iteration` and `optimizer_step` (counters over the run),
    `time_iterations_per_sequence` (of the batch in hand), `counted_steps` (time steps of the window that had a loss),
    `hidden` (the state that the next window starts from;
    handlers may read and replace it), `tbtt_step` (read at every batch, so a parameter scheduler can change it) and
    `output`: the window's output from BACKWARD_COMPLETED on, the mean loss over the steps of the batch at
    ITERATION_COMPLETED.

    Args:
        model: called as ``model(x)`` for the first chunk of a sequence and ``model(x, hidden)`` from then on; returns
            ``(y_pred, hidden)``. The hidden state is any nest of tensors, None inside included.
        optimizer: steps once for every window, or as `gradient_accumulation_steps` says.
        loss_fn: ``loss_fn(y_pred, y)`` returns a scalar, the mean over the chunk.
        tbtt_step: time steps of a chunk (the last may be shorter), or a truncation policy. For chunks that grow attach
            ``PiecewiseLinearStateScheduler([(1, 10), (1000, 100)], "tbtt_step")`` of Ignite at ITERATION_STARTED.
        dim: time axis of the tensors in a batch; may be negative.
        device: where chunks are moved to, one by one; the model is not moved. None leaves them where they are.
        non_blocking: move chunks asynchronously where the host memory is pinned.
        prepare_batch: ``prepare_batch(chunk, device=..., non_blocking=...)`` returns (x, y), for every chunk. A chunk
            whose y is None advances the state and has no loss.
        output_transform: ``output_transform(x, y, y_pred, loss)`` makes `engine.state.output` of a window. The
            default is the loss as a number.
        model_transform: maps y_pred to what `loss_fn` takes, ``lambda y_pred: y_pred.transpose(1, 2)`` say.
        model_fn: ``model_fn(model, x, hidden)`` calls a model that is not called as above; `hidden` is None at first.
        gradient_accumulation_steps: windows that share an optimizer step, on the mean of their losses; windows left
            over at the end of a batch are stepped on too. "sequence": one step a batch, each window weighted by
            its share of the time steps: the gradient of the mean loss over the whole sequence, truncated.
        amp_mode: "amp" for forward and loss under ``torch.autocast``, in the dtype of ``torch.get_autocast_dtype``:
            bfloat16 on CPU and float16 on CUDA, unless ``torch.set_autocast_dtype`` chose another.
        scaler: a ``torch.amp.GradScaler``, or True to have one made, as `engine.state.scaler`.
        deterministic: make the engine a `DeterministicEngine`, which resumes with its random streams.
        stateful: carry the hidden state from batch to batch of an epoch: row i of a batch goes on where row i of the
            one before ended (`ContiguousStreams`). It is reset where an epoch starts and where the data begin anew. The
            carried state is in the trainer's state dict, for the rows of this rank: on several ranks let each save its
            own (`Checkpoint`'s save_on_rank).
        initial_hidden: ``initial_hidden(x)`` returns the state that sequences start with, x being the first chunk.
            Parameters in it are trained.
        split_batch: ``split_batch(batch, dim)`` returns the length and the chunks; see `split_sequence`, also for
            entries without a time axis and many-to-one targets.
        loss_weight: ``loss_weight(x, y)`` returns how many time steps of a chunk count, in any unit, when there is
            padding; `loss_fn` is expected to be the mean over those. A window with 0 advances the state, its loss is
            not computed and no step is taken.
        checkpoint_segments: keep of each segment only its inputs and the state it starts from, and run it again for
            its gradient: the activations of one segment at a time, for one more forward pass. The result is the same,
            random numbers and buffers included, but for the order in which gradients are summed. For windows of many
            segments, as `FullBackpropagation` has them. Segments that lead to anything but parameters of `model` and
            `loss_fn`, or to parameters with hooks, are left to ``torch.utils.checkpoint``, which takes longer. A
            second run that gives something else, because the model keeps a state of its own, raises RuntimeError.

    Returns:
        The engine.

    Raises:
        TypeError: `tbtt_step` or `gradient_accumulation_steps` is of a wrong type. In a run: a batch that is no pair
            after `prepare_batch`, a model that returns no pair, a hidden state without tensors, a loss that is no
            tensor.
        ValueError: an argument is out of its range. In a run: sequences of different lengths, empty ones, `dim` out
            of range, a loss that is not scalar or has no graph, a carried state for another number of rows, ranks
            with different numbers of windows.

    Note:
        `terminate()` and `terminate_epoch()` end the windows after the one in hand, `interrupt()` after the batch.
        For an exact resume save checkpoints at ITERATION_COMPLETED or later events: inside a batch there is no place
        to resume from.

    Source: Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories, Neural Computation 2 (1990) 490-501: BPTT(h; h') with h = h'.
    """
    if scaler and amp_mode is None:
        raise ValueError(f"scaler={scaler!r} is given, but amp_mode is None: use amp_mode='amp', or no scaler.")
    made_scaler = torch.amp.GradScaler(_device_type(device)) if scaler is True else None
    step = supervised_tbptt_training_step(
        model,
        optimizer,
        loss_fn,
        tbtt_step,
        dim,
        device,
        non_blocking,
        prepare_batch,
        output_transform=output_transform,
        model_transform=model_transform,
        model_fn=model_fn,
        gradient_accumulation_steps=gradient_accumulation_steps,
        amp_mode=amp_mode,
        scaler=made_scaler or scaler or None,
        stateful=stateful,
        initial_hidden=initial_hidden,
        split_batch=split_batch,
        loss_weight=loss_weight,
        checkpoint_segments=checkpoint_segments,
    )
    settings = {
        "tbtt_step": settled(tbtt_step),
        "dim": dim,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "stateful": stateful,
    }
    engine = (DeterministicTimeEngine if deterministic else TimeEngine)(step, settings)
    step.attach(engine)
    if made_scaler is not None:
        engine.state.scaler = made_scaler
    return engine


def _device_type(device: str | torch.device | None) -> str:
    if device is not None:
        return torch.device(device).type
    return "cuda" if torch.cuda.is_available() else "cpu"


def _require_one_epoch_length(engine: Engine) -> None:
    length = engine.state.epoch_length
    ranks.require_same("batches in an epoch", ranks.REFUSED if length is None else length)
