"""Two gloo ranks under idist.Parallel: DDP, shares of a stream, and ranks that disagree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ignite_tbptt import ContiguousStreams, FullBackpropagation, create_supervised_tbptt_trainer
from tests.helpers import Forecaster, batches, seeded, sgd

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")


def launch(case: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.two_ranks", case, str(folder)]
    # ranks that hang do so until gloo gives up after half an hour; a start may take minutes on a busy machine
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)


def stream(steps: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(steps, 3, generator=generator), torch.randn(steps, 2, generator=generator)


def single_process(data: Any, rows: int, **kwargs: Any) -> dict[str, torch.Tensor]:
    model = seeded(Forecaster).double()
    trainer = create_supervised_tbptt_trainer(model, sgd(model), kwargs.pop("loss_fn", F.mse_loss), 4, **kwargs)
    trainer.run(ContiguousStreams(data, rows=rows, steps=7), max_epochs=2)
    return model.state_dict()


def test_two_ranks_with_half_the_rows_are_one_with_all(tmp_path: Path) -> None:
    result = launch("rows", tmp_path)
    assert result.returncode == 0, result.stderr
    expected = single_process(tuple(part.double() for part in stream()), rows=4, stateful=True)
    for rank in range(2):
        ours = torch.load(tmp_path / f"rows_{rank}.pt", weights_only=True)
        for name, value in expected.items():
            # The mean over rows is taken in another order: a few ulp at each of 48 steps.
            assert torch.allclose(ours[name], value, rtol=1e-12, atol=1e-13)


def test_padding_on_one_rank_alone_is_the_mean_over_all_that_counts(tmp_path: Path) -> None:
    """Rank 1 has whole windows without a target; in sequence mode both together make the masked mean."""
    from tests.two_ranks import masked_mse, padded_stream

    result = launch("padding", tmp_path)
    assert result.returncode == 0, result.stderr
    expected = single_process(
        padded_stream(),
        rows=4,
        stateful=True,
        loss_fn=masked_mse,
        gradient_accumulation_steps="sequence",
        loss_weight=lambda x, y: (~y.isnan()).sum(),
    )
    for rank in range(2):
        ours = torch.load(tmp_path / f"padding_{rank}.pt", weights_only=True)
        for name, value in expected.items():
            assert torch.allclose(ours[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", ["recomputed", "recomputed_unused"])
def test_segments_are_recomputed_under_ddp(case: str, tmp_path: Path) -> None:
    """Both ranks have the same batches, so together they are one process without recomputation.

    Looking for unused parameters puts an operation of its own into the graph, which is left to torch.utils.checkpoint.
    """
    result = launch(case, tmp_path)
    assert result.returncode == 0, result.stderr
    model = seeded(Forecaster).double()
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, FullBackpropagation(4))
    trainer.run([tuple(part.double() for part in batch) for batch in batches(3, steps=10)], max_epochs=2)
    for rank in range(2):
        ours = torch.load(tmp_path / f"{case}_{rank}.pt", weights_only=True)
        for name, value in model.state_dict().items():
            assert torch.allclose(ours[name], value, rtol=1e-12, atol=1e-13)


def test_ranks_agree_on_the_horizon_of_their_different_data(tmp_path: Path) -> None:
    result = launch("horizon", tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"horizon_{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["tbtt_step"] != 4  # adapted


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("windows", "different numbers of time iterations in iteration 1: 3 on rank 0, 2 on rank 1"),
        ("refused", "different numbers of time iterations in iteration 1: -1 on rank 0, 3 on rank 1"),
        ("batches", "different numbers of batches in an epoch: 3 on rank 0, 2 on rank 1"),
    ],
)
def test_ranks_that_disagree_raise_everywhere(case: str, message: str, tmp_path: Path) -> None:
    result = launch(case, tmp_path)
    assert result.returncode == 0, result.stderr
    raised = [(tmp_path / f"{case}_{rank}.txt").read_text() for rank in range(2)]
    assert message in raised[1]
    assert message in raised[0] or (case == "refused" and "empty sequence" in raised[0])


def test_ranks_with_batches_of_different_lengths_measure_together(tmp_path: Path) -> None:
    """A batch of 10 steps may be measured at its end, one of 9 with a window of 9 has no other place."""
    result = launch("horizon_lengths", tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"horizon_lengths_{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["phi"], second["phi"])


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("horizon_short", "the window of 10 steps is longer than the batch, which has 8"),
        ("horizon_no_loss", "none of the last 4 of the first 10 steps of the batch has a loss"),
    ],
)
def test_a_measurement_that_fails_on_one_rank_fails_on_all(case: str, reason: str, tmp_path: Path) -> None:
    """A rank that went on would wait for the other's share of the mean until gloo's half hour is over."""
    result = launch(case, tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = ((tmp_path / f"{case}_{rank}.txt").read_text() for rank in range(2))
    assert second.startswith(reason)
    assert f"the measurement of the gradient horizon was ended on rank 1 by ValueError: {reason}" in first


def test_a_nan_on_one_rank_is_stepped_on_by_none(tmp_path: Path) -> None:
    result = launch("nan", tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"nan_{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in first.items():
        assert value.isfinite().all()
        assert torch.equal(value, second[name])
