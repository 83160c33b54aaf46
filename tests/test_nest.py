from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import FrozenInstanceError, dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ignite_tbptt import nest


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Record:
    tensor: Tensor
    derived: int = field(default=0, init=False)


ONE = torch.ones(2)
NESTS: list[Any] = [
    ONE,
    (ONE, None),
    [ONE, "name", 3],
    {"a": ONE, "b": [ONE]},
    OrderedDict(a=ONE),
    defaultdict(list, a=ONE),
    MappingProxyType({"a": ONE}),
    Pair(ONE, {"x": (ONE,)}),
    Record(ONE),
]


@pytest.mark.parametrize("container", NESTS, ids=lambda container: type(container).__name__)
def test_map_keeps_the_kind_of_container_and_its_other_leaves(container: Any) -> None:
    doubled = nest.map_tensors(lambda tensor: 2 * tensor, container)
    assert type(doubled) is type(container)
    before, after = dict(nest.leaves(container)), dict(nest.leaves(doubled))
    assert list(before) == list(after)
    for path, leaf in before.items():
        if isinstance(leaf, Tensor):
            assert torch.equal(after[path], 2 * leaf)
        else:
            assert after[path] is leaf


def test_map_leaves_the_original_alone() -> None:
    original = {"a": [ONE]}
    nest.map_tensors(lambda tensor: 2 * tensor, original)
    assert original["a"][0] is ONE


def test_a_defaultdict_keeps_its_factory() -> None:
    assert nest.map_tensors(lambda tensor: tensor, defaultdict(list, a=ONE))["new"] == []


def test_a_frozen_dataclass_stays_frozen_and_keeps_fields_without_init() -> None:
    record = Record(ONE)
    object.__setattr__(record, "derived", 7)
    copied = nest.map_tensors(lambda tensor: 2 * tensor, record)
    assert copied.derived == 7
    with pytest.raises(FrozenInstanceError):
        copied.derived = 1


def test_spell_writes_the_path_as_python() -> None:
    assert nest.spell("batch", (0, "image")) == "batch[0]['image']"
