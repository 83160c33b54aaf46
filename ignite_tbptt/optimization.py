"""From losses to one optimizer step: which windows feed it, with what weight, and the order of what happens.

Two ideas pair here. An accumulation (`PerWindows`, `PerSequence`) decides which windows share a step and how much each
weighs; `OptimizerStep` knows the order: zero, backward, rescale, unscale, look at the gradients, step, update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import torch

from ignite_tbptt import nest
from ignite_tbptt.truncation import Window, loss_coefficients


class Accumulation(Protocol):
    """Decides which windows share an optimizer step and how their losses are weighed.

    A step is taken on ``sum(share(window) * loss(window)) / sum(share(window))``. The sum of the shares is known only
    when the last window has been seen (padding decides about it), so losses are divided by `expected` before backward,
    where gradients keep their magnitude, and the gradients are corrected once by the factor that remains.
    """

    def groups(self, windows: Sequence[Window]) -> Iterator[Sequence[Window]]:
        """Yield the windows of each optimizer step."""
        ...

    def expected(self, group: Sequence[Window]) -> float:
        """Return the sum of the shares of `group` if every time step counts."""
        ...

    def share(self, steps: float) -> float:
        """Return the share of a window in which so many steps count."""
        ...

    def coefficients(self, window: Window, counts: Sequence[float]) -> list[float]:
        """Return the factors that make one loss out of the losses of the window's segments."""
        ...


@dataclass(frozen=True)
class PerWindows:
    """An optimizer step for every `steps` windows of a sequence, on the mean of their losses.

    The windows that are left over at the end of the sequence are stepped on as well, on the mean over those left.
    """

    steps: int

    def groups(self, windows: Sequence[Window]) -> Iterator[Sequence[Window]]:
        """Yield runs of `steps` windows, the last one shorter where need be."""
        return (windows[start : start + self.steps] for start in range(0, len(windows), self.steps))

    def expected(self, group: Sequence[Window]) -> float:
        """Return the number of windows."""
        return len(group)

    def share(self, steps: float) -> float:
        """Return 1 for a window that has a loss."""
        return 1.0 if steps else 0.0

    def coefficients(self, window: Window, counts: Sequence[float]) -> list[float]:
        """Return the loss weights that the truncation policy gave, adapted to where steps count."""
        return loss_coefficients(window, counts)


@dataclass(frozen=True)
class PerSequence:
    """One optimizer step for a batch, on the mean loss over all counting time steps of the whole sequence.

    The loss weights of the truncation policy matter only in being 0 or not: they exist to balance steps that are taken
    inside a sequence, and here none is.
    """

    def groups(self, windows: Sequence[Window]) -> Iterator[Sequence[Window]]:
        """Yield all windows at once."""
        return iter((windows,))

    def expected(self, group: Sequence[Window]) -> float:
        """Return the number of time steps."""
        return sum(stop - start for window in group for start, stop, _, loss_weight in window if loss_weight)

    def share(self, steps: float) -> float:
        """Return the number of counting steps."""
        return steps

    def coefficients(self, window: Window, counts: Sequence[float]) -> list[float]:
        """Return the share of each segment in the counting steps of the window."""
        total = sum(counts)
        return [count / total for count in counts]


def as_accumulation(gradient_accumulation_steps: Any) -> Accumulation:
    """Return the accumulation that the argument stands for.

    Raises:
        TypeError: it is neither an int nor a string.
        ValueError: it is an int below 1, or a string other than "sequence".
    """
    if gradient_accumulation_steps == "sequence":
        return PerSequence()
    if isinstance(gradient_accumulation_steps, str):
        raise ValueError(
            f"gradient_accumulation_steps must be a number of windows or 'sequence', got "
            f"{gradient_accumulation_steps!r}."
        )
    if isinstance(gradient_accumulation_steps, bool) or not isinstance(gradient_accumulation_steps, Integral):
        raise TypeError(
            f"gradient_accumulation_steps must be an int number of windows or 'sequence', got "
            f"{gradient_accumulation_steps!r}."
        )
    if gradient_accumulation_steps < 1:
        raise ValueError(
            f"gradient_accumulation_steps must be at least 1, got {gradient_accumulation_steps}: 1 is a step for every "
            "window, 'sequence' one step for every batch."
        )
    return PerWindows(int(gradient_accumulation_steps))


@dataclass(frozen=True)
class OptimizerStep:
    """The optimizer and its gradient scaler, used in the one right order."""

    optimizer: Any
    scaler: Any = None

    def zero(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad()

    def backward(self, loss: Any) -> None:
        """Add the gradients of a loss."""
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()

    def take(self, factor: float, gradients_ready: Callable[[], bool] | None = None) -> bool:
        """Step on the gradients that are there.

        Args:
            factor: what the gradients are multiplied by first.
            gradients_ready: called when the gradients are final and free of the scaler's factor; returns whether the
                step is to be taken. None takes it.

        Returns:
            Whether the parameters were stepped: not where `gradients_ready` said no or the scaler met inf or NaN.
        """
        if factor != 1.0:
            self._rescale(factor)
        if self.scaler is None:
            if gradients_ready is not None and not gradients_ready():
                return False
            self.optimizer.step()
            return True
        self.scaler.unscale_(self.optimizer)
        scale_before = self.scaler.get_scale()
        try:
            if gradients_ready is not None and not gradients_ready():
                return False
            self.scaler.step(self.optimizer)
        finally:
            # Also when no step is taken or a handler raises: a scaler left unscaled refuses the next unscale_().
            self.scaler.update()
        return bool(self.scaler.get_scale() >= scale_before)

    def _rescale(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)


def checked_loss(loss: Any) -> Any:
    """Return a loss that can be back-propagated, or say why it cannot.

    Raises:
        TypeError: `loss` is no tensor.
        ValueError: `loss` is not a scalar, or has no graph.
    """
    if not hasattr(loss, "backward"):
        raise TypeError(
            f"loss_fn must return a scalar tensor, got {type(loss).__name__}: compute the loss with torch operations."
        )
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"loss_fn must return a scalar, got a tensor of shape {tuple(loss.shape)}: reduce it (mean or sum) "
                "over the batch and the time steps of the chunk."
            )
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not require grad: nothing that led to it can be trained. Most likely the graph is cut "
                "inside the model: look for .item(), .numpy(), .detach(), .data, torch.tensor(...) of computed values, "
                "torch.no_grad(), or an operation without a gradient (argmax, a comparison); "
                "ignite_tbptt.find_graph_cuts(model, x) names the line. Or every parameter is frozen "
                "(requires_grad=False)."
            )
    return loss


def zero_through(y_pred: Any) -> torch.Tensor:
    """Return a loss of 0 whose backward reaches what `y_pred` was made from."""
    sums = [tensor.sum() for tensor in nest.tensors(y_pred) if tensor.requires_grad]
    return torch.stack(sums).sum() * 0.0
