"""What `engine.state.output` is at the end of a batch."""

from __future__ import annotations

from typing import Any


class BatchOutput:
    """The weighted mean of the outputs of a batch's windows."""

    def __init__(self) -> None:
        self._total: Any = 0.0
        self._weight = 0.0

    def add(self, output: Any, weight: float) -> None:
        """Add the output of a window."""
        self._total += weight * output
        self._weight += weight

    def result(self) -> Any:
        """Return the mean."""
        return self._total / self._weight if self._weight else None
