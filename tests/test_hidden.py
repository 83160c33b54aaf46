from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ignite_tbptt import detach_hidden, reset_hidden
from ignite_tbptt.checkpoint import pack_hidden, unpack_hidden
from ignite_tbptt.hidden import restore_precision, scale_gradient, warn_if_bidirectional
from tests.helpers import PairState, RecordState


def with_graph(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True) * 2


HIDDEN: list[Any] = [
    with_graph(1, 4, 3),
    (with_graph(1, 4, 3), with_graph(1, 4, 3)),
    [with_graph(1, 4, 3), None],
    {"h": with_graph(1, 4, 3), "none": None},
    PairState(with_graph(1, 4, 3), None),
    RecordState(with_graph(1, 4, 3), steps=7),
]


@pytest.mark.parametrize("hidden", HIDDEN, ids=lambda hidden: type(hidden).__name__)
def test_detach_cuts_the_graph_and_keeps_everything_else(hidden: Any) -> None:
    from ignite_tbptt import nest

    cut = detach_hidden(hidden)
    assert type(cut) is type(hidden)
    for (path, before), (path_after, after) in zip(nest.leaves(hidden), nest.leaves(cut), strict=True):
        assert path == path_after
        if isinstance(before, Tensor):
            assert after.grad_fn is None
            assert torch.equal(before, after)
        else:
            assert before is after


@pytest.mark.parametrize("hidden", [1, "state", (None, None), {}, object()])
def test_detach_refuses_what_holds_no_tensor(hidden: Any) -> None:
    with pytest.raises(TypeError, match=r"must hold tensors.*\(y_pred, hidden\)"):
        detach_hidden(hidden)


def test_restore_precision_touches_reduced_floats_alone() -> None:
    hidden = (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float16), torch.ones(2).double(), None)
    restored = restore_precision(hidden)
    assert [getattr(part, "dtype", None) for part in restored] == [torch.float32, torch.float32, torch.float64, None]


def test_reset_zeroes_the_masked_rows_and_no_others() -> None:
    hidden = (torch.ones(2, 3, 4), torch.ones(2, 3, 5))
    reset = reset_hidden(hidden, torch.tensor([False, True, False]))
    for part in reset:
        assert torch.equal(part[:, 1], torch.zeros_like(part[:, 1]))
        assert torch.equal(part[:, [0, 2]], torch.ones_like(part[:, [0, 2]]))
    assert all(bool(part.all()) for part in hidden)


def test_reset_along_another_axis_and_through_the_gradient() -> None:
    h = torch.ones(3, 4, requires_grad=True)
    reset_hidden({"h": h}, torch.tensor([True, False, False]), dim=-2)["h"].sum().backward()
    assert h.grad is not None
    assert h.grad.sum(dim=1).tolist() == [0, 4, 4]


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (torch.ones(3), TypeError, "mask must be a bool tensor.*got torch.float32"),
        ([True, False, True], TypeError, "mask must be a bool tensor.*got list"),
        (torch.ones(3, 1, dtype=torch.bool), ValueError, r"shape \(B,\).*got \(3, 1\)"),
        (torch.ones(2, dtype=torch.bool), ValueError, r"mask has 2 rows.*\(1, 3, 4\).*dim=1"),
    ],
)
def test_reset_refuses_masks_that_do_not_fit(mask: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        reset_hidden(torch.ones(1, 3, 4), mask)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 4.0])
def test_scale_gradient_is_the_identity_with_a_scaled_gradient(scale: float) -> None:
    h = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    out = scale_gradient({"h": h, "count": torch.tensor(3)}, scale)
    assert torch.equal(out["h"], h)
    assert torch.equal(out["count"], torch.tensor(3))
    if scale:
        (out["h"] ** 2).sum().backward()
        assert h.grad is not None
        assert torch.equal(h.grad, 2 * h.detach() * scale)
    else:
        assert not out["h"].requires_grad


class AttrDict(dict[str, Any]):
    @property
    def h(self) -> Any:
        return self["h"]


class Stack(list[Any]):
    pass


class Nested(NamedTuple):
    pair: PairState
    parts: list[Any]


@dataclass
class Refuses:
    h: Tensor

    def __post_init__(self) -> None:
        if self.h.ndim != 3:
            raise ValueError("made by hand only")


PACKABLE = [
    AttrDict(h=torch.ones(2)),
    Stack([torch.ones(2), None]),
    *HIDDEN,
    None,
    Nested(PairState(torch.ones(2), torch.zeros(1)), [torch.ones(1)]),
    Refuses(torch.ones(1, 2, 3)),
]


@pytest.mark.parametrize("hidden", PACKABLE, ids=lambda hidden: type(hidden).__name__)
def test_packed_states_come_back_through_a_weights_only_load(hidden: Any) -> None:
    file = io.BytesIO()
    torch.save(pack_hidden(hidden), file)
    file.seek(0)
    back = unpack_hidden(torch.load(file, weights_only=True))
    from ignite_tbptt import nest

    assert type(back) is type(hidden)
    for (path, before), (path_after, after) in zip(nest.leaves(hidden), nest.leaves(back), strict=True):
        assert path == path_after
        assert torch.equal(before.detach(), after) if isinstance(before, Tensor) else before == after


def test_a_view_is_packed_without_the_storage_behind_it() -> None:
    last_step = torch.ones(10_000, 2)[-1]
    assert pack_hidden(last_step).untyped_storage().nbytes() == 8


@pytest.mark.parametrize("name", [["no_such_module", "State"], ["os", "PathLike"], ["tests.helpers", "Forecaster"]])
def test_a_class_that_is_not_there_or_no_container_is_refused(name: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{name[1]}, which is not there.*top level"):
        unpack_hidden({"__class__": name, "children": {}})


def test_what_would_not_come_back_is_refused_when_it_is_packed() -> None:
    @dataclass
    class Local:
        h: Tensor

    for hidden, got in ((Local(torch.ones(1)), "Local"), ((torch.ones(1), torch.float32), "torch.dtype")):
        with pytest.raises(ValueError, match=f"{got}, which would not come back from a checkpoint"):
            pack_hidden(hidden)


def test_bidirectional_layers_are_warned_about_and_others_not() -> None:
    with pytest.warns(UserWarning, match="LSTM is bidirectional.*sees only the chunk"):
        warn_if_bidirectional(nn.Sequential(nn.LSTM(2, 3, bidirectional=True)))
    warn_if_bidirectional(nn.LSTM(2, 3))
    warn_if_bidirectional(lambda x: x)
