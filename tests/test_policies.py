"""Each policy against what its paper promises: as arithmetic, and as gradients through the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt import (
    AnticipatedReweightedTruncation,
    FixedTruncation,
    FullBackpropagation,
    RandomTruncation,
    SlidingTruncation,
    Tbptt_Events,
    TruncationPolicy,
    create_supervised_tbptt_trainer,
)
from ignite_tbptt.truncation import plan_windows
from tests.helpers import Forecaster, batches, same, seeded, sgd, weights


def gradients_of(policy: TruncationPolicy, data: Any, iteration: int = 1, **kwargs: Any) -> list[list[Tensor]]:
    """Return the gradients of every optimizer step of a batch, with frozen parameters."""
    model = seeded(lambda: Forecaster(nn.LSTM)).double()
    trainer = create_supervised_tbptt_trainer(model, sgd(model, 0.0), F.mse_loss, policy, **kwargs)
    steps: list[list[Tensor]] = []
    trainer.add_event_handler(
        Tbptt_Events.BACKWARD_COMPLETED,
        lambda: steps.append([p.grad.clone() for p in model.parameters() if p.grad is not None]),
    )
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: setattr(trainer.state, "iteration", iteration))
    trainer.run([data], max_epochs=1, epoch_length=1)
    return steps


def doubles(steps: int) -> tuple[Tensor, Tensor]:
    x, y = batches(1, steps=steps)[0]
    return x.double(), y.double()


def full_gradient(data: tuple[Tensor, Tensor]) -> list[Tensor]:
    model = seeded(lambda: Forecaster(nn.LSTM)).double()
    F.mse_loss(model(data[0])[0], data[1]).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def relative_error(ours: list[Tensor], truth: list[Tensor]) -> float:
    difference = sum(float((a - b).square().sum()) for a, b in zip(ours, truth, strict=True))
    return math.sqrt(difference / sum(float(b.square().sum()) for b in truth))


# Sliding


class Scalar(nn.Module):
    """s <- w s, one step of time after the other."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        states = []
        for _ in x:
            s = self.w * s
            states.append(s)
        return torch.stack(states), s


@pytest.mark.parametrize(("k2", "expected"), [(1, 0.036), (2, 0.072), (3, 0.108)])
def test_sliding_gives_the_gradient_of_a_loss_through_k2_steps(k2: int, expected: float) -> None:
    """s3 = w^3 s0: each of the three uses of w adds w^2 s0 = 0.036 to the gradient of the loss s3."""
    model = Scalar(0.2)
    trainer = create_supervised_tbptt_trainer(
        model,
        sgd(model, 0.0),
        lambda y_pred, y: (y_pred * y).sum(),
        SlidingTruncation(1, k2),
        initial_hidden=lambda x: torch.tensor(0.9, dtype=torch.float64),
    )
    trainer.run([(torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))])
    assert model.w.grad is not None
    assert model.w.grad.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("k1", [1, 2, 3, 5])
def test_sliding_equals_chained_graphs_where_the_parameters_are_frozen(k1: int) -> None:
    """The loss of steps [s, s + k1) back to the state at s + k1 - k2, from a graph of the whole sequence."""
    k2, length = 5, 13
    x, y = doubles(length)
    steps = gradients_of(SlidingTruncation(k1, k2), (x, y))
    model = seeded(lambda: Forecaster(nn.LSTM)).double()
    states: list[Any] = [None]
    for time in range(length):
        states.append(tuple(part.detach() for part in model(x[time : time + 1], states[-1])[1]))
    for ours, start in zip(steps, range(0, length, k1), strict=True):
        model.zero_grad()
        begin = max(0, start - (k2 - k1))
        y_pred, _ = model(x[begin : start + k1], states[begin])
        F.mse_loss(y_pred[start - begin :], y[start : start + k1]).backward()
        for gradient, parameter in zip(ours, model.parameters(), strict=True):
            assert parameter.grad is not None
            assert torch.allclose(gradient, parameter.grad, rtol=1e-12, atol=1e-15)


def trained(policy: Any, **kwargs: Any) -> list[Tensor]:
    model = seeded(Forecaster)
    create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, policy, **kwargs).run(batches())
    return weights(model)


@pytest.mark.parametrize("accumulate", [1, 2, "sequence"])
def test_sliding_without_overlap_is_fixed_truncation_to_the_bit(accumulate: Any) -> None:
    expected = trained(FixedTruncation(4), gradient_accumulation_steps=accumulate)
    assert same(trained(SlidingTruncation(4, 4), gradient_accumulation_steps=accumulate), expected)


def test_sliding_says_that_k2_is_out_of_reach() -> None:
    with pytest.warns(UserWarning, match=r"sequence of 10 steps is too short .* k2=12 steps back are not reachable"):
        list(plan_windows(SlidingTruncation(2, 12), 10, 1))


# Random


def lengths(policy: TruncationPolicy, steps: int) -> list[int]:
    """Return the lengths of the windows but the last, which ends where the sequence does."""
    windows = list(plan_windows(policy, steps, iteration=1))
    return [window[-1].stop - window[0].start for window in windows[:-1]]


def assert_mean(values: list[int], expected: float) -> None:
    found = torch.tensor(values, dtype=torch.float64)
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / math.sqrt(len(values))


@pytest.mark.parametrize(("mean", "std", "halve", "minimum"), [(70, 5, 0.05, 5), (20, 8, 0.5, 7)])
def test_random_lengths_have_the_mean_of_the_papers_distribution(
    mean: int, std: float, halve: float, minimum: int
) -> None:
    def expected(base: float) -> float:
        """E[max(minimum, floor(N))] = minimum + sum over j > minimum of P(N >= j)."""
        return minimum + sum(
            0.5 * math.erfc((j - base) / (std * math.sqrt(2))) for j in range(minimum + 1, int(base + 12 * std))
        )

    policy = RandomTruncation(mean, std=std, halve_probability=halve, minimum=minimum)
    drawn = lengths(policy, 10_000 * mean)
    assert min(drawn) >= minimum
    assert_mean(drawn, (1 - halve) * expected(mean) + halve * expected(mean / 2))


def test_a_random_window_weighs_its_length_over_the_mean() -> None:
    """So that with one step a window the steps add up to the sum over the sequence, whatever the cuts."""
    policy, data = RandomTruncation(6, std=2, minimum=2), doubles(50)
    windows = list(plan_windows(policy, 50, 1))
    assert len({window[0].stop - window[0].start for window in windows}) > 2
    x, y = data
    model = seeded(lambda: Forecaster(nn.LSTM)).double()
    hidden: Any = None
    for (segment,), ours in zip(windows, gradients_of(policy, data), strict=True):
        model.zero_grad()
        y_pred, hidden = model(x[segment.start : segment.stop], hidden)
        hidden = tuple(part.detach() for part in hidden)
        ((y_pred - y[segment.start : segment.stop]).square().mean((1, 2)).sum() / 6).backward()
        assert relative_error(ours, [p.grad for p in model.parameters() if p.grad is not None]) < 1e-13


# Anticipated reweighting


@pytest.mark.parametrize(("alpha", "mean"), [(4, 8), (6, 16), (6, 50)])
@pytest.mark.parametrize("steps", [1, 3])
def test_reweighted_windows_have_the_mean_length_that_was_asked_for(alpha: float, mean: int, steps: int) -> None:
    # The last window of each sequence is left out, which favours short ones: so one long sequence.
    drawn = lengths(AnticipatedReweightedTruncation(steps, alpha, mean), 4_000 * mean)
    assert_mean(drawn, mean)


def pattern(windows: list[Any]) -> tuple[bool, ...]:
    cuts = {window[0].start for window in windows}
    return tuple(boundary in cuts for boundary in range(4, 20, 4))


def probability(cuts: tuple[bool, ...], alpha: float, mean: float) -> float:
    """Tallec and Ollivier's c = alpha / ((alpha - 1) L0 + d), with time counted in segments of four steps."""
    total, since = 1.0, 1
    for cut in cuts:
        c = alpha / ((alpha - 1) * mean / 4 + since)
        total *= c if cut else 1 - c
        since = 1 if cut else since + 1
    return total


@pytest.fixture(scope="module")
def all_cut_patterns() -> dict[tuple[bool, ...], int]:
    """Return for each of the 16 patterns of cuts an iteration in which the policy makes it."""
    found: dict[tuple[bool, ...], int] = {}
    for iteration in range(1, 5000):
        found.setdefault(
            pattern(list(plan_windows(AnticipatedReweightedTruncation(4, 4, 8), 20, iteration))), iteration
        )
        if len(found) == 16:
            return found
    raise AssertionError(f"only {len(found)} of 16 patterns of cuts came up")


def test_reweighted_truncation_is_unbiased_over_all_cut_patterns(all_cut_patterns: Any) -> None:
    data = doubles(20)
    truth = full_gradient(data)
    policy = AnticipatedReweightedTruncation(4, alpha=4, mean=8)
    expected = [torch.zeros_like(gradient) for gradient in truth]
    total = 0.0
    for cuts, iteration in all_cut_patterns.items():
        (gradient,) = gradients_of(policy, data, iteration, gradient_accumulation_steps="sequence")
        chance = probability(cuts, alpha=4, mean=8)
        expected = [mean + chance * part for mean, part in zip(expected, gradient, strict=True)]
        total += chance
    assert total == pytest.approx(1, rel=1e-14)
    assert relative_error(expected, truth) < 1e-12
    (chunks,) = gradients_of(FixedTruncation(4), data, gradient_accumulation_steps="sequence")
    assert relative_error(chunks, truth) > 1e-2  # there is something to be unbiased about


def test_steps_inside_the_sequence_add_up_to_the_same_gradient(all_cut_patterns: Any) -> None:
    """Each window is divided by the constant `mean`: with frozen parameters the sum over windows is unbiased too."""
    data = doubles(20)
    truth = full_gradient(data)
    policy = AnticipatedReweightedTruncation(4, alpha=4, mean=8)
    expected = [torch.zeros_like(gradient) for gradient in truth]
    for cuts, iteration in all_cut_patterns.items():
        chance = probability(cuts, alpha=4, mean=8)
        for window in gradients_of(policy, data, iteration):
            expected = [mean + chance * 8 / 20 * part for mean, part in zip(expected, window, strict=True)]
    assert relative_error(expected, truth) < 1e-12


def test_cuts_come_with_the_probability_that_the_gradient_is_reweighted_for() -> None:
    policy, trials = AnticipatedReweightedTruncation(4, alpha=4, mean=8), 4000
    seen: dict[tuple[bool, ...], int] = {}
    for iteration in range(trials):
        cuts = pattern(list(plan_windows(policy, 20, iteration)))
        seen[cuts] = seen.get(cuts, 0) + 1
    for cuts, count in seen.items():
        chance = probability(cuts, alpha=4, mean=8)
        assert abs(count / trials - chance) < 4 * math.sqrt(chance * (1 - chance) / trials)


def test_a_loss_over_valid_steps_is_warned_about_where_each_window_is_divided_by_its_own() -> None:
    model = Forecaster()
    policy = AnticipatedReweightedTruncation(4, 4, 8)

    def make(**kwargs: Any) -> None:
        create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, policy, **kwargs)

    with pytest.warns(UserWarning, match="biased again. gradient_accumulation_steps='sequence' divides"):
        make(loss_weight=lambda x, y: len(y))
    make(loss_weight=lambda x, y: len(y), gradient_accumulation_steps="sequence")
    make()


# Influence balancing: the short-term effect of theta on the loss has the wrong sign.


class InfluenceBalancing(nn.Module):
    """s <- A s + theta v with A = I/2 + superdiagonal/2, v = +1 ten times, then -1; the best theta is -1/6."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        half = torch.full((22,), 0.5, dtype=torch.float64)
        self.transition = torch.eye(23, dtype=torch.float64) / 2 + torch.diag(half, 1)
        self.push = torch.tensor([1.0] * 10 + [-1.0] * 13, dtype=torch.float64)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = torch.ones(23, dtype=torch.float64) if state is None else state
        drive, first = self.theta * self.push, []
        for _ in x:
            state = torch.addmv(drive, self.transition, state)
            first.append(state[0])
        return torch.stack(first), state


def balanced(policy: TruncationPolicy, rate: float, steps: int, **kwargs: Any) -> float:
    model = InfluenceBalancing()
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model, rate), lambda y_pred, y: (y_pred - y).square().mean() / 2, policy, stateful=True, **kwargs
    )

    @trainer.on(Tbptt_Events.OPTIMIZER_STEP_COMPLETED)
    def stop() -> None:
        if abs(model.theta.item()) > 1e6:
            trainer.terminate()

    trainer.run([(torch.zeros(steps, dtype=torch.float64), torch.ones(steps, dtype=torch.float64))])
    return model.theta.item()


@pytest.mark.parametrize("steps", [10, 50])
def test_short_chunks_push_the_parameter_the_wrong_way(steps: int) -> None:
    assert balanced(FixedTruncation(steps), 1e-2, 12_000) > 1e6


def test_chunks_beyond_the_delay_find_the_parameter() -> None:
    assert balanced(FixedTruncation(150), 1e-2, 20_000) == pytest.approx(-1 / 6, abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_reweighted_windows_shorter_than_the_delay_find_the_parameter(seed: int) -> None:
    policy = AnticipatedReweightedTruncation(1, alpha=6, mean=16, seed=seed)
    assert balanced(policy, 16 * 3e-5, 5_000) == pytest.approx(-1 / 6, abs=1e-2)


# None


@pytest.mark.parametrize("accumulate", [1, "sequence"])
@pytest.mark.parametrize("steps", [1, 4, 7, 100])
def test_full_back_propagation_is_the_exact_gradient(steps: int, accumulate: Any) -> None:
    data = doubles(20)
    (gradient,) = gradients_of(FullBackpropagation(steps), data, gradient_accumulation_steps=accumulate)
    assert relative_error(gradient, full_gradient(data)) < 1e-12


def test_segments_of_a_window_follow_one_another_and_weigh_their_share() -> None:
    ((*segments,),) = plan_windows(FullBackpropagation(4), 10, 1)
    assert all(before.stop == after.start for before, after in pairwise(segments))
    assert [segment.loss_weight for segment in segments] == [0.4, 0.4, 0.2]


# Bad input

REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: SlidingTruncation(3, 2), r"k1 must not be above k2, got k1=3 and k2=2.*FixedTruncation\(3\)"),
    (lambda: SlidingTruncation(0, 2), "k1 must be at least 1, got 0"),
    (lambda: SlidingTruncation(1, -2), "k2 must be at least 1, got -2"),
    (lambda: RandomTruncation(4), r"mean must be at least minimum, got mean=4 and minimum=5"),
    (lambda: RandomTruncation(9, minimum=0), "minimum must be at least 1, got 0"),
    (lambda: RandomTruncation(9, std=-1), "std must not be negative, got -1"),
    (lambda: RandomTruncation(9, halve_probability=1), r"halve_probability must lie in \[0, 1\), got 1"),
    (lambda: RandomTruncation(9, halve_probability=-0.1), r"halve_probability must lie in \[0, 1\), got -0.1"),
    (lambda: RandomTruncation(math.inf), "mean must be finite, got inf"),
    (lambda: AnticipatedReweightedTruncation(0, 4, 8), "steps must be at least 1, got 0"),
    (lambda: AnticipatedReweightedTruncation(1, 1.0, 8), "alpha must be above 1, got 1.0"),
    (lambda: AnticipatedReweightedTruncation(4, 4, 4), "mean must be above steps, got mean=4 and steps=4"),
    (lambda: AnticipatedReweightedTruncation(4, math.nan, 4), "alpha must be finite, got nan"),
    (lambda: FullBackpropagation(0), "steps must be at least 1, got 0"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_arguments_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingTruncation(1.0, 2), "k1 must be a whole number of time steps, got 1.0"),  # type: ignore[arg-type]
        (lambda: RandomTruncation("70"), "mean must be a number, got '70' of type str"),  # type: ignore[arg-type]
        (lambda: AnticipatedReweightedTruncation(1, None, 8), "alpha must be a number, got None"),  # type: ignore[arg-type]
        (lambda: RandomTruncation(70, seed=0.5), "seed must be an int, got 0.5"),  # type: ignore[arg-type]
        (lambda: AnticipatedReweightedTruncation(1, 4, 8, seed=2.0), "seed must be an int, got 2.0"),  # type: ignore[arg-type]
        (lambda: FullBackpropagation(True), "steps must be a whole number of time steps, got True"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()
