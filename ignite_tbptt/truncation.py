"""Which time steps share one gradient: segments, windows and the policies that lay them out.

A policy decides and the trainer executes: it turns the length of a sequence into windows, each a tuple of segments
that share one graph and one backward. No torch model is involved, so a policy is tested as arithmetic. Every policy
pairs with the trainer and the evaluator, and none of them knows which one it runs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
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


@dataclass(frozen=True)
class FixedTruncation:
    """Windows of `steps` time steps each, the last one shorter where the length asks for it.

    This is truncated back-propagation as Ignite and most hand-written loops have it, TBPTT(k, k): the cost is one
    step of the model for one step of the sequence.

    Example:
        >>> import torch
        >>> [window[0][:2] for window in FixedTruncation(4).windows(10, torch.Generator())]
        [(0, 4), (4, 8), (8, 10)]

    Args:
        steps: time steps of a window.

    Raises:
        TypeError: `steps` is not an integer.
        ValueError: `steps` is below 1.
    """

    steps: int

    def __post_init__(self) -> None:
        require_steps("steps", self.steps)

    def windows(self, length: int, generator: torch.Generator) -> Iterator[Window]:
        """Yield [0, steps), [steps, 2 steps), ... up to `length`; see `TruncationPolicy.windows`."""
        for start in range(0, length, self.steps):
            yield (Segment(start, min(start + self.steps, length)),)


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


def check_tbtt_step(tbtt_step: Any) -> None:
    """Refuse what is neither a positive int nor a policy, as an argument of the trainer.

    Raises:
        TypeError: `tbtt_step` is a bool, a float or anything else that is no int and no policy.
        ValueError: `tbtt_step` is below 1.
    """
    if not isinstance(tbtt_step, TruncationPolicy) or isinstance(tbtt_step, type):
        check_steps(tbtt_step, "an int, the time steps of a chunk, or a truncation policy")


def check_steps(tbtt_step: Any, form: str = "an int, the time steps of a chunk") -> None:
    """Refuse what is no positive int.

    Raises:
        TypeError: `tbtt_step` is a bool, a float or anything else that is no int.
        ValueError: `tbtt_step` is below 1.
    """
    if isinstance(tbtt_step, bool) or not isinstance(tbtt_step, Integral):
        raise TypeError(f"tbtt_step must be {form}, got {tbtt_step!r} of type {type(tbtt_step).__name__}.")
    if tbtt_step < 1:
        raise ValueError(f"tbtt_step must be at least 1, got {tbtt_step}: a chunk has to hold a time step.")


def as_policy(tbtt_step: Any) -> TruncationPolicy:
    """Return the policy that `engine.state.tbtt_step` stands for at the start of a batch.

    Args:
        tbtt_step: a policy, or a number of time steps. Ignite's parameter schedulers interpolate in floats, so a
            number is rounded to the nearest int here.

    Raises:
        TypeError: `tbtt_step` is neither.
        ValueError: `tbtt_step` is not finite, or rounds to less than 1.
    """
    if isinstance(tbtt_step, TruncationPolicy):
        return tbtt_step
    if isinstance(tbtt_step, bool) or not isinstance(tbtt_step, Real):
        raise TypeError(
            f"engine.state.tbtt_step must be a number of time steps or a truncation policy, got {tbtt_step!r}."
        )
    if not math.isfinite(tbtt_step) or round(float(tbtt_step)) < 1:
        raise ValueError(f"engine.state.tbtt_step must be at least 1, got {tbtt_step}: check what schedules it.")
    return FixedTruncation(round(float(tbtt_step)))


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


def warn_if_normalised(policy: Any, gradient_accumulation_steps: Any, loss_weight: Any) -> None:
    """Warn where a policy that needs losses added up would have them divided by what counts in each window."""
    if getattr(policy, "sums_losses", False) and loss_weight is not None and gradient_accumulation_steps != "sequence":
        warnings.warn(
            f"loss_weight with tbtt_step={policy!r} and gradient_accumulation_steps={gradient_accumulation_steps!r}: "
            "the loss of a window is divided by the steps that count in it, and these depend on where the cuts fall, "
            "so the gradient is biased again. gradient_accumulation_steps='sequence' divides by those of the whole "
            "sequence.",
            UserWarning,
            stacklevel=3,
        )


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
