"""A bound module gives the gradients its differentiable twin has, and is in every other way as it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ignite_tbptt.blackbox import Blackbox, CentralDifference, bind, find_graph_cuts, unbind
from ignite_tbptt.blackbox.errors import BlackboxError
from ignite_tbptt.blackbox.module import bindings_of
from ignite_tbptt.blackbox.task import ALONE, EvaluationCount
from tests.blackbox.cut_models import Cell, Nested, Through, assert_near, gradients, twins

LAYERS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "linear": (lambda: [nn.Linear(3, 2)], (4, 3)),
    "normalised": (lambda: [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()], (5, 3)),
    "dropout": (lambda: [nn.Linear(3, 6), nn.Dropout(0.4), nn.Sigmoid()], (4, 3)),
    "convolution": (lambda: [nn.Conv1d(2, 3, 2), nn.Softplus()], (2, 2, 5)),
}


def run(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(3)
    y = module(x)
    (y * torch.arange(1.0, y.numel() + 1, dtype=y.dtype).view_as(y)).sum().backward()
    return y


@pytest.mark.parametrize("wrapped", [False, True], ids=["bind", "Blackbox"])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_the_differentiable_twin(kind: str, wrapped: bool) -> None:
    layers, shape = LAYERS[kind]
    cut, smooth = twins(lambda cut: Through(*layers(), cut=cut))
    x = torch.randn(shape, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    if wrapped:
        values = run(Blackbox(cut), mine)
    else:
        bind(cut)
        values = run(cut, mine)
    assert torch.equal(values, run(smooth, theirs))
    assert_near(gradients(cut, mine), gradients(smooth, theirs))
    # running statistics have counted one batch, not one for each evaluation
    for (name, mine_buffer), (_, their_buffer) in zip(cut.named_buffers(), smooth.named_buffers(), strict=True):
        assert torch.equal(mine_buffer, their_buffer), name


def test_recurrent_layers_see_moved_weights() -> None:
    class Gru(nn.Module):
        def __init__(self, cut: bool) -> None:
            super().__init__()
            self.gru, self.cut = nn.GRU(2, 2), cut

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.gru(x)[0]
            return y.detach() if self.cut else y

    cut, smooth = twins(Gru)
    mine = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    theirs = mine.detach().clone().requires_grad_()
    bind(cut)
    run(cut, mine)
    run(smooth, theirs)
    assert_near(gradients(cut, mine), gradients(smooth, theirs))


@pytest.mark.parametrize("wrapped", [False, True], ids=["bind", "Blackbox"])
def test_nests_keywords_and_none_pass_through(wrapped: bool) -> None:
    cut, smooth = twins(Nested)
    leaves = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    if not wrapped:
        bind(cut)
    for module, (x, a, b, gain) in ((Blackbox(cut) if wrapped else cut, leaves), (smooth, copies)):
        out = module(x, (a, b), gain=gain)
        assert out["none"] is None
        assert out["n"] == 3
        (out["y"].sin().sum() + out["state"].sum()).backward()
    assert_near(gradients(cut, *leaves), gradients(smooth, *copies))


def test_evaluations_are_the_fewest_and_only_in_backward() -> None:
    count = EvaluationCount()
    cut, _ = twins(lambda cut: Through(nn.Linear(3, 2), cut=cut))
    bind(cut, count=count)
    calls: list[int] = []
    forward = cut.forward

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return forward(x)  # type: ignore[no-any-return]

    cut.forward = counted
    x = torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        assert cut(x).grad_fn is None
    y = cut(x)
    assert (len(calls), count.nfev) == (2, 0)
    y.sum().backward()
    assert (len(calls), count.nfev) == (2 + 2 * 8 + count.probes, 2 * 8)
    assert count.seconds > 0
    cut.get_parameter("layers.0.weight").requires_grad_(False)
    cut(x).sum().backward()
    assert count.nfev == 2 * 8 + 2 * 2
    cut.requires_grad_(False)
    assert cut(x).grad_fn is None
    cut(x.requires_grad_()).sum().backward()
    assert count.nfev == 2 * 8 + 2 * 2 + 2 * 12


@pytest.mark.parametrize("wrapped", [False, True], ids=["bind", "Blackbox"])
def test_independent_rows_are_moved_together(wrapped: bool) -> None:
    cut, smooth = twins(Cell)
    if wrapped:
        module: Any = Blackbox(cut, in_dims=0)
        count = module.count
    else:
        module, count = cut, EvaluationCount()
        bind(cut, in_dims=(0, 0), count=count)
    mine = [torch.randn(7, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    theirs = [x.detach().clone().requires_grad_() for x in mine]
    module(*mine).sin().sum().backward()
    smooth(*theirs).sin().sum().backward()
    assert_near(gradients(cut, *mine), gradients(smooth, *theirs))
    # two columns in each input and six weights, both ways
    assert count.nfev == 2 * (2 + 2 + 6)
    assert count.probes > 0


def test_rows_that_are_not_independent_are_found_out() -> None:
    cut, _ = twins(lambda cut: Through(nn.BatchNorm1d(2), cut=cut))
    bind(cut, name="normalise", in_dims=0)
    with pytest.raises(BlackboxError, match="rows of normalise are independent, but moving row 0"):
        cut(torch.randn(4, 2, dtype=torch.float64, requires_grad=True)).sum().backward()


def test_binding_changes_neither_names_nor_keys_and_is_taken_off_whole() -> None:
    cut, _ = twins(lambda cut: Through(nn.Linear(3, 2), cut=cut))
    before = set(vars(cut)), list(cut.state_dict()), [name for name, _ in cut.named_modules()], str(cut)
    remove = bind(cut)
    assert (set(vars(cut)), list(cut.state_dict()), [name for name, _ in cut.named_modules()], str(cut)) == before
    remove()
    remove()
    for module in cut.modules():
        for name, value in vars(module).items():
            assert "hooks" not in name or not value, name
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert not cut(x).requires_grad


def test_a_copy_differentiates_its_own_parameters_and_stops_with_the_original() -> None:
    cut, smooth = twins(lambda cut: Through(nn.Linear(3, 2), cut=cut))
    remove = bind(cut)
    twin = copy.deepcopy(cut)
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.zero_()
    x = torch.randn(4, 3, dtype=torch.float64)
    run(twin, x)
    run(smooth, x)
    assert_near(gradients(twin), gradients(smooth))
    assert all(parameter.grad is None for parameter in cut.parameters())
    remove()
    assert not twin(x).requires_grad


def test_a_pickled_module_differentiates_until_it_is_unbound() -> None:
    cut, smooth = twins(lambda cut: Through(nn.Linear(3, 2), cut=cut))
    bind(cut)
    x = torch.randn(4, 3, dtype=torch.float64)
    cut(x)
    saved = io.BytesIO()
    torch.save(cut, saved)
    saved.seek(0)
    for twin in (pickle.loads(pickle.dumps(cut)), torch.load(saved, weights_only=False)):
        run(twin, x)
        smooth.zero_grad()
        run(smooth, x)
        assert_near(gradients(twin), gradients(smooth))
        assert unbind(twin) == 1
        assert not twin(x).requires_grad
        assert unbind(twin) == 0
    assert cut(x).requires_grad


def test_user_hooks_run_once_and_are_differentiated_by_autograd() -> None:
    cut, smooth = twins(lambda cut: Through(nn.Linear(3, 2), cut=cut))
    runs: list[str] = []
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        runs.append("before")
        return (args[0] * scale,)

    def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        runs.append("after")
        return output * scale**2

    cut.register_forward_pre_hook(before)
    cut.register_forward_hook(after)
    bind(cut)
    x = torch.randn(4, 3, dtype=torch.float64)
    run(cut, x)
    assert runs == ["before", "after"]
    got = gradients(cut, scale)
    scale.grad = None
    smooth.register_forward_pre_hook(before)
    smooth.register_forward_hook(after)
    run(smooth, x)
    assert_near(got, gradients(smooth, scale))


def test_full_backward_hooks_see_both_gradients() -> None:
    cut, smooth = twins(lambda cut: Through(nn.Linear(3, 2), cut=cut))
    seen: list[dict[str, Tensor]] = []
    bind(cut)
    for module in (cut, smooth):
        module.register_full_backward_hook(lambda m, given, got: seen.append({"in": given[0], "out": got[0]}))
        run(module, torch.ones(4, 3, dtype=torch.float64, requires_grad=True))
    assert len(seen) == 2
    assert_near(seen[0], seen[1])


def test_buffers_random_streams_flags_and_versions_are_untouched_by_backward() -> None:
    cut, _ = twins(lambda cut: Through(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), cut=cut))
    bind(cut)
    y = cut(torch.randn(5, 3, dtype=torch.float64))
    before = {name: value.clone() for name, value in cut.state_dict().items()}
    versions = [value._version for value in (*cut.parameters(), *cut.buffers())]
    streams = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (np.random.get_state()[1] == streams[1]).all()  # type: ignore[index]
    assert random.getstate() == streams[2]
    assert all(torch.equal(value, before[name]) for name, value in cut.state_dict().items())
    assert [value._version for value in (*cut.parameters(), *cut.buffers())] == versions
    assert all(module.training for module in cut.modules())


def test_evaluations_run_in_the_mode_of_their_forward() -> None:
    cut, smooth = twins(lambda cut: Through(nn.Linear(3, 4), nn.BatchNorm1d(4), cut=cut))
    bind(cut)
    x = torch.randn(5, 3, dtype=torch.float64)
    y = cut(x)
    cut.eval()
    y.square().sum().backward()
    assert not any(module.training for module in cut.modules())
    smooth(x).square().sum().backward()
    assert_near(gradients(cut), gradients(smooth))


class Stateful(nn.Module):
    """Keeps its hidden state, a counter and a solver made on first use."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cell = Cell(cut)
        self.h: Tensor | None = None
        self.calls = 0
        self.solver: list[str] | None = None
        self.made: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.solver is None:
            self.solver = ["costly"]
            self.made.append(1)
        self.calls += 1
        h: Tensor = self.cell(x, torch.zeros_like(x) if self.h is None else self.h)
        self.h = h.detach()
        return h


def test_a_state_kept_on_the_module_is_neither_advanced_nor_mistaken() -> None:
    cut, smooth = twins(Stateful)
    bind(cut)
    losses = []
    for module in (cut, smooth):
        losses.append(sum(module(torch.full((1, 2), float(t), dtype=torch.float64)).sum() for t in range(3)))
    kept = cut.h
    for loss in losses:
        loss.backward()
    assert_near(gradients(cut), gradients(smooth))
    assert cut.h is kept
    assert (cut.calls, cut.made) == (3, [1])


def test_evaluations_start_from_the_buffers_that_the_forward_started_from() -> None:
    class Advancing(nn.Module):
        def __init__(self, cut: bool) -> None:
            super().__init__()
            self.inner, self.cut = nn.Linear(2, 2), cut
            self.register_buffer("phase", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            phase = self.get_buffer("phase").add_(0.5)
            y: Tensor = self.inner(x) * phase.clone()
            return y.detach() if self.cut else y

    cut, smooth = twins(Advancing)
    bind(cut)
    x = torch.ones(1, 2, dtype=torch.float64)
    for module in (cut, smooth):
        (module(x) + module(x)).sum().backward()
        assert module.phase.item() == 1.0
    assert_near(gradients(cut), gradients(smooth))


def test_what_the_module_does_to_its_inputs_stays_inside() -> None:
    class Mutating(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values = x.detach().numpy()
            values *= 2.0
            return torch.from_numpy(values)

    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    for module in (Blackbox(Mutating()), Mutating()):
        if isinstance(module, Mutating):
            bind(module)
        x.grad = None
        y = module(x)
        assert x.tolist() == [1.0, 2.0]
        y.sum().backward()
        assert x.tolist() == [1.0, 2.0]
        torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


def test_tied_parameters_receive_one_gradient() -> None:
    class Tied(nn.Module):
        def __init__(self, cut: bool) -> None:
            super().__init__()
            self.first, self.second, self.cut = nn.Linear(2, 2), nn.Linear(2, 2), cut
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(torch.tanh(self.first(x)))
            return y.detach() if self.cut else y

    cut, smooth = twins(Tied)
    bind(cut)
    x = torch.randn(3, 2, dtype=torch.float64)
    run(cut, x)
    run(smooth, x)
    assert_near(gradients(cut), gradients(smooth))


def test_calls_in_one_graph_do_not_mix() -> None:
    cut, smooth = twins(Cell)
    bind(cut)
    for module in (cut, smooth):
        h = torch.zeros(1, 2, dtype=torch.float64)
        for t in range(4):
            h = module(torch.full((1, 2), 0.3 * t, dtype=torch.float64), h)
        h.sum().backward()
    assert_near(gradients(cut), gradients(smooth))


def test_a_mended_model_has_no_cut() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    cut, _ = twins(lambda cut: nn.Sequential(nn.Linear(3, 3), Through(nn.Linear(3, 2), cut=cut)))
    assert find_graph_cuts(cut, x).modules == ["1"]
    assert find_graph_cuts(nn.Sequential(cut[0], Blackbox(cut[1])), x) == []
    bind(cut[1])
    assert find_graph_cuts(cut, x) == []


def test_inputs_are_freed_with_the_graph() -> None:
    cell = Cell(True).double()
    bind(cell)
    x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True) * 1
    y, seen = cell(x, x), weakref.ref(x)
    y.sum().backward()
    gc.collect()
    gc.disable()
    try:
        del x, y
        assert seen() is None
    finally:
        gc.enable()


class Failing(nn.Module):
    fail_from: ClassVar[int]
    log: ClassVar[list[int]]  # evaluations run on copies, which share no more than their class

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(1))
        Failing.fail_from, Failing.log = 10**9, []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(1)
        self.get_buffer("seen").add_(1)
        self.w.data[0] = self.w.data[0]
        if len(self.log) > self.fail_from:
            raise OverflowError("solver diverged")
        return (x * self.w).detach()


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    module = Failing()
    bind(module)
    Failing.fail_from = 0
    with pytest.raises(OverflowError, match="solver diverged"):
        module(torch.ones(2, dtype=torch.float64))
    Failing.fail_from = 10**9
    x = torch.tensor([2.0, 3.0], dtype=torch.float64)
    module(x).sum().backward()
    torch.testing.assert_close(module.w.grad, x)


def test_an_evaluation_that_raises_leaves_the_module_as_it_was() -> None:
    module = Failing()
    bind(module)
    y = module(torch.ones(2, dtype=torch.float64))
    Failing.fail_from = 3
    weight, buffer, streams = module.w, module.get_buffer("seen"), torch.get_rng_state()
    with pytest.raises(
        BlackboxError, match=r"Failing raised OverflowError: solver diverged\nin evaluation \d+, parameter w"
    ):
        y.sum().backward()
    assert module.w is weight
    assert module.get_buffer("seen") is buffer
    assert buffer.item() == 1
    assert torch.equal(torch.get_rng_state(), streams)
    assert weight.tolist() == [1.0, 1.0]
    Failing.fail_from = 10**9
    module(torch.ones(2, dtype=torch.float64)).sum().backward()


def test_the_last_of_two_bindings_answers() -> None:
    first, second = EvaluationCount(), EvaluationCount()
    cut, _ = twins(lambda cut: Through(nn.Linear(2, 2), cut=cut))
    remove_first = bind(cut, count=first)
    remove_second = bind(cut, count=second)
    x = torch.ones(1, 2, dtype=torch.float64)
    cut(x).sum().backward()
    assert (first.nfev, second.nfev) == (0, 12)
    remove_second()
    cut(x).sum().backward()
    assert (first.nfev, second.nfev) == (12, 12)
    remove_first()
    assert not cut(x).requires_grad


def test_a_module_that_autograd_sees_through_is_told_once() -> None:
    _, smooth = twins(lambda cut: Through(nn.Linear(2, 2), cut=cut))
    bind(smooth, name="cell.act")
    x = torch.ones(1, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"cell\.act: autograd sees through this module without help"):
        smooth(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smooth(x).sum().backward()


def test_a_gradient_that_comes_by_an_attribute_is_told() -> None:
    cut, _ = twins(lambda cut: Through(nn.Linear(2, 2), cut=cut))
    cut.table = torch.ones(2, requires_grad=True) * 2
    bind(cut)
    with pytest.warns(UserWarning, match="attribute 'table' holds a tensor that requires grad"):
        cut(torch.ones(1, 2, dtype=torch.float64))


def test_a_state_kept_with_its_graph_is_told_when_it_is_met() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.h = nn.Linear(2, 2).double(), torch.zeros(1, 2, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            self.h = torch.tanh(self.inner(x) + self.h)
            return self.h.detach()

    module = Keeps()
    bind(module, name="keeps")
    x = torch.ones(1, 2, dtype=torch.float64)
    module(x)
    with pytest.warns(UserWarning, match="keeps: attribute 'h' holds a tensor that requires grad"):
        module(x)
    module(x)


def test_a_wrapped_module_gives_tensors_with_and_without_gradients() -> None:
    class Arrays(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.numpy() ** 2, float(x.sum())

    box, x = Blackbox(Arrays()), torch.ones(2, dtype=torch.float64)
    for inputs in (x, x.clone().requires_grad_()):
        square, total = box(inputs)
        assert (square.dtype, total.dtype, float(total.detach())) == (torch.float64, torch.float64, 2.0)
        assert square.requires_grad == total.requires_grad == inputs.requires_grad


def test_dataclasses_are_nests() -> None:
    @dataclass
    class Batch:
        x: Tensor

    class Takes(nn.Module):
        def forward(self, batch: Batch) -> Tensor:
            return batch.x.detach() ** 2

    class Gives(nn.Module):
        def forward(self, x: Tensor) -> Batch:
            return Batch(x.detach() * 3)

    takes, gives = Takes(), Gives()
    bind(takes)
    bind(gives)
    assert not takes(Batch(torch.ones(2))).requires_grad
    x = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    batch = gives(takes(Batch(x)))
    assert type(batch) is Batch
    batch.x.sum().backward()
    torch.testing.assert_close(x.grad, 6 * x.detach())


def test_replicas_of_data_parallel_are_refused() -> None:
    replica = Cell(True)._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    bind(replica, name="cell")
    with pytest.raises(RuntimeError, match="cell: DataParallel runs copies"):
        replica(torch.ones(1, 2), torch.ones(1, 2))


def test_bad_modules_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function; for a function use blackbox"):
        bind(run)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"module_or_fn must be a torch\.nn\.Module or a function, got 3 of type int"):
        Blackbox(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="numpy=True is for functions of arrays"):
        Blackbox(nn.Linear(2, 2), numpy=True)


class TestBlackbox:
    def test_a_function_is_a_module_like_any_other(self) -> None:
        def as_text(x: Tensor, w: Tensor) -> Tensor:
            w0, w1 = w.tolist()
            return torch.tensor([eval(f"{a} * {w0} + ({a}) ** 2 * {w1}") for a in x.tolist()], dtype=torch.float64)

        box = Blackbox(as_text)
        x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
        w = torch.tensor([1.2, -3.4], dtype=torch.float64, requires_grad=True)
        y = box(x, w)
        assert torch.equal(y, as_text(x, w))
        y.sum().backward()
        torch.testing.assert_close(w.grad, torch.stack([x.sum(), x.square().sum()]), rtol=1e-8, atol=0)
        assert box.nfev == 4
        assert list(box.state_dict()) == []

    def test_numpy_functions_receive_arrays(self) -> None:
        box = Blackbox(np.sin, numpy=True)
        x = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
        box(x).sum().backward()
        torch.testing.assert_close(x.grad, x.detach().cos(), rtol=1e-8, atol=1e-8)
        assert "sin" in repr(box)
        assert box.nfev == 4

    def test_a_module_may_ask_for_numpy_without_detaching(self) -> None:
        class Plain(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.from_numpy(np.sin(x.numpy()))

        layer, x = nn.Linear(2, 2).double(), torch.ones(1, 2, dtype=torch.float64)
        Blackbox(Plain())(layer(x)).sum().backward()
        torch.testing.assert_close(layer.bias.grad, layer(x).cos()[0], rtol=1e-8, atol=1e-8)

    def test_copies_and_pickles_work(self) -> None:
        box = Blackbox(Cell(True).double())
        for twin in (copy.deepcopy(box), pickle.loads(pickle.dumps(box))):
            twin(torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)).sum().backward()
            assert all(parameter.grad is not None for parameter in twin.parameters())
        assert list(box.state_dict()) == ["module.mix.weight", "module.mix.bias"]
        assert all(parameter.grad is None for parameter in box.parameters())


def test_autocast_of_the_forward_holds_in_the_evaluations() -> None:
    dtypes: list[torch.dtype] = []

    class Mixed(nn.Module):
        def __init__(self, cut: bool) -> None:
            super().__init__()
            self.inner, self.cut = nn.Linear(8, 8), cut

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x).tanh()
            dtypes.append(y.dtype)
            return y.detach() if self.cut else y

    torch.manual_seed(0)
    cut = Mixed(True)
    bind(cut)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = cut(torch.randn(4, 8))
    y.float().sum().backward()
    # forward and evaluations must be one function: either all in bfloat16, or all evaluations by themselves in float32
    assert dtypes[0] is torch.bfloat16
    assert len(set(dtypes[1:])) == 1


def test_compiled_models_break_around_the_binding() -> None:
    cut, smooth = twins(lambda cut: Through(nn.Linear(3, 2), cut=cut))
    model, truth = nn.Sequential(nn.Linear(3, 3).double(), cut), nn.Sequential(nn.Linear(3, 3).double(), smooth)
    truth.load_state_dict(model.state_dict())
    bind(cut)
    x = torch.randn(4, 3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(torch.compile(model, backend="eager"), x)
    run(truth, x)
    assert_near(gradients(model), gradients(truth))


def test_each_call_of_a_window_is_in_the_state_that_it_began_in() -> None:
    """Nothing changed between calls, then everything that can: an attribute, a buffer, a frozen parameter, a layer."""

    class Scaled(nn.Module):
        offset: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0
            self.register_buffer("offset", torch.zeros(2, dtype=torch.float64))
            self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
            self.inner: nn.Module = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x * self.scale + self.offset) * self.frozen
            return y.detach()

    changes: list[Callable[[Scaled], object]] = [
        lambda m: None,
        lambda m: setattr(m, "scale", 3.0),
        lambda m: m.offset.add_(0.5),
        lambda m: setattr(m, "frozen", nn.Parameter(torch.full_like(m.frozen, 2.0), requires_grad=False)),
        lambda m: setattr(m, "inner", nn.Tanh()),
        lambda m: None,
        lambda m: m.eval(),
    ]
    module, truth = Scaled(), Scaled()
    bind(module, estimator=CentralDifference(order=4))
    found = []
    for model in (module, truth):
        x = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
        total = torch.zeros((), dtype=torch.float64)
        for change in changes:
            change(model)
            y = model(x) if model is module else model.inner(x * model.scale + model.offset) * model.frozen
            total = total + y.sum()
        found.append(torch.autograd.grad(total, x)[0])
    assert torch.allclose(found[0], found[1], rtol=1e-10)


def test_a_forward_that_was_interrupted_holds_nobody_up() -> None:
    class Interrupted(nn.Module):
        interrupt = False

        def forward(self, x: Tensor) -> Tensor:
            if self.interrupt:
                raise KeyboardInterrupt
            return torch.from_numpy(x.detach().numpy() ** 2)

    module = Interrupted()
    found: list[Any] = []
    remove = bind(module)
    (binding,) = bindings_of(module)

    def gradient() -> None:
        x = torch.ones(2, requires_grad=True)
        module(x).sum().backward()
        found.append(x.grad)

    for in_between in (False, True):
        module.interrupt = True
        with pytest.raises(KeyboardInterrupt):
            module(torch.ones(2, requires_grad=True))
        module.interrupt = False
        if in_between:
            gradient()
        other = threading.Thread(target=gradient, daemon=True)
        other.start()
        other.join(60)
        assert not other.is_alive()
    assert len(found) == 3
    assert all(torch.allclose(one, torch.full((2,), 2.0)) for one in found)
    gradient()
    assert not binding._begun  # nor are the inputs of interrupted forwards held
    remove()


@pytest.mark.parametrize("depth", [0, 2])
def test_a_module_inside_another_and_inside_itself(depth: int) -> None:
    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.detach().numpy() ** 2)

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Inside()

        def forward(self, x: Tensor, depth: int) -> Any:
            return self(x, depth - 1) if depth else torch.from_numpy(3 * self.inside(x).detach().numpy())

    module = Outside()
    bind(module)
    bind(module.inside)
    x = torch.ones(2, requires_grad=True)
    module(x, depth).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.full((2,), 6.0))
    assert not any(ALONE._calls.values())  # what each forward held it has let go of
