"""The evaluator: the same walk through time without gradients, in the memory of one chunk.

It shares the splitter, the carried state and the model call with the trainer; metrics are updated chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine
from ignite.metrics import Loss, MeanAbsoluteError, MeanPairwiseDistance, MeanSquaredError, Metric

from ignite_tbptt.arguments import require_callable
from ignite_tbptt.checkpoint import TimeEngine
from ignite_tbptt.events import EpochTimeWise, Tbptt_Events, fire, register_time_events, stop_requested
from ignite_tbptt.forward import ChunkForward, call_model, check_layout, count_steps, prepare_batch, unchanged
from ignite_tbptt.hidden import HiddenCarry, warn_if_bidirectional
from ignite_tbptt.output import BatchOutput
from ignite_tbptt.policies import as_policy, check_steps
from ignite_tbptt.position import track_position
from ignite_tbptt.sequence import SplitBatch, split_sequence
from ignite_tbptt.truncation import plan_windows
from ignite_tbptt.warn import warn

_prepare_batch = prepare_batch  # the argument of that name hides the function


def prediction_and_target(x: Any, y: Any, y_pred: Any) -> tuple[Any, Any]:
    """Return (y_pred, y), as Ignite's metrics take them: the default of `output_transform`."""
    return y_pred, y


@dataclass(frozen=True)
class TbpttEvaluationStep:
    """The process function of the evaluator: one batch, chunk by chunk."""

    forward: ChunkForward
    carry: HiddenCarry
    split_batch: SplitBatch
    loss_weight: Callable[[Any, Any], Any] | None
    output_transform: Callable[[Any, Any, Any], Any]
    counts_rows: tuple[str, ...]

    def __post_init__(self) -> None:
        require_callable("output_transform", self.output_transform, "output_transform(x, y, y_pred) -> output")
        require_callable("split_batch", self.split_batch, "split_batch(batch, dim) -> (length, cut)")
        if self.loss_weight is not None:
            require_callable("loss_weight", self.loss_weight, "loss_weight(x, y) -> steps that count")

    def __call__(self, engine: Engine, batch: Any) -> Any:
        """Evaluate one batch and return its output, made of those of the chunks that count."""
        state: Any = engine.state
        length, cut = self.split_batch(batch, self.carry.dim)
        plan = plan_windows(as_policy(state.tbtt_step), length, state.iteration)
        state.time_iterations_per_sequence = len(plan)
        self._warn_if_rows_are_counted_again(len(plan))
        hidden = self.carry.through(state, plan, cut)
        output = BatchOutput()
        for window in plan:
            ((start, stop, *_),) = window
            state.time_iteration += 1
            state.window_start, state.window_stop = start, stop
            fire(engine, Tbptt_Events.TIME_ITERATION_STARTED)
            self.forward.model.eval()  # every time: a handler may have trained
            with torch.no_grad():
                x, y = self.forward.prepare(cut(start, stop - start))
                with self.forward.autocast(x):
                    y_pred, reached = self.forward.predict(x, hidden.start(x))
                hidden.reach(stop, reached)
                if state.tbptt.layout_is_unknown:
                    state.tbptt.layout_is_unknown = not check_layout(self.forward.model, x, reached, self.carry.dim)
                state.counted_steps = count_steps(self.loss_weight, x, y, stop - start)
                state.output = self.output_transform(x, y, y_pred)
            if state.counted_steps:
                output.add(state.output, state.counted_steps)
            fire(engine, Tbptt_Events.TIME_ITERATION_COMPLETED)
            if stop_requested(engine):
                break
        hidden.leave()
        state.tbptt.inside_batch = False
        state.counted_steps = output.weight
        return output.result()

    def _warn_if_rows_are_counted_again(self, chunks: int) -> None:
        if self.counts_rows and chunks > 1:
            warn(
                f"the metrics {', '.join(self.counts_rows)} divide by the rows of what they get, and with "
                f"dim={self.carry.dim} they get the same rows in each of {chunks} chunks. Give "
                "output_transform=time_steps_as_samples, or a Loss with batch_size=torch.numel."
            )


def time_steps_as_samples(x: Any, y: Any, y_pred: Any) -> tuple[Any, Any]:
    """Return (y_pred, y) with rows and time in one axis, so that a metric takes every time step for a sample.

    An `output_transform` for the evaluator, for y_pred of shape (T, B, ...) or (B, T, ...) and y alike.

    Args:
        x: not used.
        y: target, None for a chunk that has none.
        y_pred: output of the model.

    Raises:
        ValueError: the first two axes of y_pred and y are not of the same sizes.
    """
    if y is not None and y_pred.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"y_pred of shape {tuple(y_pred.shape)} and y of shape {tuple(y.shape)} must begin with the same two axes, "
            "rows and time: bring them there with model_transform and prepare_batch."
        )
    return y_pred.flatten(0, 1), y if y is None else y.flatten(0, 1)


def _counts_rows(metric: Metric, loss_weight: Any) -> bool:
    """Return whether a metric divides by the size of the first axis, which is that of the rows unless dim is 0."""
    if isinstance(metric, Loss):
        return loss_weight is None and getattr(metric, "_batch_size", None) is len
    transform = getattr(metric, "_output_transform", None)
    made_by_ignite = str(getattr(transform, "__module__", "")).startswith("ignite.")
    return made_by_ignite and isinstance(metric, (MeanAbsoluteError, MeanSquaredError, MeanPairwiseDistance))


def create_supervised_tbptt_evaluator(
    model: torch.nn.Module,
    metrics: Mapping[str, Metric] | None = None,
    tbtt_step: int = 128,
    dim: int = 0,
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., Any] = _prepare_batch,
    *,
    output_transform: Callable[[Any, Any, Any], Any] = prediction_and_target,
    model_transform: Callable[[Any], Any] = unchanged,
    model_fn: Callable[[Any, Any, Any], Any] = call_model,
    amp_mode: str | None = None,
    stateful: bool | str = False,
    initial_hidden: Callable[[Any], Any] | None = None,
    split_batch: SplitBatch = split_sequence,
    loss_weight: Callable[[Any, Any], Any] | None = None,
) -> Engine:
    """Create an evaluator that works through sequences in chunks, in the memory of one chunk.

    Metrics are updated after every chunk that has a target and computed at the end of the epoch, so they are those over
    the whole output. A metric that is attached to the engine later takes ``usage=EpochTimeWise()``. The state goes from
    chunk to chunk; the result does not depend on `tbtt_step`, unless the model is bidirectional, or a metric divides by
    rows that come again in every chunk (see below).

    Example:
        ::

            metrics = {"loss": Loss(torch.nn.functional.mse_loss, batch_size=torch.numel), "mae": MeanAbsoluteError()}
            evaluator = create_supervised_tbptt_evaluator(model, metrics, tbtt_step=500)

            @trainer.on(Events.EPOCH_COMPLETED)
            def evaluate():
                print(evaluator.run(held_out).metrics)

    Ignite's metrics take the first axis for samples. With time first that is a time step; with rows first the same rows
    come again in every chunk, so give ``output_transform=time_steps_as_samples``. `Loss` weighs what it gets by
    `batch_size`, the size of the first axis by default: ``batch_size=torch.numel`` is right for all shapes.

    Args:
        model: as for `create_supervised_tbptt_trainer`; set to eval mode.
        metrics: metrics by name, attached with the usage `EpochTimeWise`.
        tbtt_step: time steps of a chunk; as `engine.state.tbtt_step` it is read at every batch.
        dim: time axis of the tensors in a batch; may be negative.
        device: where chunks are moved to, one by one.
        non_blocking: move chunks asynchronously where the host memory is pinned.
        prepare_batch: ``prepare_batch(chunk, device=..., non_blocking=...)`` returns (x, y).
        output_transform: ``output_transform(x, y, y_pred)`` makes `engine.state.output` of a chunk, (y_pred, y) by
            default. At ITERATION_COMPLETED it is that of the chunk that has a target; where there are several, the mean
            of outputs that are numbers, and an object that raises TypeError in place of others.
        model_transform: maps y_pred to what the metrics take.
        model_fn: ``model_fn(model, x, hidden)`` calls a model that is not called ``model(x, hidden)``.
        amp_mode: "amp" for ``torch.autocast``.
        stateful: carry the hidden state from batch to batch of an epoch; as for `create_supervised_tbptt_trainer`.
        initial_hidden: ``initial_hidden(x)`` returns the state that sequences start with.
        split_batch: as for `create_supervised_tbptt_trainer`.
        loss_weight: ``loss_weight(x, y)`` returns how many time steps of a chunk count, in any unit, when there is
            padding. Metrics pass over chunks with 0, and a `Loss` weighs its values by it, in place of its
            `batch_size`. Other metrics see what `output_transform` gives them: leave padding out there.

    Returns:
        The engine; it fires TIME_ITERATION_STARTED and TIME_ITERATION_COMPLETED.

    Raises:
        TypeError: `tbtt_step` is no int: there is no gradient here for a policy to truncate. In a run, as the trainer.
        ValueError: an argument is out of its range. In a run, as the trainer.
    """
    check_steps(tbtt_step)
    if not isinstance(metrics, Mapping | None):
        raise TypeError(f"metrics must be a dict of metrics by name, got {metrics!r}.")
    metrics = metrics or {}
    step = TbpttEvaluationStep(
        forward=ChunkForward(
            model=model,
            device=device,
            non_blocking=non_blocking,
            prepare_batch=prepare_batch,
            model_fn=model_fn,
            model_transform=model_transform,
            amp_mode=amp_mode,
        ),
        carry=HiddenCarry(stateful, initial_hidden, dim, amp_mode),
        split_batch=split_batch,
        loss_weight=loss_weight,
        output_transform=output_transform,
        counts_rows=tuple(
            name
            for name, metric in metrics.items()
            if dim != 0 and output_transform is not time_steps_as_samples and _counts_rows(metric, loss_weight)
        ),
    )
    warn_if_bidirectional(model)
    engine = TimeEngine(step, {"dim": dim, "stateful": stateful})
    register_time_events(engine, Tbptt_Events.TIME_ITERATION_STARTED, Tbptt_Events.TIME_ITERATION_COMPLETED)
    engine.state.tbtt_step = tbtt_step
    track_position(engine, stateful).weighs_losses = loss_weight is not None
    for name, metric in metrics.items():
        metric.attach(engine, name, usage=EpochTimeWise())
    return engine
