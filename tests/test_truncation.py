from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ignite_tbptt import FixedTruncation, Segment, TruncationPolicy, Window
from ignite_tbptt.policies import as_policy, check_tbtt_step
from ignite_tbptt.truncation import plan_windows
from tests.helpers import POLICIES


@pytest.mark.filterwarnings("ignore:a sequence of .* too short")
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@given(length=st.integers(1, 60), iteration=st.integers(0, 10**9))
def test_segments_with_a_loss_partition_the_sequence(policy: TruncationPolicy, length: int, iteration: int) -> None:
    plan = plan_windows(policy, length, iteration)
    windows = list(plan)
    assert len(plan) == len(windows)
    with_loss = [step for window in windows for s in window if s.loss_weight for step in range(s.start, s.stop)]
    assert with_loss == list(range(length))
    for window in windows:
        assert all(before.stop == after.start for before, after in pairwise(window))
    # A window starts from a state that the trainer has: the first one, or one where an earlier segment ended.
    reached = {0}
    for window in windows:
        assert window[0].start in reached
        reached |= {segment.stop for segment in window}


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_windows_are_the_same_for_the_same_iteration(policy: TruncationPolicy) -> None:
    torch.manual_seed(0)
    first = list(plan_windows(policy, 50, 7))
    torch.manual_seed(1)
    assert list(plan_windows(policy, 50, 7)) == first


@dataclass(frozen=True)
class Coins:
    seed: int = 0

    def windows(self, length: int, generator: torch.Generator) -> Iterator[Window]:
        start = 0
        while start < length:
            stop = min(length, start + int(torch.randint(1, 5, (), generator=generator)))
            yield (Segment(start, stop),)
            start = stop


def test_random_windows_depend_on_seed_and_iteration_alone() -> None:
    state = torch.get_rng_state()
    plans = {
        (seed, iteration): list(plan_windows(Coins(seed), 200, iteration)) for seed in (0, 1) for iteration in (1, 2, 3)
    }
    assert torch.equal(torch.get_rng_state(), state)
    assert all(list(plan_windows(Coins(seed), 200, iteration)) == plan for (seed, iteration), plan in plans.items())
    assert len({str(plan) for plan in plans.values()}) == len(plans)


@dataclass(frozen=True)
class Given:
    spans: tuple[tuple[int, int], ...]

    def windows(self, length: int, generator: torch.Generator) -> Iterator[Window]:
        return iter([(Segment(*span),) for span in self.spans])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (((0, 4), (4, 8)), "covered 8 of 10 time steps"),
        (((0, 4), (5, 10)), r"after step 4 of 10 comes the segment \[5, 10\)"),
        (((0, 4), (3, 10)), r"after step 4 of 10 comes the segment \[3, 10\)"),
        (((0, 4), (4, 12)), r"segment \[4, 12\) in a sequence of 10"),
        ((), "covered 0 of 10"),
    ],
)
def test_a_policy_that_drops_or_repeats_steps_is_refused(spans: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_windows(Given(spans), 10, 1)


@pytest.mark.parametrize("steps", [0, -3])
def test_fixed_truncation_refuses_lengths_below_one(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        FixedTruncation(steps)


@pytest.mark.parametrize("steps", [True, 2.0, "4", None])
def test_fixed_truncation_refuses_what_is_no_int(steps: Any) -> None:
    with pytest.raises(TypeError, match="steps must be a whole number"):
        FixedTruncation(steps)


def test_a_scheduled_number_of_steps_is_rounded() -> None:
    assert as_policy(12.6) == FixedTruncation(13)
    assert as_policy(4) == FixedTruncation(4)
    assert as_policy(FixedTruncation(3)) == FixedTruncation(3)


@pytest.mark.parametrize("value", [0, 0.4, -1, float("nan"), float("inf")])
def test_a_scheduled_number_of_steps_below_one_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"engine\.state\.tbtt_step must be at least 1"):
        as_policy(value)


@pytest.mark.parametrize("value", [None, True, "4"])
def test_a_scheduled_value_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"engine\.state\.tbtt_step must be a number .* policy"):
        as_policy(value)


def test_a_policy_class_is_no_policy() -> None:
    with pytest.raises(TypeError, match="tbtt_step must be an int"):
        check_tbtt_step(FixedTruncation)
