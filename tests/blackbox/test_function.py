"""`blackbox` behaves like a differentiable function of the same signature, and leaves no trace."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.estimator import SPSA, CentralDifference, Estimator, ForwardDifference
from ignite_tbptt.blackbox.function import blackbox
from ignite_tbptt.random_streams import RandomStreams
from tests.blackbox.helpers import COORDINATE_ESTIMATORS, EVALUATORS, as_text, relative_error, row_sums, seen_through

# central differences in float64: eps^(2/3) of truncation and round-off, for functions of size and curvature about 1
NEAR = 1e-9


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@blackbox
def decorated(x: Tensor) -> Tensor:
    return x.detach() ** 2


def grad(y: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.sum(), xs)


def test_a_string_is_differentiated_like_the_formula_in_it() -> None:
    x, w = doubles(10), torch.tensor([1.2, -3.4], dtype=torch.float64, requires_grad=True)
    y = blackbox(as_text)(x, w)
    true = 2 * x * w[0] + x**2 * w[1]
    assert torch.allclose(y, true, rtol=1e-14)
    assert relative_error(grad(y, x, w), grad(true, x, w)) <= NEAR


class Pair(NamedTuple):
    first: Any
    second: Any


def test_nests_go_in_and_come_out() -> None:
    def f(batch: dict[str, Any], scale: Any, *, shift: Tensor, mode: str) -> Any:
        x, (y, flag) = batch["x"].numpy(), batch["pair"]
        assert mode == "plain"
        assert flag is None
        number = float((x.sum() + y.sum()) * scale)
        return {"array": x * y.numpy(), "pair": Pair(number, None), "rest": [shift.detach() * 2, "text", 7]}

    x, y, scale, shift = doubles(3), doubles(3, seed=1), doubles(), doubles(2, seed=2)
    out = blackbox(f)({"x": x, "pair": (y, None)}, scale, shift=shift, mode="plain")
    assert isinstance(out["pair"], Pair)
    assert out["pair"].second is None
    assert out["rest"][1:] == ["text", 7]
    assert torch.equal(out["array"], x * y)
    loss = out["array"].sin().sum() + out["pair"].first * 3 + out["rest"][0].sum()
    true = (x * y).sin().sum() + (x.sum() + y.sum()) * scale * 3 + (shift * 2).sum()
    assert relative_error(grad(loss, x, y, scale, shift), grad(true, x, y, scale, shift)) <= NEAR


def test_numpy_functions_get_arrays_and_are_perturbed_in_float64() -> None:
    kinds: set[Any] = set()

    def f(x: Any, index: Any) -> Any:
        kinds.add((type(x), x.dtype, index.dtype))
        return np.exp(x)[index], int(index[0])

    x = torch.linspace(-1, 1, 5).requires_grad_()
    y, number = blackbox(f, numpy=True)(x, torch.tensor([3, 1]))
    assert kinds == {(np.ndarray, np.dtype("float64"), np.dtype("int64"))}
    assert (y.dtype, number) == (torch.float32, 3)
    found = grad(y, x)[0]
    # the rounding of the result to float32, 2^-24 an element, is all there is
    true = grad(x.double().exp()[[3, 1]], x)[0].double()
    assert relative_error([found], [true]) <= 2.0**-23


def test_only_inputs_that_require_grad_cost_evaluations_and_only_in_backward() -> None:
    calls: list[int] = []

    def f(x: Tensor, w: Tensor) -> Tensor:
        calls.append(1)
        return (x * w).detach()

    x, w = torch.ones(7), torch.ones(7)
    for estimator, each in ((ForwardDifference(), 1), (CentralDifference(), 2), (CentralDifference(4), 4)):
        wrapped = blackbox(f, estimator=estimator)
        calls.clear()
        assert not wrapped(x, w).requires_grad
        with torch.no_grad():
            assert not wrapped(x.requires_grad_(), w).requires_grad
        assert (len(calls), wrapped.nfev) == (2, 0)
        y = wrapped(x, w)
        assert (len(calls), wrapped.nfev) == (3, 0)
        y.sum().backward()
        assert (len(calls), wrapped.nfev) == (3 + 7 * each + wrapped.count.probes, 7 * each)
        assert wrapped.seconds > 0
        assert w.grad is None
        x.requires_grad_(False)


def test_rows_are_moved_together_where_in_dims_says_so() -> None:
    calls: list[int] = []

    def f(x: Any, w: Any) -> Any:
        calls.append(1)
        return row_sums(x, w)

    x, w = torch.randn(256, 64).requires_grad_(), torch.randn(64).requires_grad_()
    wrapped = blackbox(f, estimator=ForwardDifference(), numpy=True, in_dims=(0, None))
    true = grad(torch.tanh(x.double() * w.double()).sum(1), x, w)
    for due in (True, True, False):
        calls.clear()
        probes = wrapped.count.probes
        found = grad(wrapped(x, w), x, w)
        # one forward call, 64 columns of x, 64 elements of w; at gradients 1, 2, 4, ... it is verified
        assert len(calls) == 129 + wrapped.count.probes - probes
        assert (wrapped.count.probes > probes) == due
        assert relative_error(found, [t.double() for t in true]) <= 1e-6


@pytest.mark.parametrize("outputs", [1, 43])
@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("kind", COORDINATE_ESTIMATORS)
def test_batch_parallel_equals_element_by_element_bit_for_bit(kind: str, evaluator: str, outputs: int) -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        # elementwise kernels give the same bits for every batch size; many outputs show the order they are added in
        powers = torch.arange(1, outputs + 1, dtype=x.dtype) / 8
        y = (x * w).tanh().sum(-1)[:, None] * powers
        return y.sin().detach(), (x.sin()[:, 1] * w.sum()).detach()

    for dtype in (torch.float32, torch.float64):
        x = torch.randn(6, 3, dtype=dtype).requires_grad_()
        w = torch.randn(3, dtype=dtype).requires_grad_()
        v = [torch.randn(6, outputs, dtype=dtype), torch.randn(6, dtype=dtype)]
        together = blackbox(f, estimator=COORDINATE_ESTIMATORS[kind], executor=EVALUATORS[evaluator], in_dims=(0, None))
        apart = blackbox(f, estimator=COORDINATE_ESTIMATORS[kind])
        for one, other in zip(
            torch.autograd.grad(together(x, w), (x, w), v), torch.autograd.grad(apart(x, w), (x, w), v), strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dims", [((1, None), 0), ((-1, None), -1), (({"x": 2}, None), 1)])
def test_any_axis_can_be_the_batch(dims: tuple[Any, int]) -> None:
    in_dims, out_dims = dims
    dim = in_dims[0]["x"] if isinstance(in_dims[0], dict) else in_dims[0]
    rows = doubles(5, 2, 3)
    x = rows.detach().movedim(0, dim).clone().requires_grad_()

    def f(tree: Any, w: Tensor) -> Tensor:
        t: Tensor = tree["x"] if isinstance(tree, dict) else tree
        return (t.movedim(dim, 0).flatten(1) * w).sin().movedim(0, out_dims).detach()

    w = doubles(6, seed=1)
    wrapped = blackbox(f, in_dims=in_dims, out_dims=out_dims)
    y = wrapped({"x": x} if isinstance(in_dims[0], dict) else x, w)
    assert relative_error(grad(y, x, w), grad((x.movedim(dim, 0).flatten(1) * w).sin(), x, w)) <= NEAR
    assert wrapped.nfev == 2 * 6 + 2 * 6


def test_the_function_may_change_keep_and_reuse_what_it_likes() -> None:
    buffer, kept = torch.empty(3, dtype=torch.float64), []

    def f(x: Tensor, mask: Tensor, table: Any) -> Tensor:
        kept.append(x)
        x.mul_(2)
        x.numpy()[0] += 1
        mask.logical_not_()
        table += 1
        buffer.copy_(x * mask * table[0])
        return buffer

    x, mask, table = doubles(3), torch.tensor([False, False, True]), np.ones(2)
    before, version = x.detach().clone(), x._version
    wrapped = blackbox(f)
    y = wrapped(x, mask, table)
    assert torch.allclose(grad(y, x)[0], torch.tensor([4.0, 4.0, 0.0], dtype=torch.float64), atol=NEAR)
    assert torch.equal(x, before)
    assert x._version == version
    assert mask.tolist() == [False, False, True]
    assert table.tolist() == [1, 1]
    assert len({point.data_ptr() for point in kept}) == len(kept) == 1 + wrapped.nfev + wrapped.count.probes


def test_outputs_may_be_changed_in_place() -> None:
    x = doubles(4)
    y = blackbox(lambda x: x.detach().exp(), estimator=ForwardDifference())(x)
    y.mul_(3)
    assert relative_error(grad(y, x), [3 * x.exp()]) <= 1e-7


@pytest.mark.parametrize("make", [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x.expand(2, 3, 4), lambda x: x[0, 0]])
def test_strided_inputs(make: Any) -> None:
    x = doubles(3, 4)
    layouts: set[tuple[int, ...]] = set()

    def f(x: Tensor) -> Any:
        layouts.add(x.stride())
        return x.detach().exp()

    assert relative_error(grad(blackbox(f)(make(x)), x), grad(make(x).exp(), x)) <= NEAR
    assert len(layouts) == 1


def test_random_numbers_are_common_and_the_streams_go_on_as_after_one_call() -> None:
    def noisy(x: Tensor) -> Tensor:
        keep = torch.rand(x.shape) + np.random.rand() + random.random()
        return (nn.functional.dropout(x, 0.5, training=True) * keep).detach()

    x = doubles(20)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    start = RandomStreams.now()
    noisy(x)
    after = RandomStreams.now()
    start.restore()
    y = blackbox(noisy)(x)
    found = grad(y, x)[0]
    assert torch.equal(torch.get_rng_state(), after.torch_cpu)
    assert np.array_equal(np.random.get_state()[1], after.numpy_legacy[1])  # type: ignore[index]
    assert random.getstate() == after.python
    assert torch.allclose(found, (y / x).detach(), atol=NEAR)


def test_random_numbers_drawn_only_away_from_x_are_common_as_well() -> None:
    origin = torch.zeros(3, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return x.detach() * 2 + (torch.rand(()).double() if not torch.equal(x, origin) else 0.0)

    x = origin.clone().requires_grad_()
    before = torch.get_rng_state()
    found = grad(blackbox(f)(x), x)[0]
    assert torch.allclose(found, torch.full((3,), 2.0, dtype=torch.float64), atol=NEAR)
    assert torch.equal(before, torch.get_rng_state())


def test_backward_again_with_retain_graph() -> None:
    x = doubles(3)
    y = blackbox(lambda x: x.detach().sin())(x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x, retain_graph=True)[0])
    torch.autograd.grad(y, x)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


def test_an_input_that_changed_before_backward_is_noticed() -> None:
    x = doubles(3)
    w = doubles(3, seed=1)
    y = blackbox(lambda x, w: (x * w).detach())(x, w).sum()
    with torch.no_grad():
        w -= 0.1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_outputs_that_are_not_used_and_integers_among_them() -> None:
    x = doubles(3)
    y, index, unused = blackbox(lambda x: (x.detach() ** 3, x.argmax(), x.detach() * torch.nan))(x)
    assert not index.requires_grad
    assert unused.requires_grad
    assert relative_error(grad(y, x), [3 * x**2]) <= 1e-8


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 1, 1)])
def test_scalars_and_empty_batches(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.5, dtype=torch.float64, requires_grad=True)
    w = doubles()
    y = blackbox(lambda x, w: (x**2 * w).detach(), estimator=CentralDifference(4))(x, w)
    found = grad(y, x, w)
    assert found[0].shape == shape
    assert torch.allclose(found[0], (2 * x * w).detach(), atol=1e-10)
    assert torch.allclose(found[1], (x**2).sum().detach(), atol=1e-10)


def test_under_autocast_differences_are_taken_in_float32() -> None:
    torch.manual_seed(0)
    layer, inner = nn.Linear(4, 8), nn.Linear(8, 8)
    f = blackbox(seen_through(inner))
    parameters = dict(inner.named_parameters())
    x = torch.randn(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = layer(x).detach().requires_grad_()
        assert h.dtype == torch.bfloat16
        loss = f(parameters, h).float().square().mean()
        inside = torch.autograd.grad(loss, [*parameters.values()], retain_graph=True)
    outside = torch.autograd.grad(loss, [*parameters.values()])
    true = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    y = functional_call(inner, true, (h.detach().double(),))
    truth = torch.autograd.grad(y.square().mean(), [*true.values()])
    for found in (inside, outside):
        assert relative_error(found, truth) <= 1e-5


def test_vmap_calls_once_for_each_entry() -> None:
    x, w = doubles(4, 3), doubles(3, seed=1)
    wrapped = blackbox(lambda x, w: {"y": (x * w).sin().detach()})
    y = torch.vmap(wrapped, in_dims=(0, None))(x, w)["y"]
    assert relative_error(grad(y, x, w), grad((x * w).sin(), x, w)) <= NEAR


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_those_of_an_entry_under_vmap(axis: int) -> None:
    x = doubles(4, 3, 2)
    wrapped = blackbox(lambda x: {"y": x.sin().detach()}, in_dims=axis, out_dims=axis)
    y = torch.vmap(wrapped)(x)["y"]
    assert relative_error(grad(y, x), grad(x.sin(), x)) <= NEAR
    columns = 2 if axis == 0 else 3
    assert wrapped.nfev == 4 * 2 * columns  # entries, evaluations of a central difference


def test_vmap_over_no_entries_is_refused() -> None:
    with pytest.raises(ValueError, match=r"an axis of 0 entries.*leave empty batches out"):
        torch.vmap(blackbox(lambda x: x.detach().sin()))(doubles(0, 3))


def test_transforms_that_would_hand_it_no_numbers_are_refused() -> None:
    f = blackbox(lambda x: x.detach().sin())
    with pytest.raises(BlackboxError, match=r"cannot be taken inside torch\.func or torch\.vmap"):
        torch.func.grad(lambda x: f(x).sum())(doubles(3).detach())


def test_functional_call_reaches_a_function_inside_a_module() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.f = blackbox(lambda x, gain: (x * gain).detach().exp())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.f(x, self.gain)
            return y

    module, gain, x = Scaled(), doubles(3), doubles(3, seed=1)
    found = grad(functional_call(module, {"gain": gain}, (x,)), gain, x)
    assert relative_error(found, grad((x * gain).exp(), gain, x)) <= NEAR


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # said by the compiler to itself
def test_compiled_code_goes_around_it() -> None:
    f = blackbox(lambda x: x.detach().sin())
    x = doubles(3)
    compiled = torch.compile(lambda x: f(x * 2) * 3, backend="eager")
    assert relative_error(grad(compiled(x), x), grad((x * 2).sin() * 3, x)) <= NEAR
    assert f.nfev == 6


def test_decorators_methods_copies_and_pickles() -> None:
    @blackbox(estimator=ForwardDifference())
    def f(x: Tensor) -> Tensor:
        """Doc."""
        return x.detach() * 2

    assert (f.__name__, f.__doc__) == ("f", "Doc.")

    class Plant:
        gain = 3.0

        @blackbox
        def step(self, x: Tensor) -> Tensor:
            return x.detach() * self.gain

    x = doubles(2)
    assert grad(Plant().step(x), x)[0].tolist() == pytest.approx([3.0, 3.0])
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    wrapped = blackbox(as_text, estimator=CentralDifference(4))
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        w = doubles(2, seed=1)
        assert torch.equal(grad(twin(x, w), x)[0], grad(wrapped(x, w), x)[0])
        assert twin.nfev > 0


def test_two_calls_of_one_function_do_not_mix() -> None:
    # every call has a session of its own: two graphs of one function, differentiated in the other order
    f = blackbox(lambda x: x.detach() ** 2)
    a, b = doubles(3), doubles(3, seed=1)
    first, second = f(a).sum(), f(b).sum()
    second.backward()
    first.backward()
    assert torch.allclose(a.grad, 2 * a.detach(), atol=NEAR)  # type: ignore[arg-type]
    assert torch.allclose(b.grad, 2 * b.detach(), atol=NEAR)  # type: ignore[arg-type]


def test_random_directions_serve_functions_of_many_numbers() -> None:
    x = torch.linspace(-1, 1, 1000, dtype=torch.float64).requires_grad_()
    f = blackbox(lambda x: (x**2).sum().detach(), estimator=SPSA(400))
    found = grad(f(x), x)[0]
    assert f.nfev == 800
    # relative variance (D - 1) / n
    assert relative_error([found], [2 * x]) == pytest.approx((999 / 400) ** 0.5, rel=0.1)


def test_the_gradient_of_an_even_function_at_its_centre_is_zero_without_a_word() -> None:
    x = torch.zeros(3, requires_grad=True)
    assert not grad(blackbox(lambda x: (x**2).detach())(x), x)[0].any()


def test_inputs_that_do_not_matter_have_a_zero_gradient_without_a_word() -> None:
    x, w = doubles(3), doubles(3, seed=1)
    found = grad(blackbox(lambda x, w: x.detach() * 2)(x, w), w)
    assert not found[0].any()


def test_estimators_print_as_what_they_are() -> None:
    assert "CentralDifference" not in repr(Estimator())
    assert repr(blackbox(as_text)).startswith("blackbox(as_text, estimator=Estimator(stencil=Stencil(offsets=(-1, 1))")


def test_a_numpy_state_that_was_set_by_hand_and_holds_a_normal_number_makes_no_difference_noisy() -> None:
    # The words of the twister are those of the state that was looked at last, which held no normal number.
    np.random.seed(5)
    np.random.randn()
    holding_one = np.random.get_state()
    np.random.randn()
    x = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    blackbox(lambda x: x.detach())(x)
    np.random.set_state(holding_one)
    y = blackbox(lambda x: x.detach() * 3 + np.random.randn(), estimator=ForwardDifference())(x)
    assert torch.allclose(grad(y, x)[0], torch.full((2,), 3.0, dtype=torch.float64), atol=NEAR)


def test_more_evaluations_than_are_contracted_at_a_time() -> None:
    x = torch.linspace(-1, 1, 5000, dtype=torch.float64).requires_grad_()
    weights = torch.linspace(1, 2, 5000, dtype=torch.float64)
    wrapped = blackbox(lambda x: (x.detach() * weights).sum(), estimator=ForwardDifference())
    # round-off: eps / h times the sum of |x w|, 3750 at most
    assert (grad(wrapped(x), x)[0] - weights).abs().max() <= 2.0**-52 / 2.0**-27 * 3750
    assert wrapped.nfev == 5000


def test_an_array_that_is_filled_anew_at_every_call() -> None:
    array = np.empty(3)

    def f(x: Any) -> Any:
        array[:] = np.sin(x)
        return array

    x = doubles(3)
    assert relative_error(grad(blackbox(f, numpy=True)(x), x), (x.detach().cos(),)) <= NEAR


@pytest.mark.parametrize("name", COORDINATE_ESTIMATORS)
@pytest.mark.parametrize("size", [3, 600], ids=["points made together", "points made a few at a time"])
def test_a_simulator_may_keep_its_state_where_the_inputs_lie(name: str, size: int) -> None:
    estimator = COORDINATE_ESTIMATORS[name]
    state = np.linspace(0.1, 1.0, size)
    x = torch.from_numpy(state).requires_grad_()
    at = x.detach().clone()

    def simulator(position: Tensor) -> Any:
        state[:] = position.numpy()
        return np.sin(state)

    (gradient,) = grad(blackbox(simulator, estimator=estimator)(x), x)
    apart = at.clone().requires_grad_()
    (want,) = grad(blackbox(lambda position: np.sin(position.numpy()), estimator=estimator)(apart), apart)
    assert torch.equal(gradient, want)


def test_an_array_in_another_byte_order_is_refused() -> None:
    x = doubles(3)
    with pytest.raises(TypeError, match=r"array of dtype >f8, which torch cannot hold; return it as float64"):
        blackbox(lambda x: x.numpy().astype(">f8"))(x)
