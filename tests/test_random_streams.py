"""Streams are replayed exactly and go on as if they had not been."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ignite_tbptt.random_streams import RandomStreams, random_streams_kept


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def test_a_replay_draws_the_same_numbers_and_leaves_the_streams_where_they_were() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    streams = RandomStreams.now()
    first, second, third = draw(), draw(), draw()
    streams.restore()
    assert draw() == first
    with streams.replayed():
        assert (draw(), draw()) == (first, second)
    assert draw() == second
    assert draw() == third


def test_the_streams_are_put_back_when_the_block_raises() -> None:
    streams = RandomStreams.now()
    expected = draw()
    streams.restore()

    @random_streams_kept()
    def draw_and_fail() -> None:
        draw()
        raise KeyError

    with pytest.raises(KeyError):
        draw_and_fail()
    assert draw() == expected


def test_a_normal_number_that_numpy_keeps_for_later_is_part_of_the_state() -> None:
    np.random.seed(3)
    RandomStreams.now()
    np.random.randn()
    kept = RandomStreams.now()  # the second of the pair waits, and taking it does not move the generator
    assert not kept.have_moved()
    second = np.random.randn()
    assert kept.have_moved()
    kept.restore()
    assert not kept.have_moved()
    assert np.random.randn() == second


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), np.random.rand, random.random, lambda: np.random.seed(99)])
def test_streams_that_were_drawn_from_have_moved(draw: Callable[[], object]) -> None:
    streams = RandomStreams.now()
    assert not streams.have_moved()
    draw()
    assert streams.have_moved()
    streams.restore()
    assert not streams.have_moved()


def test_a_state_that_numpy_is_set_back_to_is_held_as_it_is_though_its_words_are_the_same() -> None:
    np.random.seed(0)
    np.random.standard_normal()  # of a pair; the other is kept
    keeping = np.random.get_state()
    np.random.standard_normal()  # the other: no word of the twister changes
    RandomStreams.latest()
    np.random.set_state(keeping)
    streams = RandomStreams.latest()
    first = np.random.standard_normal()
    assert streams.have_moved()
    with streams.replayed():
        assert np.random.standard_normal() == first


def test_what_has_not_moved_is_taken_from_the_last_state() -> None:
    np.random.seed(0)
    last = RandomStreams.latest()
    assert RandomStreams.latest() is last
    torch.rand(1)
    after = RandomStreams.latest()
    assert after is not last
    assert after.numpy_legacy is last.numpy_legacy
    np.random.standard_normal()
    keeping = RandomStreams.latest()
    np.random.standard_normal()  # the other of the pair: no word moves
    assert RandomStreams.latest().numpy_legacy is not keeping.numpy_legacy
    np.random.set_state(keeping.numpy_legacy)
    assert not keeping.have_moved()
