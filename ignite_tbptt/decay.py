"""How far back to back-propagate: from measured gradient norms to the bias of every truncation.

Pure arithmetic on the norms phi_k = E||dL_s / dh_{s-k}||, k = 1, 2, ...: a geometric law is fitted to their tail, what
a truncation leaves out is added up, and the shortest one within a tolerance is named. `horizon` measures them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any


@dataclass(frozen=True)
class GradientDecay:
    """The decay of the gradient of a loss on its way back in time, and the bias of cutting it off.

    Example:
        >>> decay = GradientDecay([0.9**k for k in range(1, 61)])
        >>> round(decay.rate, 6)
        0.9
        >>> [decay.recommended(tolerance) for tolerance in (0.9, 0.5, 0.1)]
        [2, 7, 22]

    With E(K) the sum of phi_k over k > K, and S(K) that over k <= K, the bias of the truncated gradient is bounded by
    E(K), the norm of the whole gradient from below by the largest S(K') - E(K'), and the relative bias delta(K) by
    their ratio. (Both in the units of the gradient of the state: the factor from there to the parameters is taken to
    be one and the same for all k, as in the paper.) Beyond the last lag phi is continued geometrically.

    K steps back are what each loss has with ``SlidingTruncation(k1, k1 + K)``, at least. In chunks of K steps it is the
    loss of the last step alone that reaches back that far, nearly, and the first reaches no earlier state: see
    `chunk_bias`.

    Args:
        phi: norms at the lags 1, 2, ..., in any unit.
        deviation: standard errors of `phi`, where they are known.
        fit_from: first lag of the tail that the rate is fitted to; None for the second half.

    Raises:
        ValueError: there are fewer than two lags, a norm is negative or NaN, all are 0, or `fit_from` leaves too few.

    Source: Aicher, Foti and Fox, Adaptively Truncating Backpropagation Through Time to Control Gradient Bias, UAI 2019,
    arXiv:1905.07473, section 3.
    """

    phi: Sequence[float]
    deviation: Sequence[float] | None = None
    fit_from: int | None = None

    def __post_init__(self) -> None:
        if len(self.phi) < 2:
            raise ValueError(f"phi must have two lags at least to show a decay, got {len(self.phi)}.")
        wrong = [norm for norm in self.phi if not norm >= 0]
        if wrong:
            raise ValueError(f"phi must hold norms, which are not negative, got {wrong[0]}.")
        if not any(self.phi):
            raise ValueError(
                "the loss does not depend on the hidden state: all gradients are 0. The model ignores the state that "
                "it is given, or detaches it inside: look for .detach(), .data or torch.no_grad() there."
            )
        require_fit_from(self.fit_from, len(self.phi))

    @property
    def tail_start(self) -> int:
        """First lag that the rate is fitted to."""
        return self.fit_from if self.fit_from is not None else len(self.phi) // 2

    @cached_property
    def _line(self) -> tuple[float, float]:
        """Intercept and slope of log phi over the lags of the tail, by least squares."""
        if not all(math.isfinite(norm) for norm in self.phi):
            return math.inf, math.inf
        first = max(1, self.tail_start)
        points = [(lag, math.log(norm)) for lag, norm in enumerate(self.phi, 1) if lag >= first and norm > 0]
        if len(points) < 2:  # gradients have vanished altogether
            return -math.inf, -math.inf
        mean_lag = sum(lag for lag, _ in points) / len(points)
        mean_log = sum(log for _, log in points) / len(points)
        spread = sum((lag - mean_lag) ** 2 for lag, _ in points)
        slope = sum((lag - mean_lag) * (log - mean_log) for lag, log in points) / spread
        return mean_log - slope * mean_lag, slope

    @property
    def rate(self) -> float:
        """Factor from phi_k to phi_{k+1} in the tail; from 1 on gradients do not decay, and infinity if any does."""
        return _exp(self._line[1])

    def fitted(self, lag: int) -> float:
        """Return the value at `lag` of the law that was fitted to the tail."""
        intercept, slope = self._line
        return _exp(intercept + slope * lag) if math.isfinite(slope) else 0.0 if slope < 0 else math.inf

    @cached_property
    def _left_out(self) -> list[float]:
        """E(K) for K = 0, ..., the last lag."""
        beyond = math.inf if self.rate >= 1 else self.fitted(len(self.phi)) * self.rate / (1 - self.rate)
        return list(accumulate(reversed(self.phi), initial=beyond))[::-1]

    @cached_property
    def _norm(self) -> float:
        """Lower bound on the norm of the whole gradient."""
        kept = accumulate(self.phi, initial=0.0)
        return max(inside - outside for inside, outside in zip(kept, self._left_out, strict=True))

    def relative_bias(self, steps: int) -> float:
        """Return delta(K), the bound on the relative bias of a truncation after `steps`; infinity if there is none."""
        if self.rate >= 1 or self._norm <= 0:
            return math.inf
        lags = len(self.phi)
        left_out = self._left_out[steps] if steps <= lags else self._left_out[-1] * self.rate ** (steps - lags)
        return left_out / self._norm

    def recommended(self, tolerance: float) -> int | None:
        """Return the least number of steps whose relative bias is below `tolerance`, None if no number is known.

        Raises:
            ValueError: `tolerance` is not positive and finite.
        """
        require_tolerance(tolerance)
        if not math.isfinite(self.relative_bias(len(self.phi))):
            return None
        for steps in range(1, len(self.phi) + 1):
            if self.relative_bias(steps) < tolerance:
                return steps
        excess = math.log(self.relative_bias(len(self.phi)) / tolerance)
        return len(self.phi) + math.floor(-excess / math.log(self.rate)) + 1

    def chunk_bias(self, steps: int) -> float:
        """Return the relative bias in chunks of `steps` time steps with a loss at each; infinity if there is no bound.

        The loss of the j-th step of a chunk, j = 0, 1, ..., is followed back over j steps, so this is the mean of
        delta(0), ..., delta(steps - 1).

        Example:
            >>> GradientDecay([0.5**k for k in range(1, 61)]).chunk_bias(2)  # the mean of 1 and 0.5
            0.75
        """
        if self.rate >= 1 or self._norm <= 0:
            return math.inf
        within = self._left_out_up_to[min(steps, len(self._left_out)) - 1]
        beyond = steps - len(self._left_out)
        if beyond > 0 and self.rate > 0:
            within += self._left_out[-1] * self.rate * (1 - self.rate**beyond) / (1 - self.rate)
        return within / steps / self._norm

    def recommended_chunk(self, tolerance: float) -> int | None:
        """Return the least length of chunks whose relative bias is below `tolerance`, None if no length is known.

        Raises:
            ValueError: `tolerance` is not positive and finite.
        """
        require_tolerance(tolerance)
        if not math.isfinite(self.chunk_bias(1)):
            return None
        longest = 1
        while self.chunk_bias(longest) >= tolerance:
            longest *= 2
        return bisect_left(range(longest), True, lo=1, key=lambda steps: self.chunk_bias(steps) < tolerance)

    def plot(self, tolerance: float = 0.5) -> Any:
        """Draw the decay with its fit, the relative bias of every K, and what is recommended for `tolerance`.

        Returns:
            A matplotlib Figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed; the extra ``plot`` brings it.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "GradientHorizon draws with matplotlib, which is not installed: pip install 'ignite-tbptt[plot]'."
            ) from error
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_decay(left, self)
        _draw_bias(right, self, tolerance)
        return figure

    @cached_property
    def _left_out_up_to(self) -> list[float]:
        """The sum of E(0), ..., E(K) for K = 0, ..., the last lag."""
        return list(accumulate(self._left_out))


def require_tolerance(tolerance: Any) -> None:
    """Refuse a tolerance that no relative bias can be held to.

    Raises:
        ValueError: `tolerance` is no number that is positive and finite.
    """
    if not (isinstance(tolerance, (int, float)) and math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be positive and finite, a bound on the relative bias, got {tolerance!r}.")


def require_fit_from(fit_from: Any, lags: int) -> None:
    """Refuse a lag that leaves too few to fit a rate to; None stands for the second half.

    Raises:
        ValueError: `fit_from` is no integer in [1, lags - 1].
    """
    if fit_from is not None and not (isinstance(fit_from, int) and 1 <= fit_from < lags):
        raise ValueError(
            f"fit_from must lie in [1, {lags - 1}], so that two of the {lags} lags are left for the fit, got "
            f"{fit_from!r}."
        )


def _exp(exponent: float) -> float:
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf


def _draw_decay(axes: Any, decay: GradientDecay) -> None:
    lags = range(1, len(decay.phi) + 1)
    axes.plot(lags, decay.phi, label="measured")
    if decay.deviation is not None:
        band = [(norm - 2 * error, norm + 2 * error) for norm, error in zip(decay.phi, decay.deviation, strict=True)]
        floor = min((norm for norm in decay.phi if norm > 0), default=1.0) / 10  # the axis is logarithmic
        lower, upper = [max(low, floor) for low, _ in band], [high for _, high in band]
        axes.fill_between(lags, lower, upper, alpha=0.3, label="2 standard errors")
    tail = range(max(1, decay.tail_start), len(decay.phi) + 1)
    axes.plot(tail, [decay.fitted(lag) for lag in tail], "--", label=f"fit: {decay.rate:.4g} a step")
    axes.set(xlabel="k, steps back", ylabel=r"$\|dL_s / dh_{s-k}\|$", yscale="log", title="decay of the gradient")
    axes.legend()


def _draw_bias(axes: Any, decay: GradientDecay, tolerance: float) -> None:
    lags = len(decay.phi)
    found = [
        (decay.recommended(tolerance), decay.relative_bias, "K steps back from each loss", "tab:blue"),
        (decay.recommended_chunk(tolerance), decay.chunk_bias, "chunks of K steps", "tab:orange"),
    ]
    last = max([lags, *(min(number, 10 * lags) for number, *_ in found if number is not None)])
    largest = 1.0
    for number, bias, name, color in found:
        biases = [bias(steps) for steps in range(1, last + 1)]
        axes.plot(range(1, last + 1), biases, color=color, label=f"{name}: {number or 'no bound'}")
        if number is not None:
            axes.axvline(number, color=color, linestyle=":")
            largest = max(largest, biases[0])
    axes.axhline(tolerance, color="black", linestyle=":", label=f"tolerance {tolerance:g}")
    axes.set(xlabel="K", ylabel="relative bias, at most", yscale="log", title="bias of the truncation")
    axes.set_xlim(0, last + 1)
    # Far below the tolerance there is nothing to decide; above the curves is room for the legend.
    axes.set_ylim(tolerance / 100, 30 * max(largest, tolerance))
    axes.legend(loc="upper right")
