"""Tasks and results as bytes, for pools whose workers are other processes.

The idea: what is pickled here does not share memory with a worker, so that no file descriptor is held for each tensor.
A worker reads a function once and keeps it. What a worker's own random streams would hide, and errors that cannot be
pickled, are told in the result. Pairs with `executors`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ignite_tbptt.blackbox.task import Result, Task
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["as_bytes", "received", "run_elsewhere"]


def as_bytes(function: Callable[[Task], Result], task: Task) -> tuple[bytes, bytes]:
    """A program, and the rest of a task of it, for `run_elsewhere`."""
    return _pickled(task.program), pickle.dumps((function, replace(task, program=None)))  # type: ignore[arg-type]


def _pickled(program: Any) -> bytes:
    try:
        return pickle.dumps(program)
    except Exception:
        with contextlib.suppress(ImportError):  # comes with loky and Dask
            return bytes(importlib.import_module("cloudpickle").dumps(program))
        raise


@functools.lru_cache(maxsize=8)
def _program(data: bytes) -> Any:
    return pickle.loads(data)


def run_elsewhere(program: bytes, rest: bytes) -> bytes:
    """Run a task on a worker."""
    function, task = pickle.loads(rest)
    streams = RandomStreams.latest() if task.streams is None else None
    result = function(replace(task, program=_program(program)))
    drew = streams is not None and streams.have_moved()
    try:
        sent = pickle.dumps((drew, result))
        if result.error is not None:
            pickle.loads(sent)  # where this fails in the process of the pool, the pool breaks
    except Exception as error:
        if result.error is None:
            told: Exception = TypeError(
                f"its outputs cannot be sent back ({error}): return tensors, arrays and numbers"
            )
        else:
            told = RuntimeError(f"{type(result.error).__name__}: {result.error}")
        sent = pickle.dumps((drew, Result(None, told, result.seconds)))
    return sent


def received(sent: bytes) -> Result:
    """The result that `run_elsewhere` sent."""
    drew, result = pickle.loads(sent)
    if drew:
        # Whether a function draws is seen by its trace in the streams of this process.
        torch.rand(())
    assert isinstance(result, Result)
    return result
