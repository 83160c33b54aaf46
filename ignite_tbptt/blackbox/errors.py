"""What goes wrong with a blackbox, as types: one error and one warning, so that callers can tell them from the rest.

Arguments that are wrong in themselves raise TypeError or ValueError, as everywhere. These two are about what a blackbox
did when it was evaluated, and pair with every estimator and evaluator.
"""

from __future__ import annotations

__all__ = ["BlackboxError", "LostEvaluationError", "UntrustedGradientWarning"]


class BlackboxError(RuntimeError):
    """A blackbox did what no difference can be taken of: it raised, or gave NaN, other shapes, coupled rows."""


class LostEvaluationError(BlackboxError):
    """An evaluation was given up, as ``Workers(failed="nan")`` asks for: what it would have told stays unknown."""


class UntrustedGradientWarning(UserWarning):
    """A gradient was computed, and there is a reason to doubt it."""
