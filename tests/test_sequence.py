from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from ignite_tbptt import split_sequence


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def ramp(*shape: int) -> torch.Tensor:
    return torch.arange(float(np.prod(shape))).view(shape)


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_chunks_are_the_slices_that_torch_makes(dim: int) -> None:
    x = ramp(6, 7)
    length, chunk = split_sequence((x, x), dim)
    pieces = x.split(4, dim)
    assert length == x.shape[dim]
    assert all(torch.equal(part, pieces[0]) for part in chunk(0, 4))
    assert all(torch.equal(part, pieces[1]) for part in chunk(4, length - 4))


def test_chunks_are_views() -> None:
    x = ramp(6, 2)
    _, chunk = split_sequence(x, 0)
    assert chunk(2, 2).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@given(cuts=st.lists(st.integers(1, 19), unique=True).map(sorted))
def test_chunks_that_cover_the_sequence_give_it_back(cuts: list[int]) -> None:
    batch: dict[str, Any] = {"x": ramp(20, 2), "y": [ramp(20), ramp(20, 1, 3)]}
    length, chunk = split_sequence(batch, 0)
    edges = [0, *cuts, length]
    parts = [chunk(start, stop - start) for start, stop in pairwise(edges)]
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    for index in (0, 1):
        assert torch.equal(torch.cat([part["y"][index] for part in parts]), batch["y"][index])


def test_the_nest_and_what_is_no_tensor_go_with_every_chunk() -> None:
    batch = {"pair": Pair(ramp(6, 2), ramp(6)), "names": ["a", "b"], "none": None}
    part = split_sequence(batch, 0)[1](0, 2)
    assert isinstance(part["pair"], Pair)
    assert part["pair"].y.tolist() == [0, 1]
    assert part["names"] == ["a", "b"]
    assert part["none"] is None


def test_static_entries_go_whole_with_every_chunk() -> None:
    speaker = ramp(3)
    batch = {"x": {"audio": ramp(6, 3), "speaker": speaker}, "y": ramp(6, 3)}
    length, chunk = split_sequence(batch, 0, static=[("x", "speaker")])
    assert length == 6
    assert chunk(0, 2)["x"]["speaker"] is speaker
    assert chunk(4, 2)["x"]["speaker"] is speaker
    assert chunk(4, 2)["x"]["audio"].shape == (2, 3)


def test_final_entries_go_with_the_chunk_that_ends_the_sequence() -> None:
    label = ramp(3)
    _, chunk = split_sequence((ramp(6, 3), label), 0, final=[1])
    assert chunk(0, 4)[1] is None
    assert chunk(4, 2)[1] is label


@pytest.mark.parametrize(
    ("batch", "dim", "kind", "message"),
    [
        ((ramp(10, 2), ramp(6, 2)), 0, ValueError, r"batch\[0\] has 10, batch\[1\] has 6"),
        (
            ({"signal": ramp(10, 2), "speaker": ramp(2)}, ramp(10, 2)),
            0,
            ValueError,
            r"\['speaker'\] has 2, .*split_sequence, static=\[\(0, 'speaker'\)\]\), or final=\[\(0, 'speaker'\)\]",
        ),
        ((ramp(10, 2), ramp(10)), 1, ValueError, r"dim=1 is out of range for batch\[1\] of shape \(10,\).*static"),
        ({"x": ramp(10), "y": ramp(10)}, -2, ValueError, r"dim=-2 is out of range for batch\['x'\]"),
        ((torch.tensor(1.0), ramp(3)), 0, ValueError, r"out of range for batch\[0\] of shape \(\)"),
        ((ramp(0, 2), ramp(0, 2)), 0, ValueError, r"empty sequence"),
        (ramp(0, 2), 0, ValueError, r"empty sequence"),
        (([], "text"), 0, ValueError, r"no tensor to cut"),
        (3, 0, ValueError, r"no tensor to cut"),
        ((np.zeros((4, 2)), ramp(4)), 0, TypeError, r"batch\[0\] is a numpy array.*from_numpy"),
        (
            (pack_sequence([ramp(4, 1), ramp(2, 1)]), ramp(4)),
            0,
            TypeError,
            r"batch\[0\] is a PackedSequence.*loss_weight",
        ),
    ],
)
def test_bad_batches_are_refused(batch: Any, dim: int, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        split_sequence(batch, dim)


def test_the_errors_name_the_entry_by_its_path() -> None:
    batch = ({"signal": ramp(6, 3), "speaker": ramp(3)}, ramp(6, 3))
    with pytest.raises(ValueError, match=r"no batch\['speaker'\]. Name \(0, 'speaker'\) instead"):
        split_sequence(batch, 0, static=["speaker"])
    with pytest.raises(ValueError, match=r"static=\[\(0, 'speaker'\)\]\), or final"):
        split_sequence(batch, 1)
    assert split_sequence(batch, 0, static=[(0, "speaker")])[0] == 6


@pytest.mark.parametrize("which", ["static", "final"])
def test_an_entry_that_the_batch_does_not_have_is_refused(which: str) -> None:
    entries: dict[str, Any] = {which: ["speaker"]}
    with pytest.raises(ValueError, match=r"no batch\['speaker'\]"):
        split_sequence({"x": ramp(4)}, 0, **entries)
