"""Functions at the top level of a module, which can be sent to processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def wave(x: Any, w: Any) -> Any:
    return np.sin(x * w) + 0.1 * x**2


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
