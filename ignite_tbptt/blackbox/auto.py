"""estimator="auto": coordinates as long as they are cheap enough, directions that remember beyond.

The idea: one coordinate costs as much as one direction, so that the exact gradient is worth its price while the columns
of all inputs are few. What is chosen depends on the inputs of a call alone, and is told in one line of the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ignite_tbptt.blackbox.estimator import Estimator
from ignite_tbptt.blackbox.guided import GuidedDirections

__all__ = ["AutoEstimator"]

_LOGGER = logging.getLogger(__name__)

# Evaluations up to which a gradient is taken by coordinates, and what is taken beyond.
_BUDGET = 1000
_BEYOND = GuidedDirections(64)


@dataclass(frozen=True)
class AutoEstimator(Estimator):
    """Central differences by coordinates, or by `GuidedDirections` where coordinates are too many."""

    def suited(self, label: str, columns: Callable[[], int], told: set[Any]) -> Estimator:
        """See `Estimator.suited`."""
        count, each = columns(), len(self.stencil.evaluated)
        fits = count * each <= _BUDGET
        if ("auto", fits) not in told:
            told.add(("auto", fits))
            asked = f"{label}: {count} columns at {each} evaluations each are"
            if fits:
                _LOGGER.info("%s within the budget of %d: every coordinate", asked, _BUDGET)
            else:
                _LOGGER.info("%s more than the budget of %d: %s, %d", asked, _BUDGET, _BEYOND, _BEYOND.n * each)
        return Estimator(self.stencil, self.directions if fits else _BEYOND, self.step_size)
