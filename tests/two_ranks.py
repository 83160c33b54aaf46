"""What each of two ranks does in the cases of test_distributed: python -m tests.two_ranks FOLDER.

One launch serves all cases. The result of each is saved as CASE_RANK.pt: a dict with what it returned, or with the
"error" that it raised.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Events
from ignite.handlers import TerminateOnNan
from torch import Tensor
from torch.nn import functional as F

from ignite_tbptt import (
    AdaptiveTruncation,
    AnticipatedReweightedTruncation,
    ContiguousStreams,
    FullBackpropagation,
    GradientHorizon,
    Tbptt_Events,
    create_supervised_tbptt_trainer,
)
from tests.helpers import Forecaster, batches, seeded, sgd

Case = Callable[[int], dict[str, Any]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def stream(steps: int = 80) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(steps, 3, generator=generator), torch.randn(steps, 2, generator=generator)
    return x.double(), y.double()


def masked_mse(y_pred: Tensor, y: Tensor) -> Tensor:
    valid = ~y.isnan()
    return ((y_pred - y)[valid] ** 2).mean()


def valid_entries(x: Tensor, y: Tensor) -> Tensor:
    return (~y.isnan()).sum()


def padded_stream() -> tuple[Tensor, Tensor]:
    x, y = stream()
    y[44:60] = float("nan")  # of the four rows of 20 steps the third, in rank 1's half, from its step 4 on
    y[60:71] = float("nan")  # and the fourth up to its step 11: rank 1 has nothing in steps 4 to 11
    return x, y


def double_batches(count: int = 3, steps: int = 10, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y.double()) for x, y in batches(count, steps=steps, seed=seed)]


_MASKED: dict[str, Any] = {"loss_fn": masked_mse, "loss_weight": valid_entries, "stateful": True}
PADDED: dict[str, dict[str, Any]] = {
    "padded_sequence": {**_MASKED, "gradient_accumulation_steps": "sequence"},
    "padded_window": _MASKED,
    "padded_windows": {**_MASKED, "gradient_accumulation_steps": 2},
    "padded_full": {**_MASKED, "tbtt_step": FullBackpropagation(4)},
}
"""Trainers on a stream of which one rank has little that counts; the truth is one process with all rows."""

WHOLE: dict[str, dict[str, Any]] = {
    "rows": {"stateful": True},
    "accumulated": {"stateful": True, "gradient_accumulation_steps": 3},
    "recomputed": {"tbtt_step": FullBackpropagation(4), "checkpoint_segments": True},
    "random": {"tbtt_step": AnticipatedReweightedTruncation(2, alpha=4, mean=5)},
}


def train(model: Any, data: Any, loss_fn: Any = F.mse_loss, tbtt_step: Any = 4, **kwargs: Any) -> Any:
    trainer = create_supervised_tbptt_trainer(model, sgd(model), loss_fn, tbtt_step, **kwargs)
    trainer.run(data, max_epochs=2)
    return trainer


def parallel(rank: int, **kwargs: Any) -> tuple[Any, Any]:
    model = seeded(Forecaster).double()
    return model, torch.nn.parallel.DistributedDataParallel(model, **kwargs)


def on_a_stream(source: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> Case:
    def run(rank: int) -> dict[str, Any]:
        model, wrapped = parallel(rank)
        train(wrapped, ContiguousStreams(source, rows=2, steps=7), **kwargs)
        return dict(model.state_dict())

    return run


CASES |= {name: on_a_stream(padded_stream(), kwargs) for name, kwargs in PADDED.items()}
CASES |= {name: on_a_stream(stream(), kwargs) for name, kwargs in WHOLE.items()}


@case
def recomputed_unused(rank: int) -> dict[str, Any]:
    """Looking for unused parameters puts an operation of its own into the graph."""
    model, wrapped = parallel(rank, find_unused_parameters=True)
    train(wrapped, double_batches(), tbtt_step=FullBackpropagation(4), checkpoint_segments=True)
    return dict(model.state_dict())


@case
def windows(rank: int) -> dict[str, Any]:
    train(parallel(rank)[1], double_batches(), tbtt_step=4 + rank)
    return {}


@case
def refused(rank: int) -> dict[str, Any]:
    train(parallel(rank)[1], [tuple(part[: 10 * rank] for part in batch) for batch in double_batches()])
    return {}


@case
def number_of_batches(rank: int) -> dict[str, Any]:
    train(parallel(rank)[1], double_batches(3 - rank))
    return {}


@case
def number_of_batches_not_known(rank: int) -> dict[str, Any]:
    train(parallel(rank)[1], iter(double_batches(3 - rank)))
    return {}


@case
def no_target_on_one_rank(rank: int) -> dict[str, Any]:
    data = [(x, y if rank == 0 else None) for x, y in double_batches()]
    train(parallel(rank)[1], data)
    return {}


@case
def failing_handler(rank: int) -> dict[str, Any]:
    _, wrapped = parallel(rank)
    trainer = create_supervised_tbptt_trainer(wrapped, sgd(wrapped), F.mse_loss, 4)
    if rank == 1:
        trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED(once=2), lambda: 1 / 0)
    trainer.run(double_batches())
    return {}


@case
def one_rank_interrupted(rank: int) -> dict[str, Any]:
    _, wrapped = parallel(rank)
    trainer = create_supervised_tbptt_trainer(wrapped, sgd(wrapped), F.mse_loss, 4)
    if rank == 1:
        trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED(once=2), lambda engine: engine.interrupt())
    trainer.run(double_batches())
    return {}


STOPS: dict[str, tuple[str, Any]] = {
    f"{how}_at_{name}": (how, event)
    for how in ("terminate", "terminate_epoch")
    for name, event in {
        "started": Tbptt_Events.TIME_ITERATION_STARTED(once=5),
        "backward": Tbptt_Events.BACKWARD_COMPLETED(once=5),
        "window": Tbptt_Events.TIME_ITERATION_COMPLETED(once=5),
        "last_window": Tbptt_Events.TIME_ITERATION_COMPLETED(once=9),
        "batch": Events.ITERATION_COMPLETED(once=2),
        "last_batch": Events.ITERATION_COMPLETED(once=3),
        "epoch": Events.EPOCH_COMPLETED(once=1),
    }.items()
}
"""One rank asks to stop at an event; both are to stop there."""


def stopped_by(stopping: int | None, how: str, event: Any) -> Case:
    def run(rank: int) -> dict[str, Any]:
        model, wrapped = parallel(rank)
        trainer = create_supervised_tbptt_trainer(wrapped, sgd(wrapped), F.mse_loss, 4)
        if stopping in (None, rank):
            trainer.add_event_handler(event, lambda engine: getattr(engine, how)())
        trainer.run(double_batches(3), max_epochs=3)
        return {**model.state_dict(), "steps": torch.tensor(trainer.state.optimizer_step)}

    return run


for name, (how, event) in STOPS.items():
    CASES[name] = stopped_by(1, how, event)
    CASES[f"both_{name}"] = stopped_by(None, how, event)


@case
def nan_on_one_rank(rank: int) -> dict[str, Any]:
    data = double_batches()
    if rank == 0:
        data[1][1][5] = float("nan")
    model, wrapped = parallel(rank)
    trainer = create_supervised_tbptt_trainer(
        wrapped, sgd(wrapped), F.mse_loss, 4, gradient_accumulation_steps="sequence"
    )
    trainer.add_event_handler(Tbptt_Events.BACKWARD_COMPLETED, TerminateOnNan())
    trainer.run(data, max_epochs=2)
    return dict(model.state_dict())


@case
def alone(rank: int) -> dict[str, Any]:
    """Rank 0 trains a model of its own, the other does not."""
    if rank == 0:
        model = seeded(Forecaster).double()
        train(model, double_batches(), gradient_accumulation_steps=2)
        return dict(model.state_dict())
    return {}


@case
def collectives(rank: int) -> dict[str, Any]:
    """Count them for a step on every window, and for one on three."""
    return {"counts": torch.tensor([count_collectives(rank, accumulate) for accumulate in (1, 3)])}


def count_collectives(rank: int, accumulate: int) -> tuple[int, int, int]:
    _, wrapped = parallel(rank)
    trainer = create_supervised_tbptt_trainer(
        wrapped, sgd(wrapped), F.mse_loss, 4, gradient_accumulation_steps=accumulate
    )
    reductions: list[int] = []
    wrapped.register_comm_hook(reductions, count_reductions)
    with mock.patch.object(dist, "all_gather", side_effect=dist.all_gather) as gather:
        trainer.run(double_batches(4), max_epochs=2)
    return gather.call_count, len(reductions), trainer.state.optimizer_step


def count_reductions(calls: list[int], bucket):  # type: ignore[no-untyped-def]  # DDP reads the annotations
    # No callback in Python for the threads of gloo: one that comes to an end while Python does aborts the process.
    calls.append(1)
    mean: torch.Tensor = bucket.buffer() / 2
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    dist.all_reduce(mean)
    done.set_result(mean)
    return done


def measured(rank: int, data: Any, window: int, adapt: bool, **kwargs: Any) -> dict[str, Any]:
    model, wrapped = parallel(rank)
    trainer = create_supervised_tbptt_trainer(wrapped, sgd(wrapped), F.mse_loss, kwargs.pop("tbtt_step", 4), **kwargs)
    horizon = GradientHorizon(window, samples=4, tolerance=0.01)
    horizon.attach(trainer)
    if adapt:
        AdaptiveTruncation(horizon, 0.01, 1, 10).attach(trainer)
    trainer.run(data, max_epochs=2)
    return {
        **model.state_dict(),
        "phi": torch.tensor(horizon.decay.phi),
        "tbtt_step": torch.tensor(trainer.state.tbtt_step),
    }


@case
def horizon(rank: int) -> dict[str, Any]:
    return measured(rank, double_batches(seed=rank), 10, True)


@case
def horizon_lengths(rank: int) -> dict[str, Any]:
    data = [tuple(part[: 10 - rank] for part in batch) for batch in double_batches()]
    return measured(rank, data, 9, False, tbtt_step=5)


@case
def horizon_short(rank: int) -> dict[str, Any]:
    return measured(rank, [tuple(part[: 10 - 2 * rank] for part in batch) for batch in double_batches()], 10, True)


@case
def horizon_no_loss(rank: int) -> dict[str, Any]:
    return measured(rank, double_batches(), 10, True, loss_weight=(lambda x, y: 0) if rank else None)


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for name, run in CASES.items():
        try:
            result = run(rank)
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        torch.save(result, Path(folder) / f"{name}_{rank}.pt")
        idist.barrier()


if __name__ == "__main__":
    # Ranks meet in a file: a port could be another run's, and with it would go the rank that serves it.
    with idist.launcher.Parallel(
        backend="gloo",
        nproc_per_node=2,
        init_method=f"file://{sys.argv[1]}/meeting",
        start_method="spawn",
        timeout=timedelta(seconds=60),
    ) as spawned:
        spawned.run(main, sys.argv[1])
