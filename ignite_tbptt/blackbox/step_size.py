"""How far x is moved: a step for each element, or one step along a direction that moves all of them.

The idea: truncation asks for a small step and round-off for a large one; the best balance depends on the precision of
the numbers and on the order of the formula. Steps are powers of two, so that ``x + h`` is exact for most x; whoever
divides by them still uses the step as realised. Pairs with any stencil and any directions; bounds wrap any other step
size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ignite_tbptt.blackbox.stencil import Stencil

__all__ = ["AbsoluteStep", "BoundedStep", "RelativeStep", "StepSize", "Steps", "require_positive"]

# Below a quarter of the step that was asked for, round-off would cost more digits than a one-sided formula does.
_SHRINK_AT_MOST = 0.25


class Steps(NamedTuple):
    """Steps for the elements of one tensor.

    Attributes:
        sizes: steps in the shape of x, never 0; negative where the formula is to be turned round.
        one_sided: True where only the side that the sign of the step points to is free; None where both are everywhere.
    """

    sizes: Tensor
    one_sided: Tensor | None = None


class StepSize(Protocol):
    """Chooses steps; a frozen dataclass of what it needs to know."""

    def each(self, x: Tensor, stencil: Stencil, eps: float, position: int = 0) -> Steps:
        """The step of every element of x.

        Args:
            x: the point, a tensor of floats.
            stencil: the formula that the steps are for.
            eps: distance from 1 to the next number, in the coarser of the precisions of x and f(x).
            position: which of the tensors that require grad x is.
        """
        ...

    def along(
        self, xs: Sequence[Tensor], stencil: Stencil, eps: float, scale: float, positions: Sequence[int]
    ) -> float:
        """One step for directions that move all elements of all tensors, none by more than `scale` steps.

        `positions` says which of the tensors that require grad each is.
        """
        ...

    def inside(self, x: Tensor, position: int) -> Tensor:
        """The nearest point at which f may be evaluated, x itself where there are no bounds."""
        ...


@dataclass(frozen=True)
class RelativeStep:
    """``factor * max(1, |x|)``, rounded to a power of two.

    Example:
        >>> import torch
        >>> from ignite_tbptt.blackbox.stencil import central
        >>> RelativeStep().each(torch.tensor([0.0, 100.0]), central(), eps=2.0**-23).sizes
        tensor([0.0039, 0.5000])

    Args:
        factor: None takes ``eps ** (1 / (order + 1))``, where the truncation of a function with derivatives of order 1
            meets its round-off (Dennis and Schnabel 1983, section 5.4): 3.5e-4, 4.9e-3, 4.1e-2 for the orders 1, 2, 4
            in float32 and 1.5e-8, 6.1e-6, 7.4e-4 in float64.

    Raises:
        ValueError: a factor that is not positive and finite.
    """

    factor: float | None = None

    def __post_init__(self) -> None:
        if self.factor is not None:
            require_positive("factor", self.factor, "leave it out for the step that suits the precision")

    def each(self, x: Tensor, stencil: Stencil, eps: float, position: int = 0) -> Steps:
        """See `StepSize.each`."""
        # half a power goes up: truncation then costs twice what it might, round-off half
        factor = self._factor(stencil, eps) * _HALF_UP
        return Steps(_power_of_two_below(x.abs().clamp_(min=1.0).mul_(factor)))

    def along(
        self, xs: Sequence[Tensor], stencil: Stencil, eps: float, scale: float, positions: Sequence[int]
    ) -> float:
        """See `StepSize.along`: the step that the largest element asks for, so that none is lost in rounding."""
        largest = max((float(x.abs().max()) for x in xs if x.numel()), default=1.0)
        return 2.0 ** math.floor(math.log2(self._factor(stencil, eps) * max(1.0, largest) * _HALF_UP))

    def inside(self, x: Tensor, position: int) -> Tensor:
        """See `StepSize.inside`."""
        return x

    def _factor(self, stencil: Stencil, eps: float) -> float:
        return float(eps ** (1 / (stencil.order + 1))) if self.factor is None else self.factor


@dataclass(frozen=True)
class AbsoluteStep:
    """The same step everywhere, as given: for a function with a known quantum, noise or scale.

    Args:
        h: the step, in the units of x.

    Raises:
        ValueError: a step that is not positive and finite.
    """

    h: float

    def __post_init__(self) -> None:
        require_positive("h", self.h, "RelativeStep() chooses a step by itself")

    def each(self, x: Tensor, stencil: Stencil, eps: float, position: int = 0) -> Steps:
        """See `StepSize.each`."""
        return Steps(torch.full_like(x, self.h, memory_format=torch.contiguous_format))

    def along(
        self, xs: Sequence[Tensor], stencil: Stencil, eps: float, scale: float, positions: Sequence[int]
    ) -> float:
        """See `StepSize.along`."""
        return self.h

    def inside(self, x: Tensor, position: int) -> Tensor:
        """See `StepSize.inside`."""
        return x


Bound = float | Tensor | tuple["float | Tensor | None", ...] | None


@dataclass(frozen=True, eq=False)
class BoundedStep:
    """Another step size, kept inside ``[lower, upper]``: a blackbox is never evaluated outside.

    A one-sided formula is turned to the side that has room. A two-sided one is shrunk, at most to a quarter, and beyond
    that replaced by a one-sided formula of the same order. Random directions move every element at once: their step
    shrinks to what the tightest element allows.

    Args:
        step_size: how far to go where there is room.
        lower: smallest x; a float, a tensor that broadcasts against x, or a tuple with an entry (or None) for each
            tensor that requires grad, in the order of the arguments. None for no bound.
        upper: largest x, likewise.

    Raises:
        ValueError: (when used) an element of x lies outside, or there is no room on either side.
    """

    step_size: StepSize
    lower: Bound = None
    upper: Bound = None

    def each(self, x: Tensor, stencil: Stencil, eps: float, position: int = 0) -> Steps:
        """See `StepSize.each`."""
        wanted = self.step_size.each(x, stencil, eps, position).sizes
        below, above = self._room(x, position)
        if not stencil.is_two_sided:
            # a backward formula goes down where its step is positive
            ahead, behind = (above, below) if max(stencil.offsets) > 0 else (below, above)
            size, turned = _towards_room(wanted, ahead, behind, stencil.reach)
            return Steps(torch.where(turned, -size, size))
        fitting = torch.minimum(below, above) / stencil.reach
        shrunk = torch.minimum(wanted, _power_of_two_below(fitting))
        one_sided = fitting < wanted * _SHRINK_AT_MOST
        if not bool(one_sided.any()):
            return Steps(shrunk)
        size, turned = _towards_room(wanted, above, below, stencil.one_sided().reach)
        return Steps(torch.where(one_sided, torch.where(turned, -size, size), shrunk), one_sided)

    def along(
        self, xs: Sequence[Tensor], stencil: Stencil, eps: float, scale: float, positions: Sequence[int]
    ) -> float:
        """See `StepSize.along`."""
        wanted = self.step_size.along(xs, stencil, eps, scale, positions)
        room = min(
            float(side.min())
            for x, position in zip(xs, positions, strict=True)
            if x.numel()
            for side in self._room(x, position)
        )
        fitting = room / (scale * stencil.reach)
        if fitting >= wanted:
            return wanted
        if fitting < wanted * _SHRINK_AT_MOST:
            raise ValueError(
                f"bounds leave random directions a step of {fitting:.3g} where {wanted:.3g} is needed: they move all "
                "elements at once, to both sides, and one of them is at its bound; use Coordinates(), which turn round"
            )
        return float(2.0 ** math.floor(math.log2(fitting)))

    def inside(self, x: Tensor, position: int) -> Tensor:
        """See `StepSize.inside`."""
        return x.clamp(self._bound("lower", x, position), self._bound("upper", x, position))

    def _room(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        below, above = x - self._bound("lower", x, position), self._bound("upper", x, position) - x
        for name, room in (("lower", below), ("upper", above)):
            if bool((room < 0).any()):
                worst = int(room.argmin())
                where, value = _spelled(worst, x), float(x.reshape(-1)[worst])
                raise ValueError(
                    f"{name} excludes x: element {where} of differentiated tensor {position} is {value:.6g}, "
                    f"{-float(room.min()):.3g} outside; clamp x before the call, or widen the bound"
                )
        if bool(((below + above) <= 0).any()):
            raise ValueError(
                f"lower and upper leave no room to move differentiated tensor {position}: they are equal somewhere; "
                "pass that input without requires_grad"
            )
        return below, above

    def _bound(self, name: str, x: Tensor, position: int) -> Tensor:
        bound = self.lower if name == "lower" else self.upper
        if isinstance(bound, tuple):
            if position >= len(bound):
                raise ValueError(
                    f"{name} has {len(bound)} entries, but there are more tensors that require grad; give one entry "
                    "for each, None for no bound"
                )
            bound = bound[position]
        if bound is None:
            bound = -math.inf if name == "lower" else math.inf
        tensor = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
        try:
            return tensor.expand(x.shape)
        except RuntimeError as error:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} does not broadcast against differentiated tensor {position} of "
                f"shape {tuple(x.shape)}; give a float, or a tuple with one entry for each tensor"
            ) from error


def _towards_room(wanted: Tensor, ahead: Tensor, behind: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """The step, no longer than the roomier side allows, and where that side is the one behind."""
    turned = (ahead < wanted * reach) & (behind > ahead)
    room = torch.where(turned, behind, ahead)
    return torch.minimum(wanted, _power_of_two_below(room / reach)), turned


# A little above sqrt(2), so that what is half a power up to rounding goes up.
_HALF_UP = 1.4143

# Without its mantissa a number is the power of two below it.
_EXPONENT = {torch.float32: (torch.int32, -(2**23)), torch.float64: (torch.int64, -(2**52))}


def _power_of_two_below(h: Tensor) -> Tensor:
    if h.dtype not in _EXPONENT:
        return torch.exp2(torch.log2(h).floor_())
    integer, mask = _EXPONENT[h.dtype]
    return h.view(integer).bitwise_and(mask).view(h.dtype)


def require_positive(name: str, value: float, instead: str) -> None:
    """Refuse a distance that x cannot be moved by.

    Raises:
        ValueError: the value is not positive and finite.
    """
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive, finite number, got {value!r}: x has to move; {instead}")


def _spelled(flat: int, x: Tensor) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(x.shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))
