from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ignite_tbptt import ContiguousStreams


@given(
    length=st.integers(1, 80),
    rows=st.integers(1, 6),
    steps=st.integers(1, 9),
    world_size=st.integers(1, 3),
    dim=st.sampled_from([0, 1]),
)
def test_every_step_comes_once_in_order_and_the_rest_is_counted(
    length: int, rows: int, steps: int, world_size: int, dim: int
) -> None:
    data = torch.arange(length)
    if length < rows * world_size:
        with pytest.raises(ValueError, match="fewer than one for each"):
            ContiguousStreams(data, rows, steps, remainder="drop", world_size=world_size, rank=0)
        return
    seen: list[int] = []
    for rank in range(world_size):
        streams = ContiguousStreams(data, rows, steps, dim=dim, remainder="drop", rank=rank, world_size=world_size)
        parts = list(streams)
        assert len(parts) == len(streams)
        assert all(part.shape[1 - dim] == rows for part in parts)
        assert all(part.shape[dim] == steps for part in parts[:-1])
        whole = torch.cat(parts, dim)
        seen += (whole if dim == 1 else whole.t()).flatten().tolist()
    assert seen == list(range(length - streams.dropped))
    assert streams.dropped == length % (rows * world_size)


def test_a_nest_is_laid_out_alike_and_batches_are_views() -> None:
    ids, features = torch.arange(12), torch.randn(12, 3)
    batch = next(iter(ContiguousStreams({"ids": ids, "features": features}, rows=2, steps=4)))
    assert batch["ids"].tolist() == [[0, 6], [1, 7], [2, 8], [3, 9]]
    assert torch.equal(batch["features"], torch.stack([features[:4], features[6:10]], dim=1))
    assert batch["features"].untyped_storage().data_ptr() == features.untyped_storage().data_ptr()


def test_steps_left_over_are_an_error_unless_they_may_be_dropped() -> None:
    with pytest.raises(ValueError, match=r"3 steps at the end are left over. Pass remainder='drop'"):
        ContiguousStreams(torch.arange(11), rows=4, steps=2)
    assert ContiguousStreams(torch.arange(11), rows=4, steps=2, remainder="drop").dropped == 3


def test_resuming_is_for_one_epoch() -> None:
    streams = ContiguousStreams(torch.arange(12), rows=2, steps=2)
    streams.resume_at(2)
    assert [batch.tolist() for batch in streams] == [[[4, 10], [5, 11]]]
    assert len(list(streams)) == 3
    with pytest.raises(ValueError, match="one of the 3 batches"):
        streams.resume_at(3)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"rows": 0}, ValueError, "rows must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an int, got 1.5"),
        ({"rows": True}, TypeError, "rows must be an int, got True"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank must be below world_size=2, got 2"),
        ({"rank": -1}, ValueError, "rank must be at least 0"),
        ({"dim": 2}, ValueError, "dim must be 0, time first, or 1"),
        ({"remainder": "pad"}, ValueError, "remainder must be 'error' or 'drop', got 'pad'"),
        ({"data": (torch.arange(4), torch.arange(5))}, ValueError, r"data\[0\] has 4, data\[1\] has 5"),
        ({"data": [1, 2]}, TypeError, r"data\[0\] must be a tensor.*got int"),
        ({"data": torch.tensor(1)}, TypeError, "got a tensor without axes"),
        ({"data": ()}, ValueError, "there is no tensor"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"data": torch.arange(12), "rows": 2, "steps": 2, **changes}
    with pytest.raises(kind, match=message):
        ContiguousStreams(**arguments)
