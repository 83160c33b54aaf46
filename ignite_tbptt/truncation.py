"""Which time steps share one gradient: segments, windows and the policies that lay them out.

A policy decides and the trainer executes: it turns the length of a sequence into windows, each a tuple of segments
that share one graph and one backward. No torch model is involved, so a policy is tested as arithmetic. Every policy
pairs with the trainer and the evaluator, and none of them knows which one it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    says so by an attribute ``sums_losses = True``.
    """

    def windows(self, length: int, generator: torch.Generator) -> Iterator[Window]:
        """Yield the windows of a sequence of `length` time steps, in order.

        The segments with a loss weight other than 0 follow one another and cover ``[0, length)``.

        Args:
            length: number of time steps, at least 1.
            generator: source of randomness, seeded from the policy's seed and the engine's iteration: the same on
                every rank and after every resume.
        """
        ...


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


def plan_windows(policy: TruncationPolicy, length: int, iteration: int) -> list[Window]:
    """Return the windows that `policy` lays over `length` steps in the given iteration of the engine.

    Raises:
        ValueError: the windows leave out or repeat time steps: a policy may not drop data silently.
    """
    seed = int(getattr(policy, "seed", 0))
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + iteration) % 2**63)
    windows = list(policy.windows(length, generator))
    _check_cover(policy, windows, length)
    return windows


def loss_coefficients(window: Window, counts: Sequence[float]) -> list[float]:
    """Return the factors that make one loss of a window out of the mean losses of its segments.

    A factor is the segment's loss weight times how densely its steps count: `counts` over steps, relative to the
    window as a whole. Where every step counts alike the factors are the loss weights themselves.

    Args:
        window: the segments.
        counts: for each segment, how many steps its loss is a mean over, in any unit; 0 where it has no loss.
    """
    if len(window) == 1:
        return [window[0].loss_weight]
    steps = [segment.stop - segment.start if segment.loss_weight else 0 for segment in window]
    if list(counts) == steps:
        return [segment.loss_weight for segment in window]
    density = sum(counts) / sum(steps)
    return [
        segment.loss_weight * count / (size * density) if size else 0.0
        for segment, count, size in zip(window, counts, steps, strict=True)
    ]


def _check_cover(policy: TruncationPolicy, windows: Iterable[Window], length: int) -> None:
    reached, states = 0, {0}
    for window in windows:
        if not window:
            raise ValueError(f"{policy!r} laid out a window without segments.")
        has_state = window[0].start in states
        for start, stop, _, loss_weight in window:
            states.add(stop)
            if not 0 <= start < stop <= length:
                raise ValueError(f"{policy!r} laid out the segment [{start}, {stop}) in a sequence of {length} steps.")
            if loss_weight:
                if start != reached:
                    raise ValueError(
                        f"{policy!r} must cover every time step once with a loss: after step {reached} of {length} "
                        f"comes the segment [{start}, {stop})."
                    )
                reached = stop
        if not has_state:
            raise ValueError(
                f"{policy!r} laid out a window that starts at step {window[0].start}, where no earlier segment ended: "
                "there is no hidden state to start from."
            )
    if reached != length:
        raise ValueError(f"{policy!r} covered {reached} of {length} time steps with a loss: the rest would be dropped.")
