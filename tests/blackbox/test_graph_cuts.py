"""Every kind of cut is found in the module and on the line that made it, and nothing else is accused."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ignite_tbptt.blackbox import CutKind, find_graph_cuts


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
