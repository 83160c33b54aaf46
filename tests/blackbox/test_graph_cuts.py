"""Every kind of cut is found in the module and on the line that made it, and nothing else is accused."""

from __future__ import annotations

import copy
import ctypes
import inspect
import io
import itertools
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ignite_tbptt import nest
from ignite_tbptt.blackbox import CutKind, FiniteDifferenceGradients, find_graph_cuts


class Cutting(nn.Module):
    """A linear layer followed by a function that cuts."""

    def __init__(self, cut: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.cut = cut

    def forward(self, x: Tensor) -> Any:
        return self.cut(self.inner(x))


def by_item(y: Tensor) -> Tensor:
    return torch.zeros(2) + y[0, 0].item()  # cut


def by_float(y: Tensor) -> Tensor:
    return torch.zeros(2) + float(y[0, 0])  # cut


def by_int(y: Tensor) -> Tensor:
    return torch.zeros(2) + int(y[0, 0])  # cut


def by_tolist(y: Tensor) -> Tensor:
    return torch.zeros(2) + float(y.tolist()[0][0])  # cut


def by_numpy(y: Tensor) -> Tensor:
    return torch.from_numpy(y.numpy(force=True))  # cut


def by_detach(y: Tensor) -> Tensor:
    return torch.from_numpy(np.sin(y.detach().numpy()))  # cut


def by_data(y: Tensor) -> Tensor:
    return y.data * 2  # cut


def by_format(y: Tensor) -> Tensor:
    return torch.zeros(2) + float(eval(f"2 * {y[0, 0]}"))  # cut


def by_constructor(y: Tensor) -> Tensor:
    return torch.tensor([y[0, 0], y[0, 1]])  # cut


def by_new_tensor(y: Tensor) -> Tensor:
    return torch.zeros(2).new_tensor([y[0, 0], y[0, 1]])  # cut


def by_no_grad(y: Tensor) -> Tensor:
    with torch.no_grad():
        return y * 2  # cut


def by_argmax(y: Tensor) -> Tensor:
    return torch.eye(2)[y.argmax(dim=1)]  # cut


def by_threshold(y: Tensor) -> Tensor:
    return (y > 0).float()  # cut


def by_integers(y: Tensor) -> Tensor:
    return y.long().float()  # cut


def by_round(y: Tensor) -> Tensor:
    return y.round()  # cut


def by_sign(y: Tensor) -> Tensor:
    return torch.sign(y)  # cut


def by_floor_division(y: Tensor) -> Tensor:
    return torch.div(y, 0.5, rounding_mode="floor")  # cut


NO_GRAD_FN = [
    (by_item, ".item()"),
    (by_float, "float(tensor)"),
    (by_int, "int(tensor)"),
    (by_tolist, ".tolist()"),
    (by_numpy, ".numpy()"),
    (by_detach, ".detach()"),
    (by_data, ".data"),
    (by_format, "formatting a tensor into a string"),
    (by_constructor, "torch.tensor(...)"),
    (by_new_tensor, ".new_tensor(...)"),
    (by_no_grad, "gradients being switched off"),
    (by_argmax, "argmax()"),
    (by_threshold, "gt()"),
    (by_integers, "long()"),
]
ZERO_GRADIENT = [(by_round, "round()"), (by_sign, "sign()"), (by_floor_division, "div()")]
KINDS = [(cut, label, CutKind.NO_GRAD_FN) for cut, label in NO_GRAD_FN]
KINDS += [(cut, label, CutKind.ZERO_GRADIENT) for cut, label in ZERO_GRADIENT]


def line_of_cut(function: Any) -> tuple[int, str]:
    lines, first = inspect.getsourcelines(function)
    (index,) = (index for index, line in enumerate(lines) if "# cut" in line)
    return first + index, lines[index].strip()


@pytest.mark.parametrize(("cut", "label", "kind"), KINDS)
def test_each_call_that_cuts_is_named_with_its_line(cut: Callable[[Tensor], Any], label: str, kind: CutKind) -> None:
    model = nn.Sequential(nn.Linear(4, 3), Cutting(cut), nn.LayerNorm(2))
    (found,) = find_graph_cuts(model, torch.randn(5, 4))
    line, source = line_of_cut(cut)
    assert found.module == "1"
    assert found.module_type == "Cutting"
    assert found.kind is kind
    assert found.lost == ("0.weight", "0.bias", "1.inner.weight", "1.inner.bias")
    assert found.partial == ()
    assert [call.label for call in found.calls] == [label]
    assert (found.calls[0].file, found.calls[0].line, found.calls[0].source) == (__file__, line, source)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize(("cut", "label", "kind"), KINDS)
def test_the_finding_agrees_with_what_backward_does(cut: Callable[[Tensor], Any], label: str, kind: CutKind) -> None:
    model = nn.Sequential(nn.Linear(4, 3), Cutting(cut), nn.Linear(2, 2))
    x = torch.randn(5, 4)
    lost = set(find_graph_cuts(model, x)[0].lost)
    model(x).sum().backward()
    upstream = {name: parameter.grad for name, parameter in model.named_parameters() if name[0] in "01"}
    assert lost == {name for name, grad in upstream.items() if grad is None or not grad.any()}
    last = model.get_parameter("2.bias").grad
    assert last is not None
    assert last.all()


def test_a_differentiable_model_has_no_cut() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    report = find_graph_cuts(model, torch.randn(3, 2, 8))
    assert report == []
    assert "no cut found" in str(report)


@pytest.mark.parametrize("layer", [nn.LSTM(3, 2), nn.GRU(3, 2), nn.TransformerEncoderLayer(3, 1, 4)])
def test_torch_modules_that_look_at_shapes_are_not_accused(layer: nn.Module) -> None:
    assert find_graph_cuts(layer, torch.randn(4, 2, 3)) == []


def test_a_value_read_for_a_log_or_a_branch_is_not_accused() -> None:
    class Logging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            self.norm = y.norm().item()
            return y if y.sum() > 0 else -y

    assert find_graph_cuts(Logging(), torch.randn(4, 3)) == []
    report = find_graph_cuts(nn.Sequential(Logging(), Cutting2()), torch.randn(4, 3))
    assert report.modules == ["1"]


class Cutting2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        return by_tolist(x)


def test_a_branch_beside_the_cut_is_not_listed() -> None:
    model = nn.Sequential(nn.Linear(3, 2), Cutting2())
    (found,) = find_graph_cuts(model, torch.ones(1, 3))
    assert [call.label for call in found.calls] == [".tolist()"]


class Step(nn.Module):
    """A cell whose state passes through numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return by_detach(torch.tanh(self.inner(x) + h))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.cell, self.decode = nn.Linear(2, 2), Step(), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros(x.shape[1], 2), []
        for step in x:
            h = self.cell(self.encode(step), h)
            outputs.append(self.decode(h))
        return torch.stack(outputs)


def test_a_cell_called_at_every_step_is_reported_once() -> None:
    (found,) = find_graph_cuts(Recurrent(), torch.randn(6, 3, 2))
    assert found.module == "cell"
    assert found.lost == ("encode.weight", "encode.bias", "cell.inner.weight", "cell.inner.bias")
    assert len(found.calls) == 1


def test_two_cuts_in_line_are_both_found_innermost_first() -> None:
    inside = nn.Sequential(nn.Linear(2, 2), Cutting2())
    model = nn.Sequential(nn.Sequential(inside, nn.Linear(2, 3)), Cutting(by_round))
    report = find_graph_cuts(model, torch.randn(1, 2))
    assert report.modules == ["0.0.1", "1"]
    assert report[0].lost == ("0.0.0.weight", "0.0.0.bias")
    assert report[1].lost == ("0.1.weight", "0.1.bias", "1.inner.weight", "1.inner.bias")


def test_a_parameter_read_apart_from_the_path_is_unreachable() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return y * self.scale.item()

    (found,) = find_graph_cuts(Scaled(), torch.randn(3, 2))
    assert (found.module, found.kind, found.lost) == ("", CutKind.UNREACHABLE, ("scale",))


def test_a_gradient_that_arrives_by_another_path_is_called_incomplete() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.quantise = nn.Linear(3, 2), Cutting(by_detach)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([self.inner(x), x[:, :1]], dim=1)
            z: Tensor = y[:, :2] + self.quantise(y)
            return z

    (found,) = find_graph_cuts(Residual(), torch.randn(3, 3))
    assert found.module == "quantise"
    assert found.partial == ("inner.weight", "inner.bias")
    assert "gradient incomplete" in str(found)


def test_a_module_that_returns_no_tensor_leaves_the_cut_to_its_caller() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> float:
            return float(x.sum())

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.reads = nn.Linear(3, 2), Reads()

        def forward(self, x: Tensor) -> Any:
            return x * self.reads(self.inner(x))

    (found,) = find_graph_cuts(nn.Sequential(Caller()), torch.randn(3, 3))
    assert found.module == "0"
    assert found.calls[0].label == "float(tensor)"


def test_a_module_run_without_gradients_leaves_the_cut_to_its_caller() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y: Tensor = self.inner(x)
            return y

    (found,) = find_graph_cuts(nn.Sequential(Teacher()), torch.randn(3, 3))
    assert found.module == "0"
    assert "no_grad" in found.remedy


def test_a_property_read_without_gradients_is_named() -> None:
    def transposed(y: Tensor) -> Tensor:
        with torch.no_grad():
            return y.mT

    (found,) = find_graph_cuts(nn.Sequential(nn.Linear(4, 3), Cutting(transposed)), torch.randn(5, 4))
    assert found.kind is CutKind.NO_GRAD_FN
    assert [call.label for call in found.calls] == ["gradients being switched off"]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpoints_are_not_cuts(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.second, self.first(x), use_reentrant=use_reentrant)

    assert find_graph_cuts(Checkpointed(), torch.randn(3, 3)) == []


def test_a_cut_that_no_call_shows_is_still_a_cut() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.clone()
            ctx.mark_non_differentiable(y)
            return y

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise NotImplementedError

    model = nn.Sequential(nn.Linear(3, 3), Cutting(Opaque.apply))
    (found,) = find_graph_cuts(model, torch.randn(2, 3))
    assert (found.module, found.calls) == ("1", ())
    assert "does not show" in str(found)


def test_functions_and_inputs_are_followed() -> None:
    x = torch.randn(3, requires_grad=True)
    (found,) = find_graph_cuts(by_data, x)
    assert found.lost == ("input 'y'",)
    assert found.is_function
    assert "the function (by_data)" in str(found)
    # with nothing that requires grad, inputs are followed as if they did
    assert find_graph_cuts(by_data, torch.randn(3))[0].lost == ("input 'y'",)
    hidden = (torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True))
    assert find_graph_cuts(lambda x, state: x + state[0].data + state[1], x, state=hidden)[0].lost == ("input 'state'",)


def test_inputs_inside_a_graph_are_sources_themselves() -> None:
    w = torch.randn(3, requires_grad=True)
    (found,) = find_graph_cuts(by_data, w * 2)
    assert found.lost == ("input 'y'",)
    assert find_graph_cuts(lambda *ys: ys[1].data, w, w * 2)[0].lost == ("input 0", "input 1")


def test_deep_graphs_do_not_exhaust_the_stack() -> None:
    def deep(x: Tensor) -> Tensor:
        for _ in range(20_000):
            x = x + 1
        return x.data

    assert len(find_graph_cuts(deep, torch.zeros(1))) == 1


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), Cutting(by_detach))
    model[3].inner = nn.Linear(4, 2)
    model[0].register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = [parameter._version for parameter in model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    with torch.no_grad():
        assert len(find_graph_cuts(model, torch.randn(5, 3, generator=torch.Generator()))) == 1
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter._version for parameter in model.parameters()] == versions
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_are_gone_when_the_model_raises() -> None:
    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("solver diverged")

    model = Cutting(fail)
    with pytest.raises(RuntimeError, match="solver diverged"):
        find_graph_cuts(model, torch.randn(2, 3))
    assert not model._forward_hooks
    assert not model.inner._forward_pre_hooks


def test_wrappers_are_looked_through() -> None:
    model = nn.DataParallel(nn.Sequential(nn.Linear(3, 3), Cutting(by_data)))
    assert find_graph_cuts(model, torch.randn(2, 3)).modules == ["1"]


def test_the_report_reads_as_prose() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Cutting(by_format))
    line, source = line_of_cut(by_format)
    assert str(find_graph_cuts(model, torch.randn(5, 4))).splitlines() == [
        "1 cut in the autograd graph",
        "1. module '1' (Cutting): its output has no grad_fn, backward() ends there",
        "    gradient lost for: 0.weight, 0.bias, 1.inner.weight, 1.inner.bias",
        f"    cut at {__file__}:{line} by formatting a tensor into a string",
        f"        {source}",
        "    remedy: compute with the tensor instead of its Python value; where that cannot be, take finite "
        "differences: FiniteDifferenceGradients(model, modules=['1']).attach(trainer), or blackbox(fn) around these "
        "lines, both from ignite_tbptt.blackbox",
        "    cost: 46 evaluations a call by central differences on the module (23 parameters and inputs), 2 by "
        "@blackbox on the lines that leave torch (values: 1); the lines cost less",
    ]
    report = str(find_graph_cuts(by_format, torch.randn(5, 4)))
    assert report.endswith("take finite differences: blackbox(by_format), from ignite_tbptt.blackbox")
    two = nn.Sequential(nn.Sequential(nn.Linear(2, 2), Cutting2(), nn.Linear(2, 3)), Cutting(by_round))
    assert str(find_graph_cuts(two, torch.randn(1, 2))).startswith("2 cuts in the autograd graph, innermost first\n1. ")


def test_long_lists_of_names_are_shortened() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)), Cutting2())
    assert "and 4 more" in str(find_graph_cuts(model, torch.randn(1, 2)))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be a module or a function, got 3 of type int"):
        find_graph_cuts(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"2 parameters are frozen. Call model.requires_grad_\(\)"):
        find_graph_cuts(nn.Linear(2, 2).requires_grad_(False), torch.zeros(2, dtype=torch.long))


def found_and_true(model: nn.Module, *inputs: Any) -> tuple[set[str], set[str]]:
    """Names of the parameters that the finder calls lost, and of those for which autograd gives nothing."""
    report = find_graph_cuts(model, *inputs)
    lost = {name for cut in report for name in cut.lost if name not in cut.partial}
    outputs = [y for y in nest.tensors(model(*inputs)) if y.requires_grad]
    named = dict(model.named_parameters())
    given = torch.autograd.grad([y.sum() for y in outputs], list(named.values()), allow_unused=True) if outputs else ()
    true = {n for n, grad in itertools.zip_longest(named, given) if grad is None}
    return {name for name in lost if name in named}, true


class NoneFor(torch.autograd.Function):
    """A product that tells autograd nothing about its first factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(gain)
        return x * gain

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return None, torch.ones_like(ctx.saved_tensors[0])


def by_storage(y: Tensor) -> Tensor:
    return torch.tensor(list(y.contiguous().untyped_storage().tolist())).float().mean()


def by_save(y: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    loaded: Tensor = torch.load(file)
    return loaded.detach()


def by_memory(y: Tensor) -> Tensor:
    values = (ctypes.c_float * y.numel()).from_address(y.data_ptr())
    return torch.tensor(list(values)).view(y.shape)


def assigned(y: Tensor) -> Tensor:
    z = torch.zeros(5, 2)
    z.data = y
    return z


WITHOUT_A_GRADIENT: dict[str, Callable[[Tensor], Any]] = {
    "topk": lambda y: y.topk(1).indices,
    "topk by name": lambda y: y.topk(1)[1],
    "sort": lambda y: y.sort().indices,
    "sort, descending": lambda y: torch.sort(y, descending=True)[1],
    "argsort": lambda y: y.argsort(),
    "max": lambda y: y.max(1).indices,
    "min": lambda y: torch.min(y, 1)[1],
    "median": lambda y: y.median(1).indices,
    "mode": lambda y: y.mode(1).indices,
    "cummax": lambda y: y.cummax(1).indices,
    "kthvalue": lambda y: y.kthvalue(1).indices,
    "max_pool": lambda y: nn.functional.max_pool1d(y[None], 2, return_indices=True)[1],
    "nonzero": lambda y: torch.ones(5, 2) * len(y.nonzero()),
    "unique": lambda y: y.unique(return_inverse=True)[1],
    "searchsorted": lambda y: torch.searchsorted(torch.zeros(3), y),
    "a new leaf": lambda y: torch.tensor(y, requires_grad=True),
    "a new leaf of a list": lambda y: torch.tensor([y[0, 0], 1.0], requires_grad=True).sum(),
    "a detached leaf": lambda y: y.detach().requires_grad_(),
    "a detached leaf, in place": lambda y: (y * 1).detach_().requires_grad_(),
    "a parameter": nn.Parameter,
    "a copied leaf": lambda y: copy.deepcopy(y.detach().requires_grad_()),
    "memory": by_memory,
    "storage": by_storage,
    "a file": by_save,
    "a pickle": lambda y: pickle.loads(pickle.dumps(y.detach())),
    "a function that returns None": lambda y: NoneFor.apply(y, torch.ones((), requires_grad=True)),  # type: ignore[no-untyped-call]
    "a gradient without a graph": lambda y: torch.autograd.grad((y**2).sum(), y)[0],
    "nothing": lambda y: torch.ones(5, 2),
    "numbers of rows": lambda y: torch.ones(5, 2) * float(y.sum() > 0),
    "a data leaf": lambda y: torch.zeros(5, 2).set_(y.data.untyped_storage()),
    "an attribute": assigned,
    "a buffer": lambda y: torch.zeros(5, 2).copy_(y.detach()),
    "out": lambda y: torch.add(y.detach(), 1, out=torch.zeros(5, 2)),
    "dlpack": lambda y: torch.from_numpy(np.from_dlpack(y.detach()).copy()),
}


@pytest.mark.filterwarnings("ignore:To copy construct", "ignore:Converting a tensor")
@pytest.mark.parametrize("name", WITHOUT_A_GRADIENT)
def test_what_was_used_and_does_not_arrive_is_named_whatever_the_reason(name: str) -> None:
    class Weighted(nn.Module):
        """An output that has a gradient, though not for what went through `cut`."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = WITHOUT_A_GRADIENT[name](self.inner(x)) * self.scale
            return out

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Tanh(), Weighted()))
    x = torch.randn(5, 4)
    found, true = found_and_true(model, x)
    assert found == true == {"0.weight", "0.bias", "1.1.inner.weight", "1.1.inner.bias"}
    assert find_graph_cuts(model, x).modules == ["1.1"]
    assert "no cut found" not in str(find_graph_cuts(model, x))


def test_a_function_that_returns_none_for_a_parameter_only() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            return NoneFor.apply(self.gain, self.inner(x))  # type: ignore[no-untyped-call]

    found, true = found_and_true(nn.Sequential(nn.Linear(3, 3), Scaled()), torch.randn(2, 3))
    assert found == true == {"1.gain"}


class Stopping(nn.Module):
    """Stops gradients, or does not, in code that can be scripted."""

    def __init__(self, stop: bool) -> None:
        super().__init__()
        self.inner, self.scale, self.stop = nn.Linear(3, 2), nn.Parameter(torch.ones(2)), stop

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return (y.detach() if self.stop else y) * self.scale


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
@pytest.mark.parametrize("stop", [True, False])
def test_scripted_modules_are_seen_from_outside(stop: bool) -> None:
    script = torch.jit.script(Stopping(stop))
    x = torch.randn(2, 3)
    found, true = found_and_true(nn.Sequential(nn.Linear(3, 3), script), x)
    assert found == true
    assert (found != set()) == stop
    assert (find_graph_cuts(script, x) != []) == stop


def test_a_branch_of_the_model_that_goes_into_no_output_is_named() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.spare = nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.body(x)
            self.seen = self.spare(y)
            return self.head(y)

    model = TwoHeads()
    found, true = found_and_true(model, torch.randn(2, 3))
    assert found == true == {"spare.weight", "spare.bias"}
    report = find_graph_cuts(model, torch.randn(2, 3))
    assert report.to_bind == []
    assert "goes into no output" in str(report)


def test_a_parameter_that_only_decides_a_branch_is_named() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.level = nn.Linear(3, 3), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Any:
            y = self.inner(x)
            return y if y.mean() > self.level else -y

    found, true = found_and_true(Gate(), torch.randn(2, 3))
    assert found == true == {"level"}


class Pair(NamedTuple):
    """Two tensors."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class State:
    """A tensor, and what is none."""

    value: Tensor
    name: str = "state"


@pytest.mark.parametrize(
    "nested",
    [lambda t: Pair(t, t.clone()), State, lambda t: {"deep": [Pair(t, State(t.clone()))]}],  # type: ignore[arg-type]
)
def test_nests_without_parameters_are_followed(nested: Callable[[Tensor], Any]) -> None:
    def through(state: Any) -> Any:
        return nest.map_tensors(lambda tensor: tensor * 2, state)

    def cut(state: Any) -> Any:
        return nest.map_tensors(lambda tensor: torch.from_numpy(tensor.detach().numpy() * 2), state)

    assert find_graph_cuts(through, nested(torch.ones(3))) == []
    (found,) = find_graph_cuts(cut, nested(torch.ones(3)))
    assert found.lost[0] == "input 'state'"


class Policy(nn.Module):
    """What it gives out is a distribution, not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_scale = nn.Linear(3, 2), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Any:
        return torch.distributions.Independent(torch.distributions.Normal(self.mean(x), self.log_scale.exp()), 1)


class Classifier(nn.Module):
    """A small network for images, with all that usually is in one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(),
            nn.LazyLinear(6), nn.GroupNorm(2, 6), nn.GELU(), nn.Linear(6, 3),
        )  # fmt: skip
        self.net(torch.zeros(2, 1, 8, 8))

    def forward(self, x: Tensor) -> Any:
        assert x.dim() == 4
        assert len(x) == 2
        y = self.net(x)
        self.largest, self.text, self.seen = y.abs().max().item(), repr(y), y.detach()
        if torch.isnan(y).any() or not torch.isfinite(y).all():
            raise ValueError("not finite")
        return y.masked_fill(y < -9, 0.0).log_softmax(-1)


class Translator(nn.Module):
    """Embedding, packed recurrent encoder, attention, loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encode = nn.Embedding(7, 4, padding_idx=0), nn.LSTM(4, 4, 2, bidirectional=True)
        self.attend, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 7)

    def forward(self, words: Tensor, lengths: Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(words), lengths)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.encode(packed)[0])
        mixed, weights = self.attend(states, states, states)
        logits = self.out(mixed)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), words.flatten())
        return {"loss": loss, "weights": weights, "best": logits.argmax(-1)}


class Sparse(nn.Module):
    """A gate that takes the two best of its experts, with their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 3, 3))

    def forward(self, x: Tensor) -> Any:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        return (weights[..., None] * torch.einsum("bi,bkio->bko", x, self.experts[chosen])).sum(1)


class StraightThrough(nn.Module):
    """Rounding with the gradient of the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        return y + (y.round() - y).detach()


WORDS = torch.tensor([[1, 2], [3, 4], [5, 6]])
ORDINARY: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "GRU": (lambda: nn.GRU(3, 4, 2, dropout=0.5), (torch.randn(5, 2, 3),)),
    "LSTM": (lambda: nn.LSTM(3, 4, 2, bidirectional=True), (torch.randn(5, 2, 3),)),
    "RNN": (lambda: nn.RNN(3, 4), (torch.randn(5, 2, 3),)),
    "GRU cell": (lambda: nn.GRUCell(3, 4), (torch.randn(2, 3),)),
    "transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False),
        (torch.randn(5, 2, 4),),
    ),
    "decoder": (lambda: nn.TransformerDecoderLayer(4, 2, 8), (torch.randn(5, 2, 4), torch.randn(3, 2, 4))),
    "images": (Classifier, (torch.randn(2, 1, 8, 8),)),
    "words": (Translator, (WORDS, torch.tensor([3, 3]))),
    "a distribution": (Policy, (torch.randn(2, 3),)),
    "experts": (Sparse, (torch.randn(2, 3),)),
    "straight through": (StraightThrough, (torch.randn(2, 3),)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (torch.randn(2, 3),)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)), (torch.randn(2, 3),)),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2)), (torch.randn(2, 3),)),
    "bilinear": (lambda: nn.Bilinear(3, 4, 2), (torch.randn(2, 3), torch.randn(2, 4))),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 3), (WORDS,)),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (torch.randn(2, 3, 5),)),
    "adaptive pool": (lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveMaxPool1d(2)), (torch.randn(2, 1, 9),)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_raise_no_alarm(name: str, training: bool) -> None:
    make, inputs = ORDINARY[name]
    assert find_graph_cuts(make().train(training), *inputs) == []


class Simulator(nn.Module):
    """Leaves torch."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh((x * self.rate).detach().numpy()))


class Agent(nn.Module):
    """A network, a target network that gradients are kept from, a simulator."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target, self.simulator = nn.Linear(2, 2), nn.Linear(2, 2), Simulator()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            goal = self.target(x)
        moved = self.simulator(self.online(x))
        loss: Tensor = (moved - goal - self.target(x).detach()) ** 2
        return loss


def test_what_is_stopped_on_purpose_is_not_bound() -> None:
    report = find_graph_cuts(Agent(), torch.randn(3, 2))
    assert report.modules == ["simulator", ""]
    assert report.to_bind == ["simulator"]
    assert report[1].stopped == ("target.weight", "target.bias")
    assert "stopped without leaving torch" in str(report[1])


def test_discovery_leaves_a_target_network_without_gradients() -> None:
    torch.manual_seed(0)
    agent, twin = Agent().double(), Agent().double()
    twin.load_state_dict(agent.state_dict())
    twin.simulator.forward = lambda x: torch.tanh(x * twin.simulator.rate)  # type: ignore[method-assign]
    x = torch.randn(3, 2, dtype=torch.float64)
    handler = FiniteDifferenceGradients(agent)
    trainer = Engine(lambda engine, batch: agent(batch).sum().backward())
    with handler.attach(trainer):
        trainer.run([x])
    twin(x).sum().backward()
    assert list(handler.counts) == ["simulator"]
    for (name, parameter), true in zip(agent.named_parameters(), twin.parameters(), strict=True):
        if name.startswith("target"):
            assert parameter.grad is None
        else:
            # central differences in float64, h near 6e-6: 4e-11 for functions of order one
            assert torch.allclose(parameter.grad, true.grad, rtol=1e-8, atol=1e-8)  # type: ignore[arg-type]


def test_discovery_warns_where_it_binds_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 3), Cutting(by_data), nn.Linear(2, 1))
    trainer = Engine(lambda engine, batch: model(batch).sum().backward())
    with FiniteDifferenceGradients(model).attach(trainer) as handler:
        trainer.run([torch.ones(2, 4)])
    assert handler.counts == {}
    assert [record.levelname for record in caplog.records if "no module" in record.message] == ["WARNING"]


def test_a_module_around_what_is_stopped_on_purpose_is_not_bound() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.target = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            goal = self.target(x).detach()
            moved: Tensor = torch.from_numpy(self.online(x).detach().numpy() ** 2) - goal
            return moved

    report = find_graph_cuts(Inline(), torch.randn(3, 2))
    assert report[0].stopped == ("target.weight", "target.bias")
    assert report.to_bind == []


def test_one_line_of_a_model_costs_less_than_the_model() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x).sum(0)
            self.log = float(y.detach().norm())
            return torch.from_numpy(np.sinh(y.detach().numpy()))

    (cut,) = find_graph_cuts(Inline(), torch.randn(3, 6))
    # 28 parameters; 4 values that go to numpy and their norm
    assert (cut.moved, cut.leaving) == (28, 5)
    assert "56 evaluations a call" in cut.cost
    assert cut.cost.endswith("the lines cost less")
    (cut,) = find_graph_cuts(Simulator(), torch.randn(3, 2))
    assert (cut.moved, cut.leaving) == (2, 6)
    assert cut.cost.endswith("the module costs less")


def test_gradients_that_are_there_stay_as_they_are() -> None:
    class Meta(nn.Module):
        """Takes a gradient step inside."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            self.inner(x).square().sum().backward()
            return self.inner(x)

    model = Meta()
    model.inner.weight.grad = kept = torch.ones(2, 2)
    assert find_graph_cuts(model, torch.randn(3, 2)) == []
    assert model.inner.weight.grad is kept
    assert kept.eq(1).all()
    assert model.inner.bias.grad is None
