"""Segments, windows and the plan of a sequence: which time steps share one graph and one backward.

A policy decides and the trainer executes. The policy turns the length of a sequence into windows, each a tuple of
segments; a `Plan` counts and checks them before anything is trained, and lays them out again, one by one, when they are
run. No plan is held in memory, so a sequence may have any number of windows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch


class Segment(NamedTuple):
    """A run of time steps that the model gets in one call.

    Attributes:
        start: first time step.
        stop: time step behind the last.
        carry_scale: factor on the gradient that crosses into this segment from the next earlier one of its window.
        loss_weight: factor on the segment's mean loss in what its window is trained on, the sum over its segments; 0
            for steps that only bring the state forward. Weights are not normalised: a window of several segments is
            trained on the mean over its steps if each weighs its share of them.
    """

    start: int
    stop: int
    carry_scale: float = 1.0
    loss_weight: float = 1.0


Window = tuple[Segment, ...]
"""Segments that share one graph and one backward; the hidden state is detached where a window starts."""


@runtime_checkable
class TruncationPolicy(Protocol):
    """Lays out the windows of a sequence.

    A policy is best a frozen dataclass: its ``repr`` says in a checkpoint which one was used. A random policy may have
    an integer attribute ``seed`` and draws from `generator` alone; one that is unbiased only where losses are added up
    says so by an attribute ``sums_losses = True``. A policy whose windows can be counted without laying them out may
    have a method ``outline(length) -> Outline``; the others are laid out once more to be counted.
    """

    def windows(self, length: int, generator: torch.Generator) -> Iterator[Window]:
        """Yield the windows of a sequence of `length` time steps, in order.

        The segments with a loss weight other than 0 follow one another and cover ``[0, length)``. A window starts at
        step 0 or where an earlier segment ended, and not before the window ahead of it started.

        Args:
            length: number of time steps, at least 1.
            generator: source of randomness, seeded from the policy's seed and the engine's iteration: the same on
                every rank, after every resume and each time that the windows are laid out.
        """
        ...


class Outline(NamedTuple):
    """What has to be known of the windows of a sequence before the first one is run.

    Attributes:
        windows: number of windows.
        overlap: some window starts before the end of an earlier one, so states have to be kept to start it from.
    """

    windows: int
    overlap: bool


def require_steps(name: str, value: Any) -> None:
    """Refuse what is no number of time steps, as the argument `name` of a policy.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number of time steps, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}: a window has to hold a time step.")


@dataclass(frozen=True)
class Plan:
    """The windows of one sequence, counted and laid out on demand; see `plan_windows`."""

    policy: TruncationPolicy
    length: int
    seed: int
    outline: Outline

    def __len__(self) -> int:
        return self.outline.windows

    def __iter__(self) -> Iterator[Window]:
        """Lay the windows out, and check them on the way.

        Raises:
            ValueError: the policy leaves out or repeats time steps, or differs from what was counted.
        """
        count = 0
        windows = _checked_windows(self.policy, self.length, self.seed)
        while block := list(islice(windows, 64)):
            count += len(block)
            if count > len(self) or any(overlap for overlap, _ in block) > self.outline.overlap:
                break
            yield from [window for _, window in block]
        if count != len(self):
            raise ValueError(
                f"{self.policy!r} laid out other windows for a sequence of {self.length} steps than it did, or its "
                f"outline() said, before: {count} or more in place of {len(self)}, or windows that overlap. It may "
                "draw from the generator that it is given and from nothing else."
            )


def plan_windows(policy: TruncationPolicy, length: int, iteration: int) -> Plan:
    """Return the plan that `policy` has for `length` steps in the given iteration of the engine.

    Raises:
        ValueError: the windows leave out or repeat time steps: a policy may not drop data silently.
    """
    seed = (int(getattr(policy, "seed", 0)) * 0x9E3779B97F4A7C15 + iteration) % 2**63
    counted = getattr(policy, "outline", None)
    if counted is not None:
        return Plan(policy, length, seed, counted(length))
    count, overlaps = 0, False
    for overlap, _ in _checked_windows(policy, length, seed):
        count += 1
        overlaps |= overlap
    return Plan(policy, length, seed, Outline(count, overlaps))


def _checked_windows(policy: TruncationPolicy, length: int, seed: int) -> Iterator[tuple[bool, Window]]:
    """Yield the windows of a policy, each with whether it starts before the end of an earlier one."""
    with_loss = reached = 0
    ends = deque([0])  # where segments ended, from the start of the last window on
    for window in policy.windows(length, torch.Generator().manual_seed(seed)):
        if not window:
            raise ValueError(f"{policy!r} laid out a window without segments.")
        first = position = window[0].start
        overlap = first < reached
        while ends and ends[0] < first:
            ends.popleft()
        has_state = bool(ends) and ends[0] == first
        for start, stop, _, loss_weight in window:
            if not 0 <= start < stop <= length:
                raise ValueError(f"{policy!r} laid out the segment [{start}, {stop}) in a sequence of {length} steps.")
            if loss_weight:
                if start != with_loss:
                    raise ValueError(
                        f"{policy!r} must cover every time step once with a loss: after step {with_loss} of {length} "
                        f"comes the segment [{start}, {stop})."
                    )
                with_loss = stop
            if start != position:
                raise ValueError(
                    f"{policy!r} laid out a window whose segments do not follow one another: the segment [{start}, "
                    f"{stop}) comes after step {position}."
                )
            position = stop
            if stop > reached:
                reached = stop
                ends.append(stop)
        if not has_state:
            raise ValueError(
                f"{policy!r} laid out a window that starts at step {first}, where no earlier segment ended since the "
                "last window's start: there is no hidden state to start from."
            )
        yield overlap, window
    if with_loss != length:
        raise ValueError(
            f"{policy!r} covered {with_loss} of {length} time steps with a loss: the rest would be dropped."
        )
