"""What `engine.state.output` is at the end of a batch, made of the outputs of its windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any, NoReturn

import torch

from ignite_tbptt import nest


class OutputInChunks(Sequence[Any]):
    """Stands for outputs of several windows that have no mean: predictions, say. Any use raises TypeError.

    A handler of ITERATION_COMPLETED would otherwise take the output of the last window for that of the batch.
    """

    def _refuse(self, *args: Any) -> NoReturn:
        raise TypeError(
            "engine.state.output of the batch is not there: its windows gave outputs that are no numbers, and those of "
            "earlier windows are not kept. Handle Tbptt_Events.TIME_ITERATION_COMPLETED, where the output is the "
            "window's: metric.attach(engine, name, usage=EpochTimeWise()) for a metric."
        )

    __len__ = __getitem__ = __iter__ = __float__ = __array__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse

    @classmethod
    def __torch_function__(cls, *args: Any) -> NoReturn:
        cls()._refuse()

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks for these, to copy or to pickle
            raise AttributeError(name)
        self._refuse()

    def __repr__(self) -> str:
        return "<outputs of several windows, not kept>"


class BatchOutput:
    """The output of a batch: that of its only window, or the weighted mean of those of several.

    Attributes:
        weight: sum of the weights.

    Numbers, tensors without axes, and dicts, tuples and lists of them have a mean. `OutputInChunks` takes the place of
    what has none.
    """

    def __init__(self) -> None:
        self._output: Any = None
        self.weight = 0.0
        self._windows = 0

    def add(self, output: Any, weight: float) -> None:
        """Add the output of a window."""
        self._windows += 1
        if self._windows == 1:
            self._output, self.weight = output, weight
            return
        if self._windows == 2:
            first = self.weight
            self._output = _by_numbers(lambda number: first * number, self._output)
        if type(output) is float and type(self._output) is float:
            self._output += weight * output
        else:
            self._output = _by_numbers(lambda total, number: total + weight * number, self._output, output)
        self.weight += weight

    def result(self) -> Any:
        """Return the output of the batch, None where there were no windows."""
        if self._windows < 2:
            return self._output
        return _by_numbers(lambda total: total / self.weight, self._output)


def _by_numbers(fn: Callable[..., Any], *nodes: Any) -> Any:
    """Return a nest of what `fn` returns for the numbers of nests that are alike."""
    if all(_has_mean(node) for node in nodes):
        return fn(*(node.detach() if isinstance(node, torch.Tensor) else node for node in nodes))
    below = [None if isinstance(node, OutputInChunks) else nest.children(node) for node in nodes]
    first = below[0]
    if first is None or any(pairs is None or [k for k, _ in pairs] != [k for k, _ in first] for pairs in below):
        return OutputInChunks()
    values = [
        _by_numbers(fn, *alike) for alike in zip(*([child for _, child in pairs or ()] for pairs in below), strict=True)
    ]
    if values and all(isinstance(value, OutputInChunks) for value in values):
        return OutputInChunks()
    return nest.rebuild(nodes[0], values)


def _has_mean(node: Any) -> bool:
    if isinstance(node, torch.Tensor):
        return node.ndim == 0
    return isinstance(node, Number) and not isinstance(node, bool)
