"""From losses to one optimizer step: which windows share it, how their losses are weighted, and the order of events.

Three ideas pair here. An accumulation (`PerWindows`, `PerSequence`) decides which windows share a step. A reduction
(`MeanLoss`, `SumLoss`) knows what a loss is, and so how losses are put together. `OptimizerStep` keeps the order: zero,
backward, rescale, unscale, look at the gradients, step, update.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import torch

from ignite_tbptt import nest
from ignite_tbptt.truncation import Window


class Accumulation(Protocol):
    """Decides which windows share an optimizer step."""

    def closes(self, windows: int, ends_batch: bool, ends_epoch: bool) -> bool:
        """Return whether the step is taken with this window, the `windows`-th that shares it."""
        ...

    def expected(self, first_steps: int, length: int) -> float:
        """Return how many time steps the windows of a step have, as far as their first one tells."""
        ...

    def scale(self, window: Window) -> float:
        """Return the factor on the step that the truncation policy asks for with a window."""
        ...

    def weights(self, window: Window, counts: Sequence[float]) -> list[float]:
        """Return the weights of the segments in the loss of their window; they add up to 1."""
        ...


@dataclass(frozen=True)
class PerWindows:
    """An optimizer step for every `steps` windows, also over batches, and for those that are left in an epoch.

    The scale of a step is the mean of the loss weights that the truncation policy gives its windows.
    """

    steps: int

    def closes(self, windows: int, ends_batch: bool, ends_epoch: bool) -> bool:
        """Return whether these are `steps` windows, or the last ones of the epoch."""
        return windows == self.steps or ends_epoch

    def expected(self, first_steps: int, length: int) -> float:
        """Return the steps of as many windows as the first one has."""
        return self.steps * first_steps

    def scale(self, window: Window) -> float:
        """Return the loss weight of the window."""
        return window[0].loss_weight if len(window) == 1 else sum(segment.loss_weight for segment in window)

    def weights(self, window: Window, counts: Sequence[float]) -> list[float]:
        """Return the policy's loss weight for a step times how many count, over their sum."""
        parts = [
            count * segment.loss_weight / (segment.stop - segment.start)
            for segment, count in zip(window, counts, strict=True)
        ]
        total = sum(parts)
        return [part / total for part in parts]


@dataclass(frozen=True)
class PerSequence:
    """One optimizer step for a batch, on the mean loss over all counting time steps of the whole sequence.

    The loss weights of the truncation policy matter only in being 0 or not: they exist to balance steps that are taken
    inside a sequence, and here none is.
    """

    def closes(self, windows: int, ends_batch: bool, ends_epoch: bool) -> bool:
        """Return whether the batch ends."""
        return ends_batch

    def expected(self, first_steps: int, length: int) -> float:
        """Return the length of the sequence."""
        return length

    def scale(self, window: Window) -> float:
        """Return 1."""
        return 1.0

    def weights(self, window: Window, counts: Sequence[float]) -> list[float]:
        """Return the share of each segment in the counting steps of the window."""
        total = sum(counts)
        return [count / total for count in counts]


def as_accumulation(gradient_accumulation_steps: Any) -> Accumulation:
    """Return the accumulation that the argument stands for.

    Raises:
        TypeError: it is neither an int nor a string.
        ValueError: it is an int below 1, or a string other than "sequence".
    """
    if isinstance(gradient_accumulation_steps, str):
        if gradient_accumulation_steps == "sequence":
            return PerSequence()
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


@dataclass
class SharedStep:
    """The windows of one optimizer step, as far as they have been run.

    Attributes:
        windows: how many they are.
        steps: time steps that count in them, in the unit of `loss_weight`.
        scale: sum of their scales, over those that have a loss.
        scaled: number of those.
        expected: time steps that all windows of the step would have.
        outputs: what the handlers that look at the gradients get as output.
    """

    windows: int = 0
    steps: float = 0.0
    scale: float = 0.0
    scaled: float = 0.0
    expected: float = 0.0
    outputs: Any = None


class Reduction(Protocol):
    """Knows what the loss of a window is: how losses are put together, over windows and over ranks.

    How many steps count is known only when the last window has been run. So losses are divided by what is expected
    before backward, where gradients keep their magnitude, and the gradients are corrected once by the factor that
    remains.
    """

    def combine(self, losses: Sequence[Any], weights: Sequence[float]) -> Any:
        """Return the loss of a window from those of its segments; None stands for a segment without a loss."""
        ...

    def factor(self, steps: float, step: SharedStep) -> float:
        """Return the factor on the loss of one of several windows of a step, of which `steps` time steps count."""
        ...

    def correction(self, mean_steps: float, scale: float, step: SharedStep) -> float:
        """Return the factor on the gradients when all windows have been run.

        Args:
            mean_steps: time steps that counted, mean over the ranks.
            scale: scale of the step.
            step: the step.
        """
        ...


class MeanLoss:
    """A loss that is a mean over the time steps that count: a step is taken on the mean over those of all windows."""

    def combine(self, losses: Sequence[Any], weights: Sequence[float]) -> Any:
        """Return the weighted sum."""
        terms = [
            loss if weight == 1.0 else weight * loss
            for weight, loss in zip(weights, losses, strict=True)
            if loss is not None
        ]
        return terms[0] if len(terms) == 1 else sum(terms)

    def factor(self, steps: float, step: SharedStep) -> float:
        """Return the share of the window in the steps that are expected."""
        return steps / step.expected

    def correction(self, mean_steps: float, scale: float, step: SharedStep) -> float:
        """Return what makes the mean over the expected steps one over those that counted."""
        return scale * step.expected / mean_steps


class SumLoss:
    """A loss that is a sum, as its ``reduction="sum"`` says: a step is taken on the sum over its windows."""

    def combine(self, losses: Sequence[Any], weights: Sequence[float]) -> Any:
        """Return the sum."""
        return MeanLoss().combine(losses, [1.0] * len(losses))

    def factor(self, steps: float, step: SharedStep) -> float:
        """Return 1."""
        return 1.0

    def correction(self, mean_steps: float, scale: float, step: SharedStep) -> float:
        """Return 1."""
        return 1.0


def reduction_of(loss_fn: Any) -> Reduction:
    """Return the reduction of a loss function, by its attribute or bound argument `reduction`; a mean without one."""
    said = getattr(loss_fn, "reduction", None)
    if said is None:
        said = getattr(loss_fn, "keywords", {}).get("reduction") if hasattr(loss_fn, "func") else None
    return SumLoss() if isinstance(said, str) and said == "sum" else MeanLoss()


@dataclass(frozen=True)
class OptimizerStep:
    """The optimizer and its gradient scaler, used in the one right order.

    Args:
        optimizer: steps the parameters.
        scaler: gradient scaler, or None.
        modules: what the losses lead to besides the parameters of the optimizer, whose gradients are corrected, too.

    Raises:
        TypeError: it is no optimizer, or one that evaluates the loss itself, as LBFGS does.
    """

    optimizer: Any
    scaler: Any = None
    modules: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, type) or not (
            hasattr(self.optimizer, "zero_grad") and hasattr(self.optimizer, "step")
        ):
            raise TypeError(
                f"optimizer must be an optimizer, torch.optim.SGD(model.parameters(), lr=0.1) say, got "
                f"{self.optimizer!r}: the order is model, optimizer, loss_fn, tbtt_step."
            )
        if isinstance(self.optimizer, torch.optim.Optimizer):
            closure = inspect.signature(self.optimizer.step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                raise TypeError(
                    f"optimizer must step without a closure, got {type(self.optimizer).__name__}: it evaluates the "
                    "loss several times in a step, and a window is run once. Give SGD, Adam or another first-order one."
                )

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
            torch.clear_autocast_cache()  # of an autocast around the run, whose casts are those of the old weights
            return True
        self.scaler.unscale_(self.optimizer)
        scale_before = self.scaler.get_scale()
        try:
            if gradients_ready is not None and not gradients_ready():
                return False
            self.scaler.step(self.optimizer)
            torch.clear_autocast_cache()
        finally:
            # Also when no step is taken or a handler raises: a scaler left unscaled refuses the next unscale_().
            self.scaler.update()
        return bool(self.scaler.get_scale() >= scale_before)

    def _rescale(self, factor: float) -> None:
        parameters = {id(p): p for group in self.optimizer.param_groups for p in group["params"]}
        for module in self.modules:
            if isinstance(module, torch.nn.Module):
                parameters.update((id(parameter), parameter) for parameter in module.parameters())
        for parameter in parameters.values():
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
