"""What a blackbox must not do silently: hidden states, lost gradients, cotangents that are not finite, coupled rows."""

from __future__ import annotations

import collections
import dataclasses
import math
import pickle
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import ignite_tbptt.blackbox as package
from ignite_tbptt.blackbox.errors import BlackboxError, UntrustedGradientWarning
from ignite_tbptt.blackbox.estimator import SPSA, CentralDifference, Estimator
from ignite_tbptt.blackbox.function import blackbox
from ignite_tbptt.blackbox.module import Blackbox, bind
from ignite_tbptt.blackbox.random_directions import Orthogonal
from ignite_tbptt.blackbox.stencil import central
from ignite_tbptt.blackbox.step_size import AbsoluteStep, BoundedStep, RelativeStep


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def grad(y: Tensor, *xs: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), xs)[0]


def cube(x: Tensor) -> Tensor:
    return x.detach() ** 3


class TestRepeatable:
    """A function that gives other outputs for the same inputs."""

    @pytest.mark.parametrize("kind", ["counter", "generator"])
    def test_it_is_refused_at_the_first_gradient(self, kind: str) -> None:
        calls, generator = [0], np.random.default_rng(0)

        def f(x: Any) -> Any:
            calls[0] += 1
            return x + calls[0] if kind == "counter" else 2 * x + 1e-3 * generator.standard_normal(2)

        x = doubles(1.0, 2.0)
        with pytest.raises(BlackboxError, match=r"f gives other outputs for the same inputs.*repeatable=False"):
            grad(blackbox(f, numpy=True)(x), x)

    def test_or_later_at_gradients_2_4_8(self) -> None:
        noise = [0.0]

        def f(x: Any) -> Any:
            noise[0] *= -2
            return x + noise[0]

        x, wrapped = doubles(1.0), blackbox(f, numpy=True)
        grad(wrapped(x), x)
        noise[0] = 1e-9
        with pytest.raises(BlackboxError, match="other outputs"):
            grad(wrapped(x), x)

    def test_noise_is_allowed_by_a_word_with_a_step_that_suits(self) -> None:
        generator = np.random.default_rng(0)

        def f(x: Any) -> Any:
            return 2 * x + 1e-3 * generator.standard_normal(2)

        x = doubles(1.0, 2.0)
        wide = CentralDifference(step_size=AbsoluteStep(0.5))
        # 1e-3 sqrt(2) / (2 h) is 1.4e-3
        found = grad(blackbox(f, numpy=True, repeatable=False, estimator=wide)(x), x)
        assert torch.allclose(found, torch.full_like(x, 2.0), rtol=0, atol=7e-3)
        with pytest.warns(UntrustedGradientWarning, match="not smooth on the scale of the step"):
            grad(blackbox(f, numpy=True, repeatable=False, estimator=CentralDifference())(x), x)
        errors = []
        for _ in range(9):
            with pytest.warns(UntrustedGradientWarning, match="its steps were measured"):
                found = grad(blackbox(f, numpy=True, repeatable=False)(x), x)
            errors.append(float((found - 2.0).abs().max()))
        # A search starts at 2 (1e-3)^(1/3) = 0.2, for x = 2, and noise alone may end it there. For x = 1 the step is
        # half of that, and the noise of the slope 1e-3 sqrt(2) / (2 0.1) = 7e-3: five of these. Seldom, that is.
        assert max(errors) <= 3.5e-2
        assert float(np.median(errors)) <= 7e-3

    @pytest.mark.parametrize("seed", range(5))
    def test_rows_of_a_noisy_function_are_told_from_rows_that_are_coupled(self, seed: int) -> None:
        generator = np.random.default_rng(seed)

        def noisy(x: Any, sigma: float, coupling: float) -> Any:
            return 2 * x + coupling * x.mean(0) + sigma * generator.standard_normal(x.shape)

        x = torch.linspace(1, 2, 8, dtype=torch.float64).view(4, 2).requires_grad_()
        options: dict[str, Any] = {"numpy": True, "repeatable": False, "in_dims": (0, None, None)}
        f = blackbox(noisy, estimator=CentralDifference(step_size=AbsoluteStep(0.5)), **options)
        # 1e-5 / (sqrt(2) h) is 1.4e-5
        assert torch.allclose(grad(f(x, 1e-5, 0.0), x), torch.full_like(x, 2.0), rtol=0, atol=7e-5)
        assert f.nfev == 4
        with pytest.raises(BlackboxError, match="moving row 0 changed the outputs of other rows"):
            grad(blackbox(noisy, **options)(x, 1e-5, 0.1), x)
        with pytest.raises(BlackboxError, match="its noise hides whether they are: outputs scatter by"):
            grad(blackbox(noisy, **options)(x, 1e-2, 0.1), x)

    @pytest.mark.parametrize("in_place", [False, True])
    def test_a_module_starts_every_evaluation_from_its_own_state(self, in_place: bool) -> None:
        class Leaky(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.h = np.full(2, 0.5)

            def forward(self, x: Tensor) -> Tensor:
                if in_place:
                    self.h *= 0.7
                    self.h += x.detach().numpy()
                else:
                    self.h = 0.7 * self.h + x.detach().numpy()
                return torch.from_numpy(np.tanh(self.h))

        module, x, h = Leaky(), doubles(0.1, -0.4), torch.full((2,), 0.5, dtype=torch.float64)
        bind(module)
        loss = sum(module(x * k).sum() for k in (1.0, 2.0))
        state = module.h.copy()
        found = torch.autograd.grad(loss, x)[0]
        assert (module.h == state).all()
        # each call begins with the state that it began with, a constant
        after = 0.7 * h + x.detach()
        true = 1 / torch.cosh(after) ** 2 + 2 / torch.cosh(0.7 * after + 2 * x.detach()) ** 2
        assert torch.allclose(found, true, atol=1e-8)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_cotangent_that_is_not_finite_passes_as_autograd_passes_it(value: float) -> None:
    x, v = doubles(1.0, 2.0), torch.tensor([value, 1.0], dtype=torch.float64)
    found = torch.autograd.grad(blackbox(cube)(x), x, v)[0]
    assert torch.allclose(found, torch.autograd.grad(x**3, x, v)[0], equal_nan=True, atol=1e-7)


COUPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse cumsum": lambda x: x.flip(0).cumsum(0).flip(0),
    "last row as reference": lambda x: x - x[-1:],
    "min-max": lambda x: (x - x.amin(0)) / (x.amax(0) - x.amin(0)),
    "maximum over rows": lambda x: x * x.max(),
}


class TestRows:
    """Rows that are said to be independent."""

    @pytest.mark.parametrize("name", COUPLED)
    def test_coupled_rows_are_found_out_either_way_round(self, name: str) -> None:
        for seed in range(20):
            x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            with pytest.raises(BlackboxError, match=r"rows of .* are independent, but"):
                grad(blackbox(lambda x: COUPLED[name](x).detach(), in_dims=0)(x), x)

    def test_training_modes_are_told_apart(self) -> None:
        class Cut(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(3).double()

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.norm(x)
                return y.detach()

        module = Cut()
        bind(module, in_dims=0)
        x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        module.eval()(x).sum().backward()
        with pytest.raises(BlackboxError, match="independent"):
            module.train()(x).sum().backward()

    def test_a_shared_count_shares_no_facts(self) -> None:
        count = package.EvaluationCount()
        x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
        blackbox(lambda x: x.detach() * 2, in_dims=0, count=count)(x).sum().backward()
        with pytest.raises(BlackboxError, match="independent"):
            blackbox(lambda x: x.detach() * x.detach().sum(), in_dims=0, count=count)(x).sum().backward()

    def test_all_evaluations_stay_inside_the_bounds(self) -> None:
        seen: list[Tensor] = []

        def f(x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x.detach().sqrt()

        x = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.3], [1e-9, 1 - 1e-9, 0.9]], dtype=torch.float64)
        bounded = CentralDifference(step_size=BoundedStep(RelativeStep(), 0.0, 1.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the slope at 0 is infinite
            blackbox(f, in_dims=0, estimator=bounded)(x.requires_grad_()).sum().backward()
        assert all(bool(((p >= 0) & (p <= 1)).all()) for p in seen)


@dataclasses.dataclass
class Pair:
    a: Tensor


NESTS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": Pair,
    "user dict": lambda a: collections.UserDict(a=a),
    "mapping proxy": lambda a: types.MappingProxyType({"a": a}),
}


class Tripled(Tensor):
    """A kind of its own, which the function asks for."""


class TestNoGradientIsLost:
    """Whatever requires grad gets its gradient, or is named."""

    def test_a_module_trains_its_weights(self) -> None:
        linear, x = nn.Linear(2, 1).double(), doubles(1.0, 2.0)
        wrapped = blackbox(linear)
        assert isinstance(wrapped, Blackbox)
        wrapped(x).sum().backward()
        assert torch.allclose(linear.weight.grad, x.detach()[None], atol=1e-8)  # type: ignore[arg-type]

    @pytest.mark.parametrize("kind", NESTS)
    def test_nests(self, kind: str) -> None:
        def f(nest: Any) -> Tensor:
            tensor: Tensor = nest.a if kind == "dataclass" else nest["a"]
            return tensor.detach() ** 2

        x = doubles(1.0, 2.0)
        assert torch.allclose(grad(blackbox(f)(NESTS[kind](x)), x), 2 * x.detach(), atol=1e-8)

    def test_objects_that_cannot_be_taken_apart_are_named(self) -> None:
        class Holder:
            def __init__(self) -> None:
                self.a = doubles(1.0, 2.0)

        with pytest.warns(
            UntrustedGradientWarning, match=r"f was given Holder\.a, which requires grad and receives none"
        ):
            blackbox(f_of_holder)(Holder(), doubles(1.0, 1.0))

    def test_a_subclass_is_one_in_the_evaluations(self) -> None:
        def f(x: Tensor) -> Tensor:
            return x.detach().as_subclass(Tensor) * (3.0 if type(x) is Tripled else 1.0)

        x = doubles(1.0, 2.0)
        found = grad(blackbox(f)(x.as_subclass(Tripled)).as_subclass(Tensor), x)
        assert torch.allclose(found, torch.full_like(x, 3.0), atol=1e-8)

    def test_outputs_without_a_gradient_are_named(self) -> None:
        class Series:
            pass

        x = doubles(1.0, 2.0)
        with pytest.warns(UntrustedGradientWarning, match="returned Series, which passes through without a gradient"):
            blackbox(lambda x: (x.detach() ** 2, Series()))(x)
        number, pair = blackbox(lambda x: (float(x[0]), Pair(x.detach() ** 2)))(x)
        assert isinstance(number, Tensor)
        assert number.requires_grad
        assert torch.allclose(grad(pair.a, x), 2 * x.detach(), atol=1e-8)

    def test_a_masked_array_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"returned a masked array.*filled"):
            blackbox(lambda x: np.ma.masked_array(x, mask=[False, True]), numpy=True)(doubles(1.0, 2.0))

    def test_a_module_that_differentiates_its_own_input(self) -> None:
        class Physics(nn.Module):
            def __init__(self, cut: bool) -> None:
                super().__init__()
                self.inner, self.cut = nn.Linear(1, 1).double(), cut

            def forward(self, x: Tensor) -> Tensor:
                y = torch.tanh(self.inner(x))
                (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
                return torch.from_numpy(slope.detach().numpy() ** 2) if self.cut else slope**2

        torch.manual_seed(0)
        cut, smooth = Physics(True), Physics(False)
        smooth.load_state_dict(cut.state_dict())
        bind(cut)
        for module in (cut, smooth):
            module(torch.tensor([[0.3], [0.4]], dtype=torch.float64, requires_grad=True)).sum().backward()
        for mine, theirs in zip(cut.parameters(), smooth.parameters(), strict=True):
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-8)  # type: ignore[arg-type]


def f_of_holder(holder: Any, x: Tensor) -> Tensor:
    y: Tensor = (holder.a * x).detach()
    return y


f_of_holder.__name__ = "f"


def jvp(f: Callable[..., Any], x: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    value, tangent = torch.func.jvp(f, (x,), (along,))[:2]
    return value, tangent


class TestOtherDerivatives:
    """Forward mode, and many cotangents at once."""

    def test_forward_mode_takes_two_evaluations(self) -> None:
        x, along = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, -3.0]).double()
        f = blackbox(cube)
        value, tangent = jvp(f, x, along)
        assert f.nfev == 2
        assert torch.equal(value, x**3)
        assert torch.allclose(tangent, 3 * x**2 * along, rtol=1e-8)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, along)))
        assert torch.allclose(dual.tangent, 3 * x**2 * along, rtol=1e-8)
        assert f.nfev == 4

    def test_forward_mode_of_numpy_beside_inputs_without_a_tangent(self) -> None:
        x, along, rate = torch.rand(3).double(), torch.rand(3).double(), torch.rand(2).double()
        f: Any = blackbox(lambda x, rate: (np.sin(x) * rate[0], x.sum()), numpy=True)
        value, tangent = torch.func.jvp(lambda x: f(x, rate), (x,), (along,))[:2]
        assert torch.equal(value[0], x.sin() * rate[0])
        assert torch.allclose(tangent[0], x.cos() * rate[0] * along, rtol=1e-8)
        assert torch.allclose(tangent[1], along.sum(), rtol=1e-8)

    def test_forward_mode_inside_other_transforms_is_refused(self) -> None:
        """It would be told from one difference that there is no second derivative."""
        x, along = torch.rand(2, 3).double(), torch.rand(3).double()
        first: Any = lambda x: jvp(blackbox(cube), x, along)[1]  # noqa: E731
        for transformed in (lambda: jvp(first, x[0], along), lambda: torch.vmap(first)(x)):
            with pytest.raises(BlackboxError, match=r"torch\.func\.jvp of cube inside another transform"):
                transformed()

    def test_forward_mode_on_inputs_of_any_scale(self) -> None:
        x = torch.tensor([300.0, 1e5, 0.2]).double()
        for along in torch.eye(3).double():
            _, tangent = jvp(blackbox(cube), x, along * 1e-12)
            assert torch.allclose(tangent, 3 * x**2 * along * 1e-12, rtol=1e-7)

    @pytest.mark.parametrize("in_dims", [None, 0])
    def test_many_cotangents_share_one_set_of_evaluations(self, in_dims: int | None) -> None:
        x = torch.arange(1.0, 11.0).double().requires_grad_()
        f = blackbox(lambda x: (x**3).detach() if in_dims is not None else (x**3).cumsum(0).detach(), in_dims=in_dims)
        twin = (x**3) if in_dims is not None else (x**3).cumsum(0)
        eye = torch.eye(10).double()
        (found,) = torch.autograd.grad(f(x), x, eye, is_grads_batched=True)
        (true,) = torch.autograd.grad(twin, x, eye, is_grads_batched=True)
        assert torch.allclose(found, true, rtol=0, atol=1e-6)
        assert f.nfev == (20 if in_dims is None else 2)

    def test_a_jacobian_of_10_x_10_takes_20_evaluations(self) -> None:
        x, f = torch.arange(1.0, 11.0).double(), blackbox(cube)
        found = torch.autograd.functional.jacobian(f, x, vectorize=True)
        assert torch.allclose(found, torch.diag(3 * x**2), rtol=0, atol=1e-7)
        assert f.nfev == 20

    def test_random_directions_with_many_cotangents(self) -> None:
        x = torch.arange(1.0, 5.0).double()
        f = blackbox(cube, estimator=Estimator(central(), Orthogonal(4)))
        found = torch.autograd.functional.jacobian(f, x, vectorize=True)
        assert torch.allclose(found, torch.diag(3 * x**2), rtol=0, atol=1e-6)


class TestPlainWords:
    """What was obscure."""

    def test_the_package_is_called_like_the_function(self) -> None:
        from ignite_tbptt import blackbox as called

        x = doubles(1.0, 2.0)
        assert torch.allclose(grad(called(cube)(x), x), 3 * x.detach() ** 2, atol=1e-7)  # type: ignore[operator]

    def test_the_old_keyword_is_deprecated(self) -> None:
        with pytest.warns(DeprecationWarning, match="executor"):
            blackbox(cube, evaluator=package.SerialEvaluation())

    def test_sparse_arguments(self) -> None:
        sparse, x = torch.eye(2).double().to_sparse(), doubles(1.0, 2.0)
        f = blackbox(lambda s, x: (s.to_dense() @ x).detach() * 2)
        assert torch.allclose(grad(f(sparse, x), x), torch.full_like(x, 2.0), atol=1e-8)
        with pytest.raises(TypeError, match=r"sparse tensor of <lambda> requires grad: .*values and indices"):
            f(sparse.clone().requires_grad_(), x)

    def test_infinite_outputs_that_do_not_count(self) -> None:
        x = doubles(1.0, 2.0)
        y = blackbox(lambda x: torch.stack([x.detach()[0] ** 2, torch.tensor(-math.inf).double()]))(x)
        assert torch.allclose(torch.autograd.grad(y[0], x)[0], torch.tensor([2.0, 0.0]).double(), atol=1e-8)

    def test_rows_beside_shared_arrays(self) -> None:
        x = doubles(1.0, 2.0, 3.0)

        def f(rows: Any, weights: Any) -> Any:
            return (rows["x"] * torch.as_tensor(weights)).detach(), torch.arange(3)

        y, _ = blackbox(f, in_dims=({"x": 0}, None), out_dims=(0, None))({"x": x}, np.array([2, 2, 2]))
        assert torch.allclose(grad(y, x), torch.full_like(x, 2.0), atol=1e-8)
        with pytest.raises(ValueError, match=r"gives axis 0 to weights, which is no tensor but ndarray; give None"):
            blackbox(f, in_dims=0)({"x": x}, np.array([2, 2, 2]))

    def test_random_directions_differ_from_blackbox_to_blackbox(self) -> None:
        fs = [blackbox(lambda x: x.detach() * 3, estimator=SPSA(1)) for _ in range(3)]
        x = torch.ones(32, requires_grad=True)
        found = [grad(f(x), x).sign() for f in fs]
        assert all(abs(float(a @ b)) < 32 for k, a in enumerate(found) for b in found[:k])


def test_points_have_memory_of_their_own() -> None:
    sizes: list[int] = []

    def f(x: Tensor) -> Tensor:
        sizes.append(len(pickle.dumps(x)))
        y: Tensor = x.detach().as_strided((3,), (1,)) ** 2
        return y

    x = torch.arange(1.0, 1001.0, dtype=torch.float64, requires_grad=True)
    found = grad(blackbox(f)(x), x)
    assert torch.allclose(found[:3], 2 * x.detach()[:3], atol=1e-7)
    assert max(sizes) < 9000


def test_threads_that_draw_random_numbers() -> None:
    f = blackbox(lambda x: x.detach() * (1 + torch.rand(3).double()))
    wrong: list[Tensor] = []

    def work() -> None:
        for _ in range(10):
            x = doubles(1.0, 1.0, 1.0)
            y = f(x)
            found = grad(y, x)
            if not torch.allclose(found, y.detach(), atol=1e-6):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("wrapped", [False, True], ids=["bind", "Blackbox"])
def test_a_forward_during_a_backward_in_another_thread_sees_the_weights_as_they_are(wrapped: bool) -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(1, 2, 8, dtype=torch.float64))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return torch.from_numpy(np.sin(self.w.detach().numpy() * x.detach().numpy()))

    gain = Gain()
    module = Blackbox(gain) if wrapped else gain
    if not wrapped:
        bind(gain)
    x = torch.ones(8, dtype=torch.float64)
    truth = gain.w.detach().sin()
    over, wrong, seen = threading.Event(), [], [0]

    def watch() -> None:
        while not over.is_set():
            with torch.no_grad():
                if not torch.equal(module(x), truth):
                    wrong.append(seen[0])
            seen[0] += 1

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for _ in range(60):
            gain.w.grad = None
            module(x).sum().backward()
            assert torch.allclose(gain.w.grad, gain.w.detach().cos(), atol=1e-9)  # type: ignore[arg-type]
    finally:
        over.set()
        thread.join()
    assert seen[0] > 20
    assert wrong == []


def test_memory_of_random_directions_does_not_grow_with_their_number() -> None:
    """Live tensors of the size of the input, counted at every evaluation."""
    import gc

    size, most = 100_000, [0]

    def held() -> int:
        storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is Tensor]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(n for n in sizes.values() if n >= size)

    def f(x: Tensor) -> Tensor:
        most[0] = max(most[0], held())
        return (x * x).sum().detach()

    x = torch.randn(size, requires_grad=True)
    before = held() - 4 * size
    blackbox(f, estimator=SPSA(16))(x).backward()
    assert most[0] - before <= 8 * 4 * size


class TestWindow:
    """All calls of a window in one round."""

    @staticmethod
    def run(executor: Any, steps: int = 6, drop: int = 0) -> tuple[list[Tensor], Any]:
        def cell(x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(0.5 * h + x).detach()

        f = blackbox(cell, in_dims=0, executor=executor)
        x = torch.linspace(-1, 1, steps * 4).reshape(steps, 4).double().requires_grad_()
        gain = torch.tensor(0.9).double().requires_grad_()
        for turn in range(3):
            h, total = torch.zeros(4).double(), torch.zeros(()).double()
            calls = []
            for k in range(steps + drop):
                h = f(x[k % steps] * gain, h * gain)
                calls.append(h)
                if k < steps:
                    total = total + h.square().sum()
            if turn < 2:
                total.backward()
        before = f.count.nfev, f.count.calls
        found = list(torch.autograd.grad(total, [x, gain]))
        return found, (f.count.nfev - before[0], f.count.calls - before[1])

    def test_it_equals_call_by_call_and_autograd(self) -> None:
        found, (points, calls) = self.run(None)
        serial, (serial_points, serial_calls) = self.run(package.SerialEvaluation())
        x = torch.linspace(-1, 1, 24).reshape(6, 4).double().requires_grad_()
        gain = torch.tensor(0.9).double().requires_grad_()
        h, total = torch.zeros(4).double(), torch.zeros(()).double()
        for row in x:
            h = torch.tanh(0.5 * h * gain + row * gain)
            total = total + h.square().sum()
        true = torch.autograd.grad(total, [x, gain])
        for mine, one, want in zip(found, serial, true, strict=True):
            assert torch.allclose(mine, want, atol=1e-8)
            assert torch.allclose(one, mine, atol=1e-10)
        assert points == serial_points == serial_calls == 6 * 4
        assert calls < 6

    def test_calls_outside_of_the_loss_cost_nothing(self) -> None:
        assert self.run(None, drop=3)[1] == self.run(None)[1]
