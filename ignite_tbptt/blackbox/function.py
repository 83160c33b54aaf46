"""Functions that autograd cannot see through, made differentiable: the only torch.autograd.Function of the package.

The idea: the forward is one plain call on copies; the backward asks an estimator where the function is to be evaluated
again and contracts what comes out with the cotangent. `blackbox` takes any function of nested arguments;
`differentiable_call` is what lies under it and under `module`: one call of a function of a flat list of tensors.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

import torch
from torch import Tensor

from ignite_tbptt.blackbox.arguments import Arguments
from ignite_tbptt.blackbox.compiled_code import outside_compiled_code
from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.estimator import Estimator
from ignite_tbptt.blackbox.evaluation import EvaluationCount, Evaluator
from ignite_tbptt.blackbox.forward_call import ForwardCall, Known, Options, make_options
from ignite_tbptt.blackbox.gradient import Differences
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["BlackboxFunction", "blackbox", "differentiable_call"]

P = ParamSpec("P")
R = TypeVar("R")


class BlackboxFunction(Generic[P, R]):
    """What `blackbox` returns: called like the function, differentiable by autograd.

    Attributes:
        count: evaluations spent on gradients and seconds in them.
    """

    __name__: str

    def __init__(self, fn: Callable[P, R], options: Options, in_dims: Any, numpy: bool, count: EvaluationCount) -> None:
        functools.update_wrapper(self, fn)
        self._fn = fn
        self._options = options
        self._in_dims = in_dims
        self._numpy = numpy
        self.count = count

    @property
    def nfev(self) -> int:
        """Evaluations spent on gradients; the forward calls are not among them."""
        return self.count.nfev

    @property
    def seconds(self) -> float:
        """Time spent in those evaluations."""
        return self.count.seconds

    @outside_compiled_code
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function on copies of the tensors among the arguments."""
        arguments = Arguments(self._fn, args, kwargs, numpy=self._numpy)
        in_dims = arguments.flat_in_dims(self._in_dims)
        session = ForwardCall(arguments.as_function, self._options, self.count, in_dims, arguments)
        return cast("R", _call(session, arguments.tensors))

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
        return BlackboxFunction, (self._fn, self._options, self._in_dims, self._numpy, self.count)

    def __repr__(self) -> str:
        return f"blackbox({self._options.label}, estimator={self._options.estimator})"


@overload
def blackbox(
    fn: None = None,
    *,
    estimator: Estimator | None = None,
    evaluator: Evaluator | None = None,
    in_dims: Any = None,
    out_dims: int | Sequence[int] = 0,
    numpy: bool = False,
    dtype: torch.dtype | None = None,
    count: EvaluationCount | None = None,
) -> Callable[[Callable[P, R]], BlackboxFunction[P, R]]: ...


@overload
def blackbox(
    fn: Callable[P, R],
    *,
    estimator: Estimator | None = None,
    evaluator: Evaluator | None = None,
    in_dims: Any = None,
    out_dims: int | Sequence[int] = 0,
    numpy: bool = False,
    dtype: torch.dtype | None = None,
    count: EvaluationCount | None = None,
) -> BlackboxFunction[P, R]: ...


def blackbox(
    fn: Callable[..., Any] | None = None,
    *,
    estimator: Estimator | None = None,
    evaluator: Evaluator | None = None,
    in_dims: Any = None,
    out_dims: int | Sequence[int] = 0,
    numpy: bool = False,
    dtype: torch.dtype | None = None,
    count: EvaluationCount | None = None,
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
        fn: function of tensors, or of numpy arrays. Left out, `blackbox` returns a decorator.
        estimator: how the gradient is estimated; ``CentralDifference()`` by default.
        evaluator: where the evaluations run; ``SerialEvaluation()`` by default.
        in_dims: as in `torch.vmap`, the batch axis of every argument whose rows are independent, None for one that all
            rows share: an int, or a tuple with an entry for each positional argument. A column of rows then costs as
            many evaluations as one element. The first backward verifies it, with one evaluation more.
        out_dims: the batch axis of the outputs where in_dims is given: an int, or one for each number-valued output.
        numpy: hand the function numpy arrays, in float64, so that differences keep the digits that float32 has not.
        dtype: precision of the evaluations; the one of each argument by default, which for float16 and bfloat16 leaves
            differences of two digits: give torch.float32 there. The outputs are rounded back to the precision of the
            arguments.
        count: where evaluations are counted; a new one by default.

    Returns:
        A function of the same signature, with attributes ``nfev`` and ``seconds``.

    Raises:
        TypeError: fn is not callable, or dtype is not one of floating point; when called: an argument that requires
            grad is complex, fn returns nothing to differentiate.
        ValueError: when called: in_dims or out_dims do not fit the arguments or the outputs.
        BlackboxError: in backward, see there.
    """
    if fn is None:
        return functools.partial(
            blackbox,
            estimator=estimator,
            evaluator=evaluator,
            in_dims=in_dims,
            out_dims=out_dims,
            numpy=numpy,
            dtype=dtype,
            count=count,
        )
    if not callable(fn):
        raise TypeError(
            f"fn must be callable, got {type(fn).__name__}: {fn!r}; pass the function itself, not what it returns"
        )
    if dtype is None and numpy:
        dtype = torch.float64
    options = make_options(estimator, evaluator, out_dims, dtype, _name(fn), "cpu" if numpy else None)
    return BlackboxFunction(fn, options, in_dims, numpy, EvaluationCount() if count is None else count)


def differentiable_call(
    fn: Callable[..., Any],
    tensors: Sequence[Tensor],
    *,
    estimator: Estimator | None = None,
    evaluator: Evaluator | None = None,
    in_dims: Sequence[int | None] | None = None,
    out_dims: int | Sequence[int] = 0,
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
    label: str | None = None,
    count: EvaluationCount | None = None,
    outputs: Any = None,
    streams: RandomStreams | None = None,
) -> Any:
    """Call a function of a flat list of tensors, once, in a way that autograd can differentiate.

    Args:
        fn: called as ``fn(*tensors)`` with copies; returns a nest of tensors, arrays and floats.
        tensors: all tensors that the function depends on; those that require grad receive a gradient.
        estimator: see `blackbox`.
        evaluator: see `blackbox`.
        in_dims: one entry for each tensor, or None.
        out_dims: see `blackbox`.
        dtype: see `blackbox`.
        names: what each tensor is called in messages.
        label: what the function is called in messages.
        count: where evaluations and seconds are counted, and where it is remembered what was verified: pass the same
            one in every call of the same function.
        outputs: what the function gives for these tensors, where that is known already: it is not called then.
        streams: the random streams as they were before `outputs` were computed.

    Returns:
        The outputs, with a ``grad_fn`` where gradients are enabled and a tensor requires grad.

    Raises:
        See `blackbox`.
    """
    options = make_options(estimator, evaluator, out_dims, dtype, label or _name(fn), None)
    known = None if outputs is None else Known(outputs, streams)
    count = EvaluationCount() if count is None else count
    return _call(ForwardCall(fn, options, count, in_dims, names, known), tensors)


def _call(session: ForwardCall, tensors: Sequence[Tensor]) -> Any:
    for k, tensor in enumerate(tensors):
        if tensor.is_complex() and tensor.requires_grad:
            raise TypeError(
                f"{session.named(k)} of {session.options.label} is complex and requires grad: steps are taken along "
                "real numbers; pass torch.view_as_real(input) and put the parts together inside the function"
            )
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        session.differentiable = True
        function = _UnderTransforms if transformed else _FiniteDifferences
        flat = function.apply(session, *tensors)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            flat = session.forward(tensors)
    return session.rebuilt(flat)


class _FiniteDifferences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, session: ForwardCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        output = session.forward(tensors)
        _remember(ctx, session, tensors, output)
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        differences: Differences = ctx.differences
        tensors = ctx.saved_tensors
        if torch._C._are_functorch_transforms_active():
            raise BlackboxError(
                f"gradients of {differences.call.label} cannot be taken inside torch.func or torch.vmap: it would be "
                "handed tensors that hold no numbers; call backward() or torch.autograd.grad outside of them"
            )
        found = differences.gradients(tensors, ctx.needs_input_grad[1:], cotangents)
        if torch.is_grad_enabled():
            # create_graph=True: whoever differentiates these again is told, instead of getting a wrong number
            live = [k for k, gradient in enumerate(found) if gradient is not None]
            marked = _NoSecondDerivative.apply(  # type: ignore[no-untyped-call]
                differences.call.label, len(live), *[found[k] for k in live], *tensors, *cotangents
            )
            for k, gradient in zip(live, marked, strict=True):
                found[k] = gradient
        return (None, *found)


class _UnderTransforms(_FiniteDifferences):
    """The same with a forward that torch.func can take apart; torch is slower to call one of these."""

    @staticmethod
    def forward(session: ForwardCall, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return session.forward(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        session, *tensors = inputs
        _remember(ctx, session, tensors, output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], session: ForwardCall, *tensors: Tensor) -> tuple[Any, Any]:
        """One call for each entry of the mapped axis."""
        found = []
        for index in range(info.batch_size):
            entry = [
                tensor if dim is None else tensor.select(dim, index)
                for tensor, dim in zip(tensors, in_dims[1:], strict=True)
            ]
            one = session.again()
            found.append(_UnderTransforms.apply(one, *entry))  # type: ignore[no-untyped-call]
            session.outputs = one.outputs
        stacked = tuple(torch.stack(same) for same in zip(*found, strict=True))
        return stacked, (0,) * len(stacked)


def _remember(ctx: Any, session: ForwardCall, tensors: Sequence[Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.differences = session.differences
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(tensor for tensor in output if not tensor.is_floating_point()))


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(label: str, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count] if tensor is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.label = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise BlackboxError(
            f"second derivative of {ctx.label}: its gradient is made of finite differences, which are not "
            "differentiated again; leave create_graph out, or detach the gradient before it enters a loss"
        )


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", None) or type(fn).__name__.lstrip("_")
