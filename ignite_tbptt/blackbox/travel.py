"""Programs as bytes, for workers that are other processes.

The idea: a program is pickled once, whatever the number of its evaluations, and read once by each worker, which keeps
it under its name. To a worker that has it already its name alone may be sent. Tensors travel as arrays, which takes a
seventh of the time, and share no memory with a worker, so that no file descriptor is held for each. Pairs with `task`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import pickle
import threading
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["AbsentProgramError", "Packed", "as_arrays", "as_tensors", "packed", "unpacked"]

_IN_NUMPY = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.bool)

# So many programs are kept by a worker, those that were used last.
_KEPT = 8
_READ: dict[bytes, Any] = {}
_LOCK = threading.Lock()
_WRITTEN: weakref.WeakKeyDictionary[Any, Packed] = weakref.WeakKeyDictionary()


class AbsentProgramError(LookupError):
    """A worker was sent the name of a program that it does not have."""


class Packed(NamedTuple):
    """A program as it travels.

    Attributes:
        name: equal where the bytes are.
        data: the bytes, None where the worker should have them.
    """

    name: bytes
    data: bytes | None


def packed(program: Any) -> Packed:
    """The bytes of a program, made at the first call."""
    if isinstance(program, Packed):
        return program
    found = _WRITTEN.get(program)
    if found is None:
        data = _pickled(program)
        found = _WRITTEN[program] = Packed(hashlib.sha256(data).digest(), data)
    return found


def unpacked(program: Packed) -> Any:
    """The program; where it is absent, one that raises `AbsentProgramError` when it is called."""
    with _LOCK:
        found = _READ.pop(program.name, None)
        if found is None and program.data is None:
            return _absent
        _READ[program.name] = found = pickle.loads(program.data) if found is None else found  # type: ignore[arg-type]
        while len(_READ) > _KEPT:
            del _READ[next(iter(_READ))]
    return found


def as_arrays(tensors: Iterable[Tensor]) -> list[Any]:
    """Arrays in the place of the tensors whose strides and types they keep."""
    return [
        t.numpy() if t.is_contiguous() and t.dtype in _IN_NUMPY and t.device.type == "cpu" and type(t) is Tensor else t
        for t in tensors
    ]


def as_tensors(arrays: Iterable[Any]) -> list[Tensor]:
    """The tensors again, in memory that is aligned as torch's is: sums are rounded alike then."""
    return [torch.from_numpy(a).clone() if isinstance(a, np.ndarray) else a for a in arrays]


def _absent(*tensors: Any) -> Any:
    raise AbsentProgramError("the worker does not have the program")


def _pickled(program: Any) -> bytes:
    try:
        return pickle.dumps(program)
    except Exception:
        with contextlib.suppress(ImportError):  # comes with loky and Dask
            return bytes(importlib.import_module("cloudpickle").dumps(program))
        raise
