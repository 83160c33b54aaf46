"""What stays the same from call to call: one frozen object behind all three ways in."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from ignite_tbptt.blackbox.auto import AutoEstimator
from ignite_tbptt.blackbox.estimator import CentralDifference, Estimator
from ignite_tbptt.blackbox.executors import Pool, Workers
from ignite_tbptt.blackbox.progress import Progress
from ignite_tbptt.blackbox.random_directions import Gaussian
from ignite_tbptt.blackbox.rows import Rows
from ignite_tbptt.blackbox.step_size import require_positive
from ignite_tbptt.blackbox.task import (
    Executor,
    Result,
    SerialEvaluation,
    StackedEvaluation,
    Task,
    alike_on_all_ranks,
    begins_ahead,
    require_executor,
    run,
)

__all__ = ["Certify", "Options", "make_options"]

_NOT_SHOWN = contextlib.nullcontext()


@dataclass(frozen=True)
class Certify:
    """Which gradients are certified, and where a warning is due: ``certify=Certify(10, tolerance=0.1)``.

    Args:
        every: the first of so many gradients is certified; ``certify=10`` is short for ``Certify(10)``.
        tolerance: the relative error above which a warning is given, see `Certificate`; no warning by default.

    Raises:
        ValueError: every below 1, or a tolerance that is not positive and finite.
    """

    every: int
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(
                f"certify must be a whole number of gradients, the first of which is certified, got {self.every!r}; "
                "give certify=10 to spend about a tenth more, or leave it out"
            )
        if self.tolerance is not None:
            require_positive("tolerance", self.tolerance, "leave it out, and certificates are kept without a warning")


@dataclass(frozen=True)
class Options:
    """See `function.blackbox` for each."""

    estimator: Estimator
    executor: Executor
    in_dims: Any
    out_dims: int | Sequence[int | None] | None
    dtype: torch.dtype | None
    numpy: bool
    repeatable: bool
    is_default: bool = False
    """Whether no step was asked for, so that the step is measured where the default one does not suit."""
    vectorized: bool = True
    shown: contextlib.AbstractContextManager[None] = _NOT_SHOWN
    """Told when a gradient begins and ends."""
    certify: Certify | None = None
    ahead: str = ""
    """Where evaluations begin when a call is made, see `task.begins_ahead`."""

    def first(self, task: Task) -> Result:
        """The call itself: made in the caller's thread, unless its rows are evaluated one by one."""
        if self.vectorized:
            return run(task)
        (result,) = self.executor(run, [task])
        return result

    @property
    def must_stack(self) -> bool:
        """Whether stacking was asked for, and its impossibility is an error."""
        return isinstance(self.executor, StackedEvaluation) and self.executor.required

    @property
    def rank(self) -> int:
        """Whose random directions are drawn: this rank's own, or those that all ranks have in common."""
        alone = alike_on_all_ranks(self.executor) or not (dist.is_available() and dist.is_initialized())
        return 0 if alone else dist.get_rank()

    @property
    def device(self) -> str | None:
        """Where the function is evaluated, None for where its arguments are."""
        return "cpu" if self.numpy else None


def _on_pool(executor: Any) -> Any:
    require_executor(executor)
    if isinstance(executor, (SerialEvaluation, StackedEvaluation)):
        return replace(executor, executor=_on_pool(executor.executor))
    return Workers(executor) if hasattr(executor, "submit") and not isinstance(executor, type) else executor


def make_options(
    *,
    estimator: Estimator | Literal["auto"] | None,
    executor: Executor | Pool | None,
    in_dims: Any,
    out_dims: int | Sequence[int | None] | None,
    repeatable: bool,
    evaluator: Executor | None,
    dtype: torch.dtype | None = None,
    numpy: bool = False,
    vectorized: bool = True,
    progress: bool = False,
    certify: int | Certify | None = None,
) -> Options:
    """Options with their defaults, checked.

    Raises:
        TypeError: an estimator or executor that is none, or a dtype that is not of floating point.
    """
    if evaluator is not None:
        warnings.warn("evaluator= is now called executor=", DeprecationWarning, stacklevel=3)
        executor = evaluator if executor is None else executor
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a torch dtype of floating point, got {dtype!r}: differences need small steps")
    is_default = estimator is None or estimator == "auto"
    if isinstance(estimator, str):
        if estimator != "auto":
            raise ValueError(
                f'estimator must be an Estimator or "auto", got {estimator!r}: make one, CentralDifference() say'
            )
        estimator = AutoEstimator()
    if estimator is not None and not isinstance(estimator, Estimator):
        remedy = "make one by calling it, say CentralDifference()"
        if hasattr(estimator, "moves") and not isinstance(estimator, type):
            remedy = f"these are directions, which an estimator takes; give Estimator(directions={estimator!r})"
        raise TypeError(f"estimator must be an Estimator, got {estimator!r}: {remedy}")
    if certify is not None:
        certify = certify if isinstance(certify, Certify) else Certify(certify)
        if estimator is not None and isinstance(estimator.directions, Gaussian):
            raise ValueError(
                "certify compares a gradient with slopes of the function, and Gaussian directions estimate the "
                "gradient of a smoothed one: leave certify out, or use SPSA(n)"
            )
    runs: Any = None if executor is None else _on_pool(executor)
    if not vectorized:
        runs = _by_rows(runs, in_dims, out_dims)
    if in_dims is None and isinstance(runs, StackedEvaluation) and runs.required:
        raise ValueError(
            "StackedEvaluation needs to know which axis the rows are at, and that they are independent: give in_dims, "
            "as in torch.vmap, or use SerialEvaluation()"
        )
    if dtype is None and numpy:
        dtype = torch.float64
    runs = StackedEvaluation(required=False) if runs is None else runs
    shown: contextlib.AbstractContextManager[None] = _NOT_SHOWN
    if progress:
        packing = runs if isinstance(runs, (SerialEvaluation, StackedEvaluation)) else None
        shown = bar = Progress(runs if packing is None else cast("Executor", packing.executor))
        runs = bar if packing is None else replace(packing, executor=bar)
    return Options(
        CentralDifference() if estimator is None else estimator,
        runs,
        in_dims,
        out_dims,
        dtype,
        numpy,
        repeatable,
        is_default,
        vectorized,
        shown,
        certify,
        begins_ahead(runs),
    )


def _by_rows(executor: Any, in_dims: Any, out_dims: int | Sequence[int | None] | None) -> SerialEvaluation:
    if isinstance(executor, StackedEvaluation):
        raise ValueError(
            "vectorized=False evaluates one row a call, and StackedEvaluation several points: give one of the two; "
            "executor=ThreadPoolExecutor(16) evaluates rows at the same time"
        )
    if in_dims is None:
        raise ValueError(
            "vectorized=False evaluates rows one by one, and has to know which axis they are at: give in_dims, as in "
            "torch.vmap"
        )
    packing = executor if isinstance(executor, SerialEvaluation) else SerialEvaluation(executor=executor or map)
    return replace(packing, executor=Rows(cast("Executor", packing.executor), out_dims))
