"""Ranks that share the evaluations of a gradient: the truth is a rank by itself."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ignite_tbptt.blackbox import OverRanks, blackbox
from tests.blackbox.executor_contract import CASES, gradients

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What both ranks found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "ignore", "-m", "tests.blackbox.two_ranks", str(folder)]
    launched = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert launched.returncode == 0, launched.stderr[-5000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_a_rank_by_itself(case: str, ranks: Any) -> None:
    truth = gradients(case, map)
    for found in ranks:
        assert all(map(torch.equal, found[case], truth))


def test_each_rank_runs_its_share(ranks: Any) -> None:
    """The forward call and half of the 20 points; both ranks count them all, in three gradients."""
    for found in ranks:
        assert found["each_runs_its_share"].tolist() == [1 + 10, 3 * 20]


def test_numbers_that_one_rank_draws_count_on_both(ranks: Any) -> None:
    (first, after), (second, also_after) = (found["drawn_on_one_rank"] for found in ranks)
    assert torch.equal(first, second)
    assert after == also_after == random.Random(0).random()
    draw = random.Random(0).random()
    # with the number replayed the function is x (1 + draw) above 1 and x below: not smooth, but the same on both ranks
    assert first[1:].tolist() == pytest.approx([1.0, 1.0], abs=1e-9)
    assert float(first[0]) > 1 + draw / 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other_inputs", r"ValueError: ranks [1] of the group hold other inputs of sin, or other random numbers"),
        ("other_seeds", r"ValueError: ranks [1] of the group hold other inputs of <lambda>, or other random numbers"),
        ("raises_away_from_x", "BlackboxError: picky raised ArithmeticError: no convergence"),
        ("group_of_one", "ValueError: OverRanks got a group of one rank"),
    ],
)
def test_an_error_is_raised_on_both_ranks(case: str, message: str, ranks: Any) -> None:
    for found in ranks:
        assert found[case].startswith(message)


def test_a_step_is_withheld_on_all_ranks_where_one_is_off(ranks: Any) -> None:
    for found in ranks:
        assert torch.equal(found["withheld_together"], torch.ones(8))


def test_certificates_are_those_of_all_ranks(ranks: Any) -> None:
    first, second = (found["certified_together"] for found in ranks)
    assert torch.equal(first, second)
    assert first[1] > 0.1


def test_without_a_process_group() -> None:
    f = blackbox(torch.sin, executor=OverRanks())
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialized: call"):
        f(torch.ones(2, requires_grad=True)).sum().backward()
