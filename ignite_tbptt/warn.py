"""Warnings at the user's own line."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from types import FrameType

import ignite
import torch

_NOT_THE_USERS = (
    os.path.dirname(__file__) + os.sep,
    os.path.dirname(ignite.__file__) + os.sep,
    os.path.dirname(torch.__file__) + os.sep,
    contextlib.__file__,
)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line outside of this package, Ignite and torch: ``trainer.run(...)``, say."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level if frame is not None else 2)
