"""Way in 1: a function that autograd cannot see through, made differentiable.

The idea: the forward is one plain call on copies; the backward asks an estimator where the function is to be evaluated
again and contracts what comes out with the cotangent. `blackbox` takes any function of nested arguments.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast, overload

import torch
from torch import nn

from ignite_tbptt.blackbox.certificate import Certificate
from ignite_tbptt.blackbox.compiled_code import outside_compiled_code
from ignite_tbptt.blackbox.estimator import Estimator
from ignite_tbptt.blackbox.executors import Pool
from ignite_tbptt.blackbox.facts import Facts
from ignite_tbptt.blackbox.flat import FlatCall, name_of
from ignite_tbptt.blackbox.module import Blackbox
from ignite_tbptt.blackbox.node import called
from ignite_tbptt.blackbox.options import Certify, Options, make_options
from ignite_tbptt.blackbox.record import Record
from ignite_tbptt.blackbox.report import report_of
from ignite_tbptt.blackbox.task import EvaluationCount, Executor

__all__ = ["BlackboxFunction", "blackbox"]

P = ParamSpec("P")
R = TypeVar("R")


class BlackboxFunction(Generic[P, R]):
    """What `blackbox` returns: called like the function, differentiable by autograd.

    Attributes:
        count: evaluations spent on gradients and seconds in them.
    """

    __name__: str

    def __init__(self, fn: Callable[P, R], options: Options, count: EvaluationCount) -> None:
        functools.update_wrapper(self, fn)
        self._fn = fn
        self._label = name_of(fn)
        self._options = options
        self.count = count
        code = getattr(fn, "__code__", None)
        # the file without its folder: random directions are the same wherever a script lies
        where = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code is not None else ""
        self._facts = Facts(f"{self._label} {where}")

    @property
    def nfev(self) -> int:
        """Evaluations spent on gradients; the forward calls are not among them."""
        return self.count.nfev

    @property
    def seconds(self) -> float:
        """Time spent in those evaluations."""
        return self.count.seconds

    @property
    def certificate(self) -> Certificate | None:
        """How far off the last gradient was that was certified."""
        found: Certificate | None = self._facts.certificate
        return found

    def report(self) -> str:
        """What gradients have cost, which steps were measured and what was verified, to be printed."""
        return report_of(self._label, self._options, self._facts, self.count)

    def state_dict(self) -> dict[str, Any]:
        """What the random directions of the next gradients depend on, for a checkpoint."""
        return self._facts.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the directions where the state was taken."""
        self._facts.load_state_dict(state_dict)

    @outside_compiled_code
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function on copies of the tensors among the arguments."""
        flat = FlatCall(self._fn, args, kwargs, numpy=self._options.numpy, label=self._label)
        if flat.closed:
            self._facts.name_closed(self._label, flat.closed)
        return cast("R", called(Record(flat, self._options, self.count, self._facts)))

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind like a function, so that methods can be decorated."""
        return self if instance is None else types.MethodType(self, instance)

    def __reduce__(self) -> Any:
        # A decorated function hides the one it was made of: it is found again under its own name, as functions are.
        found: Any = sys.modules.get(getattr(self, "__module__", ""))
        name = getattr(self, "__qualname__", "")
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is self:
            return name
        return BlackboxFunction, (self._fn, self._options, self.count)

    def __repr__(self) -> str:
        return f"blackbox({self._label}, estimator={self._options.estimator})"


@overload
def blackbox(
    fn: None = None,
    *,
    estimator: Estimator | Literal["auto"] | None = None,
    executor: Executor | Pool | None = None,
    in_dims: Any = None,
    out_dims: int | Sequence[int | None] | None = 0,
    numpy: bool = False,
    dtype: torch.dtype | None = None,
    repeatable: bool = True,
    vectorized: bool = True,
    progress: bool = False,
    certify: int | Certify | None = None,
    count: EvaluationCount | None = None,
    evaluator: Executor | None = None,
) -> Callable[[Callable[P, R]], BlackboxFunction[P, R]]: ...


@overload
def blackbox(  # type: ignore[overload-overlap]
    fn: nn.Module,
    *,
    estimator: Estimator | Literal["auto"] | None = None,
    executor: Executor | Pool | None = None,
    in_dims: Any = None,
    out_dims: int | Sequence[int | None] | None = 0,
    numpy: bool = False,
    dtype: torch.dtype | None = None,
    repeatable: bool = True,
    vectorized: bool = True,
    progress: bool = False,
    certify: int | Certify | None = None,
    count: EvaluationCount | None = None,
    evaluator: Executor | None = None,
) -> Blackbox: ...


@overload
def blackbox(
    fn: Callable[P, R],
    *,
    estimator: Estimator | Literal["auto"] | None = None,
    executor: Executor | Pool | None = None,
    in_dims: Any = None,
    out_dims: int | Sequence[int | None] | None = 0,
    numpy: bool = False,
    dtype: torch.dtype | None = None,
    repeatable: bool = True,
    vectorized: bool = True,
    progress: bool = False,
    certify: int | Certify | None = None,
    count: EvaluationCount | None = None,
    evaluator: Executor | None = None,
) -> BlackboxFunction[P, R]: ...


def blackbox(
    fn: Callable[..., Any] | None = None,
    *,
    estimator: Estimator | Literal["auto"] | None = None,
    executor: Executor | Pool | None = None,
    in_dims: Any = None,
    out_dims: int | Sequence[int | None] | None = 0,
    numpy: bool = False,
    dtype: torch.dtype | None = None,
    repeatable: bool = True,
    vectorized: bool = True,
    progress: bool = False,
    certify: int | Certify | None = None,
    count: EvaluationCount | None = None,
    evaluator: Executor | None = None,
) -> Any:
    """Make a function differentiable that autograd cannot see through.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> @blackbox(numpy=True, in_dims=(0, None))
        ... def decay(x, rate):
        ...     return x * np.exp(-rate * x)
        >>> x, rate = torch.tensor([0.5, 1.0, 2.0]), torch.tensor(1.0, requires_grad=True)
        >>> decay(x, rate).sum().backward()
        >>> round(rate.grad.item(), 3)
        -1.061
        >>> decay.nfev
        2

    The gradient is taken with respect to every float tensor among the arguments, nested or not, that requires grad;
    what is no tensor is passed through. The function works on copies, without gradients, and may change or keep what it
    is given. It draws the same random numbers from the global streams of torch, numpy and ``random`` in all evaluations
    of one call. Numbers that are no tensors (arrays, Python floats) come out as tensors in the precision of the
    arguments.

    Under autocast the function is evaluated in float32 with autocast off: differences of rounded values have no digits
    left. Under `torch.vmap` it is called once for each entry. Second derivatives are refused.

    Args:
        fn: function of tensors, or of numpy arrays; a module is handed to `Blackbox`. Left out, `blackbox` returns a
            decorator.
        estimator: how the gradient is estimated; ``CentralDifference()`` by default. "auto" takes it where that costs
            1,000 evaluations or less, and 64 `GuidedDirections` beyond, and logs which; where the pattern of a sparse
            Jacobian is known, give ``CentralDifference(sparsity=...)``.
        executor: where the evaluations run: a pool of ``concurrent.futures``, `Workers` around one for time-outs and
            retries, or anything that is called as the builtin ``map`` is. One after the other by default, and several
            in a call where in_dims allow it; `SerialEvaluation` and `StackedEvaluation` choose one of these.
        in_dims: as in `torch.vmap`, the batch axis of every argument whose rows are independent, None for one that all
            rows share: an int, or a tuple with an entry for each positional argument. A column of rows then costs as
            many evaluations as one element. The first backward verifies it, with one evaluation more.
        out_dims: the batch axis of the outputs where in_dims is given: an int, or one for each number-valued output.
        numpy: hand the function numpy arrays, in float64, so that differences keep the digits that float32 has not.
        dtype: precision of the evaluations; the one of each argument by default, which for float16 and bfloat16 leaves
            differences of two digits: give torch.float32 there. The outputs are rounded back to the precision of the
            arguments.
        repeatable: False for a function that is noisy by nature, and gives other outputs for the same inputs although
            the global random streams are replayed. True refuses such a function at the first gradient. With in_dims
            the noise has to be a thousandth of what moves of a row change, or less: more would hide coupled rows.
        vectorized: False for a function of one row, without the batch axes that in_dims name, as under `torch.vmap`: an
            external program, a simulator. The rows of the call and those of every moved point are evaluated one by one
            by the executor, and the outputs are stacked along out_dims.
        progress: show how many evaluations are done, and how many a second, where a gradient takes longer than 2 s. It
            is drawn by tqdm, in terminals alone.
        certify: an estimate of its own error for the first of every so many gradients, 10 say, at about a tenth more
            evaluations: ``certificate`` has the last one. ``Certify(10, tolerance=0.1)`` warns where it is too large.
            Of many cotangents at once the gradient of the first is meant.
        count: where evaluations are counted; a new one by default.
        evaluator: the old name of `executor`.

    Returns:
        A function of the same signature, with attributes ``nfev`` and ``seconds``; for a module, a `Blackbox`.

    Raises:
        TypeError: fn is not callable, or dtype is not one of floating point; when called: an argument that requires
            grad is complex, fn returns nothing to differentiate.
        ValueError: vectorized=False without in_dims, or with StackedEvaluation; when called: in_dims or out_dims do not
            fit the arguments or the outputs.
        BlackboxError: in backward, see there.
    """
    if fn is None:
        return functools.partial(
            blackbox,
            estimator=estimator,
            executor=executor,
            in_dims=in_dims,
            out_dims=out_dims,
            numpy=numpy,
            dtype=dtype,
            repeatable=repeatable,
            vectorized=vectorized,
            progress=progress,
            certify=certify,
            count=count,
            evaluator=evaluator,
        )
    if not callable(fn):
        raise TypeError(
            f"fn must be callable, got {type(fn).__name__}: {fn!r}; pass the function itself, not what it returns"
        )
    if isinstance(fn, nn.Module):
        return Blackbox(
            fn,
            estimator=estimator,
            executor=executor,
            in_dims=in_dims,
            out_dims=out_dims,
            numpy=numpy,
            dtype=dtype,
            repeatable=repeatable,
            vectorized=vectorized,
            progress=progress,
            certify=certify,
            count=count,
            evaluator=evaluator,
        )
    options = make_options(
        estimator=estimator,
        executor=executor,
        in_dims=in_dims,
        out_dims=out_dims,
        numpy=numpy,
        dtype=dtype,
        repeatable=repeatable,
        vectorized=vectorized,
        progress=progress,
        certify=certify,
        evaluator=evaluator,
    )
    return BlackboxFunction(fn, options, EvaluationCount() if count is None else count)
