"""Checks of arguments, made where they are given and not where they are used."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["require_callable", "require_dim", "require_seed"]


def require_callable(name: str, value: Any, form: str) -> None:
    """Refuse what cannot be called.

    Args:
        name: of the argument.
        value: what came.
        form: how it is called, and what it returns.

    Raises:
        TypeError: it is no function; the class of a module, a call of which makes a module, is none.
    """
    if isinstance(value, type) and issubclass(value, torch.nn.Module):
        raise TypeError(f"{name} must be {form}, got the class {value.__name__}: make one, {value.__name__}() say.")
    if not callable(value):
        raise TypeError(f"{name} must be {form}, got {value!r}, which cannot be called.")


def require_dim(name: str, value: Any) -> None:
    """Refuse what is no axis.

    Raises:
        TypeError: it is no int.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, the axis of time in the tensors of a batch, got {value!r}.")


def require_seed(seed: Any) -> None:
    """Refuse what seeds nothing: a float would be cut off.

    Raises:
        TypeError: it is no int.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an int, got {seed!r}: it is what random numbers are drawn from; 0 is the usual")
