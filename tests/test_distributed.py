"""Two gloo ranks under idist.Parallel: DDP, shares of a stream, ranks that disagree, and ranks that stop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ignite_tbptt import ContiguousStreams, FullBackpropagation
from tests.helpers import Forecaster, seeded
from tests.two_ranks import PADDED, STOPS, WHOLE, double_batches, padded_stream, stream, train

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what a case gave on a rank; all cases are run in one launch."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "ignore", "-m", "tests.two_ranks", str(folder)]
    launched = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert launched.returncode == 0, launched.stderr[-5000:]
    return lambda case: [torch.load(folder / f"{case}_{rank}.pt", weights_only=True) for rank in range(2)]


def assert_close(ours: dict[str, Any], truth: dict[str, Any]) -> None:
    """The mean over rows is taken in another order: a few ulp at each of 48 steps."""
    assert "error" not in ours, ours["error"]
    for name, value in truth.items():
        assert torch.allclose(ours[name], value, rtol=1e-12, atol=1e-13), name


def in_one_process(data: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    model = seeded(Forecaster).double()
    train(model, data, **kwargs)
    return model.state_dict()


@pytest.mark.parametrize("case", WHOLE)
def test_two_ranks_with_half_the_rows_are_one_with_all(results: Any, case: str) -> None:
    truth = in_one_process(ContiguousStreams(stream(), rows=4, steps=7), **WHOLE[case])
    for ours in results(case):
        assert_close(ours, truth)


@pytest.mark.parametrize("case", PADDED)
def test_padding_on_one_rank_alone_is_the_mean_over_all_that_counts(results: Any, case: str) -> None:
    """Rank 1 has whole windows without a target; both together make the masked mean, whatever shares a step."""
    truth = in_one_process(ContiguousStreams(padded_stream(), rows=4, steps=7), **PADDED[case])
    for ours in results(case):
        assert_close(ours, truth)


def test_segments_are_recomputed_where_ddp_looks_for_unused_parameters(results: Any) -> None:
    truth = in_one_process(double_batches(), tbtt_step=FullBackpropagation(4))
    for ours in results("recomputed_unused"):
        assert_close(ours, truth)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("windows", "different numbers of time iterations in iteration 1: 3 on rank 0, 2 on rank 1"),
        ("refused", "different numbers of time iterations in iteration 1: -1 on rank 0, 3 on rank 1"),
        ("number_of_batches", "different numbers of batches in an epoch: 3 on rank 0, 2 on rank 1"),
        ("number_of_batches_not_known", "different numbers of batches: the data ended on rank 1"),
        ("no_target_on_one_rank", "rank 1 by ValueError: no chunk of the batch had a target"),
        ("failing_handler", "the run was ended on rank 1 by ZeroDivisionError: division by zero"),
        ("one_rank_interrupted", "interrupt() was called on rank 1 alone"),
    ],
)
def test_ranks_that_disagree_raise_everywhere(results: Any, case: str, message: str) -> None:
    first, second = (result.get("error", "") for result in results(case))
    own = {
        "refused": "ValueError: batch is an empty sequence",
        "no_target_on_one_rank": "ValueError: no chunk of the batch had a target",
        "failing_handler": "ZeroDivisionError: division by zero",
    }
    assert message in first or (case == "refused" and own[case] in first)
    assert message in second or own[case] in second


@pytest.mark.parametrize("case", STOPS)
def test_one_rank_that_stops_stops_both_where_both_would_stop(results: Any, case: str) -> None:
    one, other = results(case)
    assert "error" not in one, one["error"]
    for name, value in results(f"both_{case}")[0].items():
        assert torch.equal(one[name], value), name
        assert torch.equal(other[name], value), name


def test_a_nan_on_one_rank_is_stepped_on_by_none(results: Any) -> None:
    first, second = results("nan_on_one_rank")
    for name, value in first.items():
        assert value.isfinite().all()
        assert torch.equal(value, second[name])


def test_a_rank_that_trains_alone_waits_for_nobody(results: Any) -> None:
    assert_close(results("alone")[0], in_one_process(double_batches(), gradient_accumulation_steps=2))


def test_one_small_collective_a_step_and_gradients_averaged_once(results: Any) -> None:
    """Besides one when the run starts and one when it ends. 24 windows, in batches of three."""
    for result in results("collectives"):
        assert result["counts"].tolist() == [[24 + 2, 24, 24], [8 + 2, 8, 8]]


def test_ranks_agree_on_the_horizon_of_their_different_data(results: Any) -> None:
    first, second = results("horizon")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["tbtt_step"] != 4  # adapted


def test_ranks_with_batches_of_different_lengths_measure_together(results: Any) -> None:
    """A batch of 10 steps may be measured at its end, one of 9 with a window of 9 has no other place."""
    first, second = results("horizon_lengths")
    assert torch.equal(first["phi"], second["phi"])


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("horizon_short", "the window of 10 steps is longer than the batch, which has 8"),
        ("horizon_no_loss", "none of the last 4 of the first 10 steps of the batch has a loss"),
    ],
)
def test_a_measurement_that_fails_on_one_rank_fails_on_all(results: Any, case: str, reason: str) -> None:
    """A rank that went on would wait for the other's share of the mean."""
    first, second = (result["error"] for result in results(case))
    assert second.startswith(f"ValueError: {reason}")
    assert f"the measurement of the gradient horizon was ended on rank 1 by ValueError: {reason}" in first
