"""What cannot be differentiated is refused, in words that say what to do; nothing is a silent wrong number."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ignite_tbptt.blackbox.errors import BlackboxError, UntrustedGradientWarning
from ignite_tbptt.blackbox.estimator import SPSA, CentralDifference, Estimator, ForwardDifference
from ignite_tbptt.blackbox.function import blackbox
from ignite_tbptt.blackbox.guided import GuidedDirections
from ignite_tbptt.blackbox.random_directions import Rademacher
from ignite_tbptt.blackbox.stencil import backward, central
from ignite_tbptt.blackbox.step_size import AbsoluteStep, BoundedStep, RelativeStep
from ignite_tbptt.blackbox.task import StackedEvaluation


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, dtype=torch.float64, **options).requires_grad_()


def test_a_function_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"fn must be callable, got Tensor: .*pass the function itself"):
        blackbox(torch.ones(2))  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("value", "found"),
    [(None, "NoneType"), ("text", "str"), ([1, True], "bool, int"), (torch.ones(2).long(), "integer")],
)
def test_outputs_without_numbers(value: Any, found: str) -> None:
    def f(x: Tensor) -> Any:
        return value

    with pytest.raises(TypeError, match=rf"(?s)f returned nothing to differentiate: .* only {found}"):
        blackbox(f)(ones(2))


def test_complex_outputs_and_inputs() -> None:
    with pytest.raises(TypeError, match=r"returned complex numbers.*view_as_real"):
        blackbox(lambda x: torch.complex(x, x))(ones(2))
    with pytest.raises(TypeError, match=r"x of root is complex and requires grad.*view_as_real"):
        blackbox(root)(torch.ones(2, dtype=torch.complex64, requires_grad=True))


def test_arrays_of_objects() -> None:
    with pytest.raises(TypeError, match=r"numpy array of dtype object, which torch cannot hold; .*float64"):
        blackbox(lambda x: np.array([None, 1]))(ones(2))


@pytest.mark.parametrize(
    ("later", "difference"),
    [
        (lambda x: x[:, None], r"shape \(3, 1\) instead of \(3,\) \(output 0\)"),
        (lambda x: x.float(), r"dtype torch.float32 instead of torch.float64"),
        (lambda x: (x, x), "a nest .* instead of"),
        (lambda x: [x.numpy()], "a nest .* instead of"),
    ],
)
def test_outputs_that_change_their_kind(later: Callable[[Tensor], Any], difference: str) -> None:
    calls: list[int] = []

    def f(x: Tensor) -> Any:
        calls.append(1)
        return later(x) if len(calls) > 2 else x

    y = blackbox(f)(ones(3))
    with pytest.raises(BlackboxError, match=rf"(?s)f returned {difference}.* when evaluated again \(x: element \(0,\)"):
        y.sum().backward()


def test_a_value_that_is_not_finite_at_x() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.log(x.detach())

    with pytest.raises(BlackboxError, match=r"f is -inf at x itself \(output 0, element \(1,\)\)"):
        blackbox(f)(torch.tensor([1.0, 0.0], requires_grad=True)).sum().backward()


def root(x: Tensor) -> Tensor:
    return torch.where(x < 1, math.nan, x**2).detach()


@pytest.mark.parametrize(
    ("estimator", "error"),
    # one-sided slopes of x^2 at 1 are off by h; of order 4 three points are left beside x: exact
    [(Estimator(backward()), 2.0**-26), (CentralDifference(), 2.0**-17), (CentralDifference(4), 1e-11)],
)
@pytest.mark.parametrize("in_dims", [None, 0])
def test_one_side_is_enough_where_the_other_is_not_finite(estimator: Estimator, error: float, in_dims: Any) -> None:
    x = torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64, requires_grad=True)
    f = blackbox(root, estimator=estimator, in_dims=in_dims)
    f(x).sum().backward()
    assert x.grad is not None
    assert (x.grad - 2 * x).abs().max() <= 4 * error


def test_random_directions_take_the_side_that_is_left() -> None:
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    blackbox(root, estimator=SPSA(4))(x).sum().backward()
    assert x.grad is not None
    assert abs(x.grad - 2) <= 2.0**-15


@pytest.mark.parametrize("estimator", [ForwardDifference(), CentralDifference(), CentralDifference(4), SPSA(2)])
def test_values_that_are_finite_on_neither_side(estimator: Estimator) -> None:
    def f(x: Tensor) -> Tensor:
        return torch.where(x == 1, x, math.inf).detach()

    with pytest.raises(BlackboxError, match=r"f is NaN or infinite .* with x: .* BoundedStep"):
        blackbox(f, estimator=estimator)(ones(2)).sum().backward()


def test_the_other_side_is_not_tried_beyond_a_bound() -> None:
    seen: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.where(x > 1, math.nan, x).detach()

    estimator = ForwardDifference(BoundedStep(RelativeStep(), 1.0, 9.0))
    with pytest.raises(
        BlackboxError, match="f is NaN or infinite and the other side is out of bounds, with x: element"
    ):
        blackbox(f, estimator=estimator)(ones(2)).sum().backward()
    assert all((x >= 1).all() for x in seen)


def test_a_domain_that_ends_does_not_hide_the_quanta() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.where(x > 1.5, math.nan, torch.floor(x * 8) / 8).detach()

    with pytest.warns(
        UntrustedGradientWarning,
        match=r"f is not smooth .* slope is 0 at the step .*GaussianSmoothing\(n, sigma=0\.25\)",
    ):
        blackbox(f, estimator=CentralDifference())(ones(2) * 0.99).sum().backward()


def test_all_differences_zero_tells_the_step_and_the_quantum() -> None:
    def f(x: Tensor) -> Tensor:
        return (torch.floor(x.detach() * 8) / 8).double()

    x = torch.full((3,), 0.51, dtype=torch.float64, requires_grad=True)
    wrapped = blackbox(f, estimator=CentralDifference())
    with pytest.warns(
        UntrustedGradientWarning,
        match=r"f is not smooth .* slope is 0 at the step .*GaussianSmoothing\(n, sigma=0\.25\)",
    ):
        wrapped(x).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    spent = wrapped.nfev
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(x).sum().backward()
    # said once, and searched for once
    assert wrapped.nfev == spent + 6
    x.grad = None
    blackbox(f, estimator=CentralDifference(step_size=AbsoluteStep(1.0)))(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("in_dims", "kind", "message"),
    [
        ((0,), ValueError, r"in_dims=\(0,\) does not match the 2 positional arguments of f"),
        ((0, 2), ValueError, r"in_dims gives axis 2 for w of f, whose shape is \(3,\)"),
        ((0, 0), ValueError, r"in_dims: x has 4 rows and w has 3"),
        ((None, None), ValueError, "in_dims names a batch axis for none"),
        ((0, 0.5), TypeError, "in_dims must be made of ints and None"),
        ("0", ValueError, "in_dims=0 does not match|in_dims must be made of"),
    ],
)
def test_in_dims_that_do_not_match(in_dims: Any, kind: type[Exception], message: str) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return (x * w).detach()

    with pytest.raises((kind, TypeError) if in_dims == "0" else kind, match=message):
        blackbox(f, in_dims=in_dims)(ones(4, 3), ones(3))


def test_an_axis_for_what_is_no_tensor() -> None:
    with pytest.raises(ValueError, match=r"in_dims gives axis 0 to scale, which is no tensor but float; give None"):
        blackbox(lambda x, scale: x * scale, in_dims=0)(ones(3), 2.0)


def test_outputs_without_the_rows() -> None:
    with pytest.raises(ValueError, match=r"works on 4 independent rows, but output 0 of shape \(\) does not"):
        blackbox(lambda x: x.detach().sum(), in_dims=0)(ones(4))
    with pytest.raises(ValueError, match=r"output 0 of shape \(2, 4\) does not have them at axis 0; set out_dims"):
        blackbox(lambda x: x.detach().t(), in_dims=0)(ones(4, 2))
    with pytest.raises(ValueError, match="out_dims has 2 entries for 1 outputs"):
        blackbox(lambda x: x.detach(), in_dims=0, out_dims=(0, 0))(ones(4))


@pytest.mark.parametrize("evaluator", [None, StackedEvaluation()])
def test_coupled_rows(evaluator: Any) -> None:
    norm = nn.BatchNorm1d(3, track_running_stats=False).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    f = blackbox(lambda x: norm(x).detach(), in_dims=0, executor=evaluator)
    with pytest.raises(BlackboxError, match=r"in_dims=\[0\] says that the rows .* independent.* BatchNorm in training"):
        f(x).sum().backward()
    norm.eval()
    norm.running_mean, norm.running_var = torch.zeros(3).double(), torch.ones(3).double()
    f(x).sum().backward()


def test_noise_that_cannot_be_replayed() -> None:
    generator = np.random.default_rng(0)
    f = blackbox(lambda x: x.detach() + generator.normal(), in_dims=0)
    with pytest.raises(BlackboxError, match="gives other outputs for the same inputs"):
        f(ones(3)).sum().backward()


def test_rows_that_depend_on_the_size_of_the_batch() -> None:
    x = ones(4, 3)
    f = blackbox(lambda x: x.detach() ** 2 / len(x), in_dims=0, executor=StackedEvaluation())
    with pytest.raises(BlackboxError, match=r"other rows in a batch of twice the size.*SerialEvaluation"):
        f(x).sum().backward()
    fixed = blackbox(lambda x: (x.detach() ** 2)[:4], in_dims=0, executor=StackedEvaluation())
    with pytest.raises(BlackboxError, match=r"shape \(4, 3\) instead of \(8, 3\).*written for, use SerialEvaluation"):
        fixed(x).sum().backward()


def test_stacking_without_in_dims() -> None:
    with pytest.raises(ValueError, match=r"StackedEvaluation needs to know .* in_dims, as in torch\.vmap"):
        blackbox(lambda x: x.detach(), executor=StackedEvaluation())(ones(3)).sum().backward()


def test_a_function_that_raises_at_a_moved_point() -> None:
    def f(x: Tensor) -> Tensor:
        if x[2] > 1:
            raise ArithmeticError("solver diverged")
        return x.detach() ** 2

    x = ones(4)
    y = blackbox(f)(x)
    with pytest.raises(
        BlackboxError,
        match=r"f raised ArithmeticError: solver diverged\nin evaluation \d+, x: element \(2,\) moved by \+7\.6",
    ) as caught:
        y.sum().backward()
    assert isinstance(caught.value.__cause__, ArithmeticError)


def test_errors_name_what_is_inside_a_nest() -> None:
    def f(batch: Any, *, table: Any) -> Any:
        if table["a"][0][0] != 1:
            raise ArithmeticError("no")
        return batch["x"].detach() * 2

    y = blackbox(f)({"x": ones(2).detach()}, table={"a": [ones(1)]})
    with pytest.raises(BlackboxError, match=r"table\['a'\]\[0\]: element \(0,\) moved by"):
        y.sum().backward()


def test_an_error_in_the_forward_call_is_the_function_s_own() -> None:
    with pytest.raises(ZeroDivisionError):
        blackbox(lambda x: x / (1 // 0))(ones(1))


def test_streams_are_restored_when_an_evaluation_raises() -> None:
    calls: list[int] = []

    def f(x: Tensor) -> Tensor:
        calls.append(1)
        noise = torch.rand(3)
        if len(calls) > 4:
            raise ArithmeticError("no")
        return x.detach() * noise

    y = blackbox(f)(ones(3))
    torch.rand(1)  # so that the end of the forward call is another place in the stream
    before = torch.get_rng_state()
    with pytest.raises(BlackboxError, match="no"):
        y.sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_second_derivatives() -> None:
    x = ones(3)
    first = torch.autograd.grad(blackbox(lambda x: x.detach() ** 3)(x).sum(), x, create_graph=True)[0]
    assert torch.allclose(first, torch.full_like(x, 3.0))
    with pytest.raises(BlackboxError, match=r"second derivative of <lambda>: .* leave create_graph out"):
        torch.autograd.grad(first.sum(), x)


def test_strategies_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match=r"estimator must be an Estimator, got .*CentralDifference"):
        blackbox(lambda x: x, estimator=central())  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"these are directions, .* give Estimator\(directions=GuidedDirections\(n=8"):
        blackbox(lambda x: x, estimator=GuidedDirections(8))  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"executor must be called as map\(function, tasks\) is, got <class"):
        blackbox(lambda x: x, executor=StackedEvaluation)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"dtype must be a torch dtype of floating point, got torch\.int64"):
        blackbox(lambda x: x, dtype=torch.int64)
    with pytest.raises(TypeError, match="numpy has no bfloat16"):
        blackbox(lambda x: x, numpy=True, dtype=torch.bfloat16)(ones(2))


def test_bounds_leave_random_directions_no_room() -> None:
    estimator = Estimator(central(), Rademacher(2), BoundedStep(RelativeStep(), 0.0, 1.0))
    with pytest.raises(ValueError, match=r"bounds leave random directions a step of 0 .* use Coordinates\(\)"):
        blackbox(lambda x: x.detach(), estimator=estimator)(ones(2)).sum().backward()
