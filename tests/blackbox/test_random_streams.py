"""Streams are replayed exactly and go on as if they had not been."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ignite_tbptt.blackbox.random_streams import RandomStreams, random_streams_kept


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
