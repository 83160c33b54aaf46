"""A training run for a subprocess that may be killed at any moment: python -m tests.killed_trainer FOLDER [options].

It saves a checkpoint after every batch, resumes from the newest one it finds, and ends by writing its weights.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn
from torch.nn import functional as F

from ignite_tbptt import ContiguousStreams, Tbptt_Events, create_supervised_tbptt_trainer
from tests.helpers import Forecaster


class Dropped(Forecaster):
    """With dropout, so that only a run whose random streams are restored as well can be the same."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor, hidden: object = None) -> tuple[torch.Tensor, object]:
        return super().forward(self.dropout(x), hidden)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int, default=0, help="time iteration at which the process kills itself")
    parser.add_argument("--deterministic", action="store_true", help="with dropout and a deterministic engine")
    parser.add_argument("--endless", action="store_true", help="epochs of 4 batches, where the data have 6")
    arguments = parser.parse_args(argv)

    torch.manual_seed(3)
    model = Dropped() if arguments.deterministic else Forecaster(nn.LSTM)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    trainer = create_supervised_tbptt_trainer(
        model,
        optimizer,
        F.mse_loss,
        4,
        stateful="data" if arguments.endless else True,
        deterministic=arguments.deterministic,
    )
    streams = ContiguousStreams((torch.randn(230, 3), torch.randn(230, 2)), rows=5, steps=9)
    to_save = {"trainer": trainer, "model": model, "optimizer": optimizer}
    saver = Checkpoint(to_save, DiskSaver(str(arguments.folder), require_empty=False), n_saved=2)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, saver)

    @trainer.on(Tbptt_Events.BACKWARD_COMPLETED)
    def kill() -> None:
        if arguments.kill_at and trainer.state.time_iteration == arguments.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    found = sorted(arguments.folder.glob("checkpoint_*.pt"), key=lambda path: int(path.stem.split("_")[1]))
    if found:
        Checkpoint.load_objects(to_save, torch.load(found[-1], weights_only=True))
        trainer.run(streams)
    else:
        epochs = {"max_epochs": 4, "epoch_length": 4} if arguments.endless else {"max_epochs": 3}
        trainer.run(streams, **epochs)
    torch.save({"weights": model.state_dict(), "counted": trainer.state.time_iteration}, arguments.folder / "final.pt")


if __name__ == "__main__":
    main()
