"""Truncation beyond fixed chunks: sliding, random, unbiased and none at all.

Each policy only says where windows begin and end, what a boundary does to the gradient and how much a segment weighs;
the trainer runs all of them in the same way. They pair with ``gradient_accumulation_steps`` (a step for a window or for
the whole sequence) and ``checkpoint_segments`` (the memory of one segment for a window of any length).

The loss function returns the mean over a segment, so a segment of n steps whose *sum* is wanted, up to a constant, has
a loss weight in proportion to n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch

from ignite_tbptt.arguments import require_seed
from ignite_tbptt.truncation import Outline, Segment, TruncationPolicy, Window, require_steps
from ignite_tbptt.warn import warn


@dataclass(frozen=True, repr=False)
class FixedTruncation:
    """Windows of `steps` time steps each, the last one shorter where the length asks for it.

    This is truncated back-propagation as Ignite and most hand-written loops have it, TBPTT(k, k): the cost is one
    step of the model for one step of the sequence.

    Example:
        >>> import torch
        >>> [window[0][:2] for window in FixedTruncation(4).windows(9, torch.Generator())]
        [(0, 4), (4, 8), (8, 9)]
        >>> [window[0][:2] for window in FixedTruncation(4, minimum=2).windows(9, torch.Generator())]
        [(0, 4), (4, 9)]

    Args:
        steps: time steps of a window.
        minimum: the shortest last window. A shorter rest of the sequence is joined to the window before it: a loss
            that takes differences over time, say, needs two steps. A sequence shorter than that is one window.

    Raises:
        TypeError: `steps` or `minimum` is not an integer.
        ValueError: `steps` is below 1, or `minimum` below 1 or above `steps`.
    """

    steps: int
    minimum: int = 1

    def __post_init__(self) -> None:
        require_steps("steps", self.steps)
        require_steps("minimum", self.minimum)
        if self.minimum > self.steps:
            raise ValueError(
                f"minimum must not be above steps, got minimum={self.minimum} and steps={self.steps}: every window "
                "would be too short. Give longer windows."
            )

    def __repr__(self) -> str:
        minimum = "" if self.minimum == 1 else f", minimum={self.minimum}"
        return f"FixedTruncation(steps={self.steps}{minimum})"

    def outline(self, length: int) -> Outline:
        """Return the number of windows; see `TruncationPolicy`."""
        return Outline(max(1, (length + self.steps - self.minimum) // self.steps), overlap=False)

    def windows(self, length: int, generator: torch.Generator) -> Iterator[Window]:
        """Yield [0, steps), [steps, 2 steps), ... up to `length`; see `TruncationPolicy.windows`."""
        last = (self.outline(length).windows - 1) * self.steps
        for start in range(0, last, self.steps):
            yield (Segment(start, start + self.steps),)
        yield (Segment(last, length),)


@dataclass(frozen=True)
class SlidingTruncation:
    """Windows that overlap: every `k1` steps a loss on those steps is back-propagated through up to `k2`.

    Williams and Peng's BPTT(h; h') with h = k2 and h' = k1, also known as TBPTT(k1, k2). The k2 - k1 steps before the
    new ones are run again, from the state that was reached there, without a loss: weights that have been stepped since
    cannot be back-propagated through, so chained graphs are no way. Buffers count them again: with k2 = 2 k1, batch
    normalisation updates its statistics 11 times for 6 windows. A model that keeps a state on itself is refused, since
    only the hidden state that it returns is rewound. Every loss sees at least k2 - k1 steps back, where
    in chunks of k2 some see none. The cost is k2 / k1 steps of the model for one step of the sequence.

    Example:
        >>> import torch
        >>> for window in SlidingTruncation(k1=2, k2=4).windows(6, torch.Generator()):
        ...     print([(start, stop, weight) for start, stop, _, weight in window])
        [(0, 2, 1.0)]
        [(0, 2, 0.0), (2, 4, 1.0)]
        [(2, 4, 0.0), (4, 6, 1.0)]

    Args:
        k1: new time steps of a window.
        k2: all time steps of a window, those that are run again included. Windows near the start of a sequence have
            fewer; nothing reaches back into the batch before, not with ``stateful=True`` either. k2 = k1 is
            `FixedTruncation`.

    Raises:
        TypeError: `k1` or `k2` is not an integer.
        ValueError: `k1` or `k2` is below 1, or `k1` above `k2`.

    Warns:
        UserWarning: a sequence is shorter than `k2`, so that no window of it can reach k2 steps back.

    Source: Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories, Neural Computation 2 (1990) 490-501.
    """

    k1: int
    k2: int

    def __post_init__(self) -> None:
        require_steps("k1", self.k1)
        require_steps("k2", self.k2)
        if self.k1 > self.k2:
            raise ValueError(
                f"k1 must not be above k2, got k1={self.k1} and k2={self.k2}: of {self.k1} new steps the first "
                f"{self.k1 - self.k2} would have a loss and no gradient. For chunks of {self.k1} steps use "
                f"FixedTruncation({self.k1})."
            )

    def outline(self, length: int) -> Outline:
        """Return the number of windows and whether they overlap; see `TruncationPolicy`."""
        return Outline(-(-length // self.k1), overlap=self.k1 < self.k2 and self.k1 < length)

    def windows(self, length: int, generator: torch.Generator) -> Iterator[Window]:
        """Yield a prefix and k1 new steps for each multiple of `k1`; see `TruncationPolicy.windows`."""
        prefix = self.k2 - self.k1
        if prefix and length < self.k2:
            warn(
                f"a sequence of {length} steps is too short for {self!r}: k2={self.k2} steps back are not reachable "
                "in any of its windows. Give longer sequences, or a smaller k2."
            )
        # Later windows start this many steps behind a multiple of k1; the model is stopped there, for the state.
        offset = -self.k2 % self.k1
        last_start = (length - 1) // self.k1 * self.k1 - prefix
        for start in range(0, length, self.k1):
            stop = min(start + self.k1, length)
            split = start + offset
            edges = [start, split, stop] if start < split <= last_start else [start, stop]
            new = tuple(
                Segment(first, last, loss_weight=(last - first) / (stop - start)) for first, last in pairwise(edges)
            )
            window_start = max(0, start - prefix)
            yield (Segment(window_start, start, loss_weight=0.0), *new) if window_start < start else new


@dataclass(frozen=True)
class RandomTruncation:
    """Windows of random length, as AWD-LSTM draws them, so that no time step is always the first of a chunk.

    The length is ``max(minimum, int(N(base, std)))``, where `base` is `mean`, or half of it with `halve_probability`. A
    window weighs its length over `mean`, as the rescaled learning rate of the paper does with plain SGD: every time
    step counts alike. (Adam and its kin divide such a factor out again.) The cost is one step of the model for one of
    the sequence.

    Example:
        ::

            trainer = create_supervised_tbptt_trainer(model, sgd, loss_fn, RandomTruncation(mean=70))

    Args:
        mean: time steps of a usual window. Through the halving and the rounding down windows are shorter on average.
        std: standard deviation of the length, in time steps.
        halve_probability: probability that a window is drawn around half of `mean`.
        minimum: the least length of a window; only the last one of a sequence may be shorter.
        seed: the windows depend on it and on the engine's iteration alone.

    Raises:
        TypeError: `minimum` or `seed` is not an integer, or another argument not a number.
        ValueError: `minimum` is below 1, `mean` below `minimum`, `std` negative or not finite, or `halve_probability`
            outside [0, 1).

    Source: Merity, Keskar and Socher, Regularizing and Optimizing LSTM Language Models, ICLR 2018, section 5.
    """

    mean: float
    std: float = 5.0
    halve_probability: float = 0.05
    minimum: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        require_steps("minimum", self.minimum)
        require_seed(self.seed)
        for name in ("mean", "std", "halve_probability"):
            _require_finite(name, getattr(self, name))
        if self.mean < self.minimum:
            raise ValueError(
                f"mean must be at least minimum, got mean={self.mean} and minimum={self.minimum}: every window would "
                f"be {self.minimum} steps long. Give a smaller minimum, or FixedTruncation({self.minimum})."
            )
        if self.std < 0:
            raise ValueError(f"std must not be negative, got {self.std}: it is the spread of the lengths, in steps.")
        if not 0 <= self.halve_probability < 1:
            raise ValueError(
                f"halve_probability must lie in [0, 1), got {self.halve_probability}: to halve every window, halve "
                "mean."
            )

    def windows(self, length: int, generator: torch.Generator) -> Iterator[Window]:
        """Yield one segment a window, of random length; see `TruncationPolicy.windows`."""
        start = 0
        while start < length:
            stop = min(start + self._draw(generator), length)
            yield (Segment(start, stop, loss_weight=(stop - start) / self.mean),)
            start = stop

    def _draw(self, generator: torch.Generator) -> int:
        halved = float(torch.rand((), generator=generator, dtype=torch.float64)) < self.halve_probability
        base = self.mean / 2 if halved else self.mean
        deviation = self.std * float(torch.randn((), generator=generator, dtype=torch.float64))
        return max(self.minimum, int(base + deviation))


@dataclass(frozen=True)
class AnticipatedReweightedTruncation:
    """Windows that are cut by the toss of a coin and make up for it: an unbiased gradient from truncated windows.

    At every boundary between segments of `steps` time steps the window is cut with probability c; where it is not, the
    gradient that crosses is multiplied by 1 / (1 - c). In expectation every gradient arrives whole, as long as the
    parameters are frozen over the sequence and losses are added up, not averaged over the window. The variance is what
    is paid: dependencies much longer than `mean` arrive seldom and enlarged.

    With d segments since the last cut, c = alpha / ((alpha - 1) mean / steps + d): the lengths have a tail of power
    `alpha`, and `mean` is their mean in time steps. Most windows are short, a few very long:
    ``checkpoint_segments=True`` bounds their memory.

    Example:
        The exact expectation, one optimizer step for a sequence::

            policy = AnticipatedReweightedTruncation(steps=1, alpha=6, mean=16)
            trainer = create_supervised_tbptt_trainer(
                model, optimizer, loss_fn, policy, gradient_accumulation_steps="sequence", checkpoint_segments=True
            )

    A segment weighs its length over `mean`: a constant, so the sum is kept, and a window of usual length has a loss as
    large as its mean. `loss_fn` returns the mean over a segment; a loss that is divided by anything that depends on
    where cuts fall, the length of the window say, brings the bias back.

    With ``gradient_accumulation_steps="sequence"`` the gradient is that of the mean loss over the sequence, in
    expectation exactly. With an optimizer step for every window the parameters move inside the sequence, which is
    another, small bias, as in all on-line training; with several windows for a step the last few of a sequence are
    averaged over their random number.

    Args:
        steps: time steps between two boundaries; 1 allows a cut anywhere.
        alpha: how fast the lengths fall off: their tail is that of a power law. The variance of the lengths is finite
            above 2; the paper uses 4 and 6.
        mean: mean time steps of a window (the paper's L0) in an endless sequence; above `steps`.
        seed: the cuts depend on it and on the engine's iteration alone.

    Raises:
        TypeError: `steps` or `seed` is not an integer, or another argument not a number.
        ValueError: `steps` is below 1, `alpha` is not above 1, or `mean` not above `steps`.

    Source: Tallec and Ollivier, Unbiasing Truncated Backpropagation Through Time, 2017, arXiv:1705.08209.
    """

    steps: int
    alpha: float
    mean: float
    seed: int = 0

    sums_losses = True  # asked for by `truncation.warn_if_normalised`; no field

    def __post_init__(self) -> None:
        require_steps("steps", self.steps)
        require_seed(self.seed)
        _require_finite("alpha", self.alpha)
        _require_finite("mean", self.mean)
        if self.alpha <= 1:
            raise ValueError(
                f"alpha must be above 1, got {self.alpha}: windows would have no mean length. 4 or 6 are usual."
            )
        if self.mean <= self.steps:
            raise ValueError(
                f"mean must be above steps, got mean={self.mean} and steps={self.steps}: no boundary would survive, "
                f"and nothing could make up for the cuts. Give a larger mean or shorter segments; "
                f"FixedTruncation({self.steps}) cuts at every boundary."
            )

    def cut_probability(self, segments: int) -> float:
        """Return the probability of a cut when `segments` segments have gone by since the last one."""
        return self.alpha / ((self.alpha - 1) * self.mean / self.steps + segments)

    def windows(self, length: int, generator: torch.Generator) -> Iterator[Window]:
        """Yield runs of segments between random cuts; see `TruncationPolicy.windows`."""
        window: list[Segment] = []
        for start in range(0, length, self.steps):
            stop = min(start + self.steps, length)
            carry_scale = 1.0
            if window:
                cut = self.cut_probability(len(window))
                if float(torch.rand((), generator=generator, dtype=torch.float64)) < cut:
                    yield tuple(window)
                    window = []
                else:
                    carry_scale = 1 / (1 - cut)
            window.append(Segment(start, stop, carry_scale, (stop - start) / self.mean))
        yield tuple(window)


@dataclass(frozen=True)
class FullBackpropagation:
    """No truncation: one window over the whole sequence, in segments of `steps` time steps.

    With ``checkpoint_segments=True`` it is the exact gradient in the memory of one segment and the states between
    segments, for one more forward pass: the root of the length is a good number of steps. Without it, it is full
    back-propagation and its memory.

    Example:
        ::

            trainer = create_supervised_tbptt_trainer(
                model, optimizer, loss_fn, FullBackpropagation(50), checkpoint_segments=True
            )

    Args:
        steps: time steps of a segment.

    Raises:
        TypeError: `steps` is not an integer.
        ValueError: `steps` is below 1.

    Source: Chen, Xu, Zhang and Guestrin, Training Deep Nets with Sublinear Memory Cost, 2016, arXiv:1604.06174;
    Gruslys et al., Memory-Efficient Backpropagation Through Time, NeurIPS 2016, arXiv:1606.03401.
    """

    steps: int

    def __post_init__(self) -> None:
        require_steps("steps", self.steps)

    def windows(self, length: int, generator: torch.Generator) -> Iterator[Window]:
        """Yield all segments as one window; see `TruncationPolicy.windows`."""
        edges = [*range(0, length, self.steps), length]
        yield tuple(Segment(start, stop, loss_weight=(stop - start) / length) for start, stop in pairwise(edges))


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


def warn_if_normalised(policy: Any, gradient_accumulation_steps: Any, loss_weight: Any) -> None:
    """Warn where a policy that needs losses added up would have them divided by what counts in each window."""
    if getattr(policy, "sums_losses", False) and loss_weight is not None and gradient_accumulation_steps != "sequence":
        warn(
            f"loss_weight with tbtt_step={policy!r} and gradient_accumulation_steps={gradient_accumulation_steps!r}: "
            "the loss of a window is divided by the steps that count in it, and these depend on where the cuts fall, "
            "so the gradient is biased again. gradient_accumulation_steps='sequence' divides by those of the whole "
            "sequence."
        )


def _require_finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
