"""The factories: an Ignite engine, or its process function, for truncated back-propagation through time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ignite_tbptt.checkpoint import DeterministicTimeEngine, TimeEngine, serialized_tbtt_step
from ignite_tbptt.forward import ChunkForward, call_model, prepare_batch, unchanged, warn_if_underflow
from ignite_tbptt.hidden import HiddenCarry, detach_hidden, warn_if_bidirectional
from ignite_tbptt.optimization import OptimizerStep, as_accumulation, reduction_of
from ignite_tbptt.policies import check_tbtt_step, warn_if_normalised
from ignite_tbptt.ranks import Ranks
from ignite_tbptt.recompute import Recompute, RerunCheck
from ignite_tbptt.sequence import SplitBatch, split_sequence
from ignite_tbptt.training_step import TbpttTrainingStep, loss_item
from ignite_tbptt.truncation import TruncationPolicy

_prepare_batch = prepare_batch  # the arguments of that name hide the function


def _detach(hidden: Any) -> Any:
    return detach_hidden(hidden)  # found anew at every call, because tests of other projects patch it in this module


def supervised_tbptt_training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
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
    stateful: bool | str = False,
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
        step=OptimizerStep(optimizer, scaler, (model, loss_fn)),
        accumulation=as_accumulation(gradient_accumulation_steps),
        reduction=reduction_of(loss_fn),
        ranks=Ranks(model),
        tbtt_step=tbtt_step,
        loss_fn=loss_fn,
        loss_weight=loss_weight,
        output_transform=output_transform,
        split_batch=split_batch,
        carry=HiddenCarry(stateful, initial_hidden, dim, amp_mode, _detach),
        recompute=Recompute(model, loss_fn, model_fn, model_transform) if checkpoint_segments else None,
        check_rerun=RerunCheck(model, loss_fn, model_fn, model_transform),
    )


def create_supervised_tbptt_trainer(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
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
    stateful: bool | str = False,
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

    `engine.state` has, besides Ignite's:

    - `time_iteration`, `optimizer_step`: counters over the run;
    - `time_iterations_per_sequence`: windows of the batch in hand;
    - `window_start`, `window_stop`: the time steps of the window in hand, in its batch;
    - `hidden`: the state that the next window starts from, which handlers may read and replace;
    - `tbtt_step`: read at every batch, so a parameter scheduler can change it;
    - `output`, `counted_steps`: the window's output and the time steps that its loss is a mean over, None and 0 for a
      window without a loss; at ITERATION_COMPLETED those of the batch, with the mean of outputs that are numbers;
      at BACKWARD_COMPLETED `output` is the mean over the windows that share the step.

    Metrics and `TerminateOnNan` pass over an output of None.

    Args:
        model: called as ``model(x)`` for the first chunk of a sequence and ``model(x, hidden)`` from then on; returns
            ``(y_pred, hidden)``. The hidden state is any nest of tensors, None inside included.
        optimizer: steps once for every window, or as `gradient_accumulation_steps` says.
        loss_fn: ``loss_fn(y_pred, y)`` returns a scalar, the mean over the chunk; or the sum, where its attribute or
            bound argument `reduction` is "sum", as in ``MSELoss(reduction="sum")``.
        tbtt_step: time steps of a chunk (the last may be shorter), or a truncation policy: ``FixedTruncation(50,
            minimum=5)`` joins a tail of less than 5 steps to the chunk before it. For chunks that grow attach
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
        gradient_accumulation_steps: windows that share an optimizer step, over batches if need be, on the mean loss
            over the time steps that count in them. Windows left over at the end of an epoch are stepped on too.
            "sequence": one step a batch, the gradient of the mean loss over the whole sequence, truncated.
        amp_mode: "amp" for forward and loss under ``torch.autocast``, in the dtype of ``torch.get_autocast_dtype``:
            bfloat16 on CPU and float16 on CUDA, unless ``torch.set_autocast_dtype`` chose another.
        scaler: a ``torch.amp.GradScaler``, or True to have one made, as `engine.state.scaler`.
        deterministic: make the engine a `DeterministicEngine`, which resumes with its random streams.
        stateful: carry the hidden state from batch to batch of an epoch: row i of a batch goes on where row i of the
            one before ended (`ContiguousStreams`). It is reset where an epoch starts and where the data begin anew;
            with "data" only where the data begin anew, for endless data whose epochs are evaluation intervals. The
            carried state is in the trainer's state dict, for the rows of this rank: on several ranks let each save its
            own (`Checkpoint`'s save_on_rank).
        initial_hidden: ``initial_hidden(x)`` returns the state that sequences start with, x being the first chunk.
            Parameters in it are trained.
        split_batch: ``split_batch(batch, dim)`` returns the length and the chunks; see `split_sequence`, also for
            entries without a time axis and many-to-one targets.
        loss_weight: ``loss_weight(x, y)`` returns how many time steps of a chunk count, in any unit, when there is
            padding; `loss_fn` is expected to be the mean over those. A window with 0 advances the state: its loss is
            not computed, no step is taken for it alone, and its output is None.
        checkpoint_segments: keep of each segment only its inputs and the state it starts from, and run it again for
            its gradient: the activations of one segment at a time, for one more forward pass. The result is the same,
            random numbers, buffers and attributes included, but for the order in which gradients are summed. For
            windows of many segments, as `FullBackpropagation` has them. Segments that lead to anything but parameters
            of `model` and `loss_fn`, or to parameters with hooks, are left to ``torch.utils.checkpoint``, which takes
            longer. A second run that gives other values, from a state out of reach, raises RuntimeError.

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
        Data may have ``resume_at(batch)``, called before they are iterated over in a resumed run, and
        ``fingerprint()``, a dict of numbers and strings that must be the same there; `ContiguousStreams` has both.

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
        "tbtt_step": serialized_tbtt_step(tbtt_step),
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
