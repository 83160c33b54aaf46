"""Functions at the top level of a module, which can be sent to processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ignite_tbptt.blackbox import blackbox


# Of operations that round alike whatever the size of an array, so that stacks may be compared bit for bit.
def wave(x: Any, w: Any) -> Any:
    return np.sqrt(1 + x * w) + 0.1 * x * x


def cumulated(x: Any) -> Any:
    return np.cumsum(x) * x.sum()


def recurrent(x: Any, h: Any) -> Any:
    return np.tanh(x + 0.5 * h)


def rooted(x: Any) -> Any:
    """Defined on one side of zero."""
    return np.where(x < 0, np.nan, x) * np.sqrt(np.abs(x) + 1)


def squared(x: Tensor) -> Tensor:
    return (x * x).detach()


def squared_beside_a_thread(x: Tensor) -> Tensor:
    """Where it runs something else draws random numbers."""
    if multiprocessing.parent_process() is not None:
        other = threading.Thread(target=random.random)
        other.start()
        other.join()
    return squared(x)


class Busy:
    """Squares, and takes its time."""

    def __init__(self, milliseconds: float) -> None:
        self.seconds = milliseconds / 1000

    def __call__(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return squared(x)


class Table:
    """An object that is passed through."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


def looked_up(x: Tensor, table: Table) -> Tensor:
    return (x * table.values[: len(x)]).detach()


def noisy_wave(x: Tensor) -> Tensor:
    """Draws from a global stream, the same for all evaluations of a call."""
    return (x.sin() * torch.rand(x.shape, dtype=x.dtype)).detach()


class Once:
    """Fails in one of the ways, each the first time that it is called away from x."""

    def __init__(self, folder: Path, how: str) -> None:
        self.folder, self.how = folder, how

    def __call__(self, x: Any) -> Any:
        if not np.array_equal(x, np.array([0.5, 1.0, 1.5])):
            try:
                (self.folder / self.how).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                self.fail()
        return np.exp(x)

    def fail(self) -> None:
        if self.how == "raise":
            raise OSError("the licence server is busy")
        if self.how == "hang":
            time.sleep(2.0)
        if self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)


def noisy_away_from_one(x: Tensor) -> Tensor:
    return x.detach() ** 2 + (0 if bool((x == 1).all()) else torch.rand(()))


@blackbox
def decorated(x: Tensor) -> Tensor:
    return (x * 3).cos().detach()


def of_many(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.detach() for tensor in tensors]).prod(0)


def changes_its_input(x: Tensor) -> Tensor:
    x.mul_(2)
    return x.detach().clone().sin()


class UnsendableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} {two}")


def raises_what_cannot_be_pickled(x: Tensor) -> Tensor:
    if bool((x != 1).any()):
        raise UnsendableError(7, 8)
    return x.detach()


class Simulator(nn.Module):
    """With a weight that is shared, one that is frozen, a buffer and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.frozen = nn.Linear(3, 3).double(), nn.Linear(3, 2).double().requires_grad_(False)
        self.tied, self.dropout = self.layer, nn.Dropout(0.3)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = torch.from_numpy(np.tanh(self.tied(self.layer(x)).detach().numpy()))
        out: Tensor = self.frozen(self.dropout(y)) * self.calls
        return out
