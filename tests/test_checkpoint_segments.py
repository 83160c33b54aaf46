"""Recomputing segments changes memory and time, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from ignite_tbptt import (
    AnticipatedReweightedTruncation,
    FullBackpropagation,
    TruncationPolicy,
    create_supervised_tbptt_trainer,
)
from ignite_tbptt.truncation import plan_windows
from tests.helpers import POLICIES, RecordState, batches, same, seeded, sgd, weights


class Everything(nn.Module):
    """Dropout, batch normalisation, power iteration: random numbers, and buffers that change and that matter."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 5, num_layers=2, dropout=0.4)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 2))
        self.calls = itertools.count()  # an iterator is not put back after a second run

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        next(self.calls)
        y, hidden = self.rnn(x, hidden)
        y = self.norm(F.dropout(y, 0.3).flatten(0, 1)).view_as(y)
        return self.head(y), hidden


def run(policy: Any, checkpoint: bool, lr: float = 0.1, count: int = 2) -> Any:
    model = seeded(Everything).double()
    data = [tuple(part.double() for part in batch) for batch in batches(count, steps=12)]
    torch.manual_seed(1)
    trainer = create_supervised_tbptt_trainer(model, sgd(model, lr), F.mse_loss, policy, checkpoint_segments=checkpoint)
    trainer.run(data)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def buffers(model: nn.Module) -> list[Tensor]:
    return list(model.buffers())


@pytest.mark.filterwarnings("ignore:a sequence of .* too short")
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_recomputed_segments_train_to_the_same_weights(policy: TruncationPolicy) -> None:
    plain, checkpointed = run(policy, False), run(policy, True)
    # A weight that is used at every step has its gradient summed over a segment first, then over segments.
    for ours, truth in zip(weights(checkpointed) + buffers(checkpointed), weights(plain) + buffers(plain), strict=True):
        assert torch.allclose(ours, truth, rtol=1e-12, atol=1e-14)
    # Every segment but those whose state nothing asks back for has been run twice.
    calls = [next(model.calls) for model in (plain, checkpointed)]
    assert calls[0] < calls[1] <= 2 * calls[0]


def test_the_next_random_numbers_are_the_same() -> None:
    run(FullBackpropagation(3), False)
    expected = torch.rand(4)
    run(FullBackpropagation(3), True)
    assert torch.equal(torch.rand(4), expected)


def test_the_gradient_is_exact_with_dropout() -> None:
    """The truth is one plain graph over the segments, written by hand."""
    model = seeded(Everything).double()
    x, y = (part.double() for part in batches(1, steps=12)[0])
    torch.manual_seed(1)
    hidden, losses = None, []
    for x_t, y_t in zip(x.split(3), y.split(3), strict=True):
        y_pred, hidden = model(x_t, hidden)
        losses.append(F.mse_loss(y_pred, y_t))
    (sum(losses) / 4).backward()  # type: ignore[union-attr]
    ours = run(FullBackpropagation(3), True, lr=0.0, count=1)
    for gradient, truth in zip(gradients(ours), gradients(model), strict=True):
        assert torch.allclose(gradient, truth, rtol=1e-12, atol=1e-15)
    assert same(buffers(ours), buffers(model))


def test_buffers_are_updated_once_a_segment() -> None:
    model: Any = run(FullBackpropagation(3), True, count=2)
    assert model.norm.num_batches_tracked.item() == 8


def test_any_form_of_state_is_recomputed_from() -> None:
    class Recorded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(3, 2)

        def forward(self, x: Tensor, state: RecordState | None = None) -> tuple[Tensor, RecordState]:
            y, h = self.cell(x, None if state is None else state.h)
            return y, RecordState(h, 0 if state is None else state.steps + len(x))

    def trained(checkpoint: bool) -> list[Tensor]:
        model = seeded(Recorded)
        trainer = create_supervised_tbptt_trainer(
            model, sgd(model), F.mse_loss, FullBackpropagation(3), checkpoint_segments=checkpoint
        )
        trainer.run(batches())
        return weights(model)

    assert same(trained(True), trained(False))


def peak_bytes(run: Callable[[], Any]) -> int:
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def peak_of_training(policy: TruncationPolicy, steps: int, checkpoint: bool) -> int:
    model = seeded(lambda: nn.LSTM(3, 32))
    data = [(torch.randn(steps, 4, 3), torch.randn(steps, 4, 32))]
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, policy, checkpoint_segments=checkpoint)
    return peak_bytes(lambda: trainer.run(data, max_epochs=1))


def test_a_long_run_without_a_cut_takes_the_memory_of_one_segment_and_the_states_between() -> None:
    policy = AnticipatedReweightedTruncation(steps=50, alpha=6, mean=1e9)
    assert len(plan_windows(policy, 2000, 1)) == 1
    short, long = (peak_of_training(policy, steps, checkpoint=True) for steps in (500, 2000))
    # 30 segments more. For each: the state that it starts from (two of 4 x 32 floats) and the one it was given out as,
    # the random state, its loss and the copy of it, each rounded up to 64 bytes by the allocator.
    state, scalar, random_state = 2 * 4 * 32 * 4, 64, torch.get_rng_state().nbytes
    assert long - short <= 30 * (2 * state + 4 * scalar + random_state)
    plain = peak_of_training(policy, 2000, checkpoint=False)
    assert plain > 2000 * 4 * 32 * 4 * 4  # without: for every step at least the four gates
    assert long < plain / 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dropout_on_the_gpu_is_replayed() -> None:
    def trained(checkpoint: bool) -> list[Tensor]:
        model = seeded(Everything).cuda()
        torch.manual_seed(1)
        trainer = create_supervised_tbptt_trainer(
            model, sgd(model, 0.0), F.mse_loss, FullBackpropagation(3), device="cuda", checkpoint_segments=checkpoint
        )
        trainer.run(batches(1, steps=12))
        return gradients(model)

    for ours, truth in zip(trained(True), trained(False), strict=True):
        assert torch.allclose(ours, truth, rtol=1e-4, atol=1e-6)
