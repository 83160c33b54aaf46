"""What each of two ranks does in a subprocess: python -m tests.two_ranks CASE FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.handlers import TerminateOnNan
from torch.nn import functional as F

from ignite_tbptt import (
    AdaptiveTruncation,
    ContiguousStreams,
    FullBackpropagation,
    GradientHorizon,
    Tbptt_Events,
    create_supervised_tbptt_trainer,
)
from tests.helpers import Forecaster, batches, seeded, sgd


def masked_mse(y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    valid = ~y.isnan()
    return ((y_pred - y)[valid] ** 2).mean()


def padded_stream() -> tuple[torch.Tensor, torch.Tensor]:
    from tests.test_distributed import stream

    x, y = (part.double() for part in stream())
    y[44:60] = float("nan")  # of the four rows of 20 steps the third, in rank 1's half, from its step 4 on
    y[60:71] = float("nan")  # and the fourth up to its step 11: rank 1 has nothing in steps 4 to 11
    return x, y


def main(rank: int, case: str, folder: str) -> None:
    torch.set_num_threads(1)
    model = seeded(Forecaster).double()
    parallel: Any = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=case == "recomputed_unused")
    arguments: dict[str, Any] = {"loss_fn": F.mse_loss, "tbtt_step": 4}
    data: Any
    if case in ("rows", "padding"):
        from tests.test_distributed import stream

        source = padded_stream() if case == "padding" else tuple(part.double() for part in stream())
        data = ContiguousStreams(source, rows=2, steps=7)
        arguments["stateful"] = True
    else:
        seed = rank if case == "horizon" else 0
        data = [tuple(part.double() for part in batch) for batch in batches(3, steps=10, seed=seed)]
    if case == "padding":
        arguments |= {
            "loss_fn": masked_mse,
            "loss_weight": lambda x, y: (~y.isnan()).sum(),
            "gradient_accumulation_steps": "sequence",
        }
    if case == "windows" and rank == 1:
        arguments["tbtt_step"] = 5
    if case == "refused" and rank == 0:
        data = [tuple(part[:0] for part in batch) for batch in data]
    if case == "batches" and rank == 1:
        data = data[:2]
    if case == "horizon_short" and rank == 1:
        data = [tuple(part[:8] for part in batch) for batch in data]
    if case == "horizon_lengths":
        arguments["tbtt_step"] = 5
        data = [tuple(part[: 10 - rank] for part in batch) for batch in data]
    if case == "horizon_no_loss" and rank == 1:
        arguments["loss_weight"] = lambda x, y: 0
    if case == "nan" and rank == 0:
        data[1][1][5] = float("nan")
    if case in ("recomputed", "recomputed_unused"):
        arguments |= {"tbtt_step": FullBackpropagation(4), "checkpoint_segments": True}
    trainer = create_supervised_tbptt_trainer(parallel, sgd(model), **arguments)
    trainer.add_event_handler(Tbptt_Events.BACKWARD_COMPLETED, TerminateOnNan())
    if case.startswith("horizon"):
        horizon = GradientHorizon(9 if case == "horizon_lengths" else 10, samples=4, tolerance=0.01)
        horizon.attach(trainer)
        if case != "horizon_lengths":
            AdaptiveTruncation(horizon, 0.01, 1, 10).attach(trainer)
    try:
        trainer.run(data, max_epochs=2)
    except (ValueError, RuntimeError) as error:
        (Path(folder) / f"{case}_{rank}.txt").write_text(str(error))
    else:
        assert trainer.state.time_iteration == trainer.state.optimizer_step or case in ("nan", "padding")
        saved: dict[str, Any] = model.state_dict()
        if case.startswith("horizon"):
            saved = {
                **saved,
                "phi": torch.tensor(horizon.decay.phi),
                "tbtt_step": torch.tensor(trainer.state.tbtt_step),
            }
        torch.save(saved, Path(folder) / f"{case}_{rank}.pt")
    idist.barrier()


if __name__ == "__main__":
    # Ranks meet in a file: a port could be another run's, and with it would go the rank that serves it.
    meeting = f"file://{sys.argv[2]}/{sys.argv[1]}_meeting"
    parallel = idist.launcher.Parallel
    with parallel(backend="gloo", nproc_per_node=2, init_method=meeting, start_method="spawn") as spawned:
        spawned.run(main, sys.argv[1], sys.argv[2])
