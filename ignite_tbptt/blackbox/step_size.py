"""How far x is moved: a step for each element, or one step along a direction that moves all of them.

Truncation asks for a small step and round-off for a large one; the best balance depends on the precision of the numbers
and on the order of the formula. Chosen steps are powers of two, so that ``x + h`` is exact for most x; whoever divides
by them still uses the step as realised. Pairs with any stencil and any directions; bounds wrap any other step size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ignite_tbptt.blackbox.stencil import Stencil

__all__ = [
    "AbsoluteStep",
    "BoundedStep",
    "PerInputStep",
    "RelativeStep",
    "StepSize",
    "Steps",
    "require_positive",
    "require_step_size",
    "steps_around",
    "unbounded",
]


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

    def inside(self, x: Tensor, position: int) -> Tensor:
        """The nearest point at which f may be evaluated, x itself where there are no bounds."""
        ...


@dataclass(frozen=True)
class RelativeStep:
    """``factor * max(floor, |x|)``, rounded to a power of two.

    Example:
        >>> import torch
        >>> from ignite_tbptt.blackbox.stencil import central
        >>> RelativeStep().each(torch.tensor([0.0, 100.0]), central(), eps=2.0**-23).sizes
        tensor([0.0039, 0.5000])
        >>> RelativeStep(floor=1e-9).each(torch.tensor([1e-9, 1e-12]), central(), eps=2.0**-23).sizes
        tensor([3.6380e-12, 3.6380e-12])

    Args:
        factor: None takes ``eps ** (1 / (order + 1))``, where the truncation of a function with derivatives of order 1
            meets its round-off (Dennis and Schnabel 1983, section 5.4): 3.5e-4, 4.9e-3, 4.1e-2 for the orders 1, 2, 4
            in float32 and 1.5e-8, 6.1e-6, 7.4e-4 in float64. A tensor gives each element its own; it broadcasts
            against x.
        floor: the size below which x counts as this large. 0 makes the step purely relative: it is then refused for
            elements that are 0, which say nothing of their scale. A float, or a tensor that broadcasts against x.

    Raises:
        TypeError: a floor that is no number.
        ValueError: a factor that is not positive and finite, a negative floor; (when used) an element that is 0 where
            the floor is.
    """

    factor: float | Tensor | None = None
    floor: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if self.factor is not None:
            require_positive("factor", self.factor, "leave it out for the step that suits the precision")
        floor = _numbers("floor", self.floor)
        if not bool((floor >= 0).all() & floor.isfinite().all()):
            raise ValueError(
                f"floor must be finite and not negative, got {self.floor!r}: it is the size below which |x| counts as "
                "this large; 0 for none"
            )

    def each(self, x: Tensor, stencil: Stencil, eps: float, position: int = 0) -> Steps:
        """See `StepSize.each`."""
        # half a power goes up: truncation then costs twice what it might, round-off half
        factor = self._factor(x, stencil, eps, position) * _HALF_UP
        if isinstance(self.floor, Tensor):
            size = torch.maximum(x.abs(), _broadcast("floor", self.floor, x, position))
        else:
            size = x.abs().clamp_(min=self.floor)
        sizes = _power_of_two_below(size.mul_(factor))
        # with a floor every step is some; without, an element may be 0, or so small that its step is
        if isinstance(self.floor, Tensor) or self.floor < 1.0:
            _refuse_zero(sizes, x, position)
        return Steps(_refuse_lost("factor", sizes, x) if self.factor is not None else sizes)

    def inside(self, x: Tensor, position: int) -> Tensor:
        """See `StepSize.inside`."""
        return x

    @property
    def is_elementwise(self) -> bool:
        """Whether the step of an element depends on that element alone, not on its place."""
        return not isinstance(self.factor, Tensor) and not isinstance(self.floor, Tensor)

    def _factor(self, x: Tensor, stencil: Stencil, eps: float, position: int) -> float | Tensor:
        if self.factor is None:
            return float(eps ** (1 / (stencil.order + 1)))
        return _broadcast("factor", self.factor, x, position) if isinstance(self.factor, Tensor) else self.factor


@dataclass(frozen=True)
class AbsoluteStep:
    """The same step everywhere, as given: for a function with a known quantum, noise or scale.

    Args:
        h: the step, in the units of x. A tensor gives each element its own; it broadcasts against x.

    Raises:
        ValueError: a step that is not positive and finite; (when used) one that is lost in rounding next to x.
    """

    h: float | Tensor

    def __post_init__(self) -> None:
        require_positive("h", self.h, "RelativeStep() chooses a step by itself")

    def each(self, x: Tensor, stencil: Stencil, eps: float, position: int = 0) -> Steps:
        """See `StepSize.each`."""
        if isinstance(self.h, Tensor):
            sizes = _broadcast("h", self.h, x, position).clone(memory_format=torch.contiguous_format)
        else:
            sizes = torch.full_like(x, self.h, memory_format=torch.contiguous_format)
        return Steps(_refuse_lost("h", sizes, x))

    def inside(self, x: Tensor, position: int) -> Tensor:
        """See `StepSize.inside`."""
        return x

    @property
    def is_elementwise(self) -> bool:
        """Whether the step of an element depends on that element alone, not on its place."""
        return not isinstance(self.h, Tensor)


@dataclass(frozen=True)
class PerInputStep:
    """A step size for each input: for inputs whose scales or noise differ.

    Example:
        >>> import torch
        >>> from ignite_tbptt.blackbox.stencil import central
        >>> steps = PerInputStep((AbsoluteStep(0.5), RelativeStep(floor=0)))
        >>> steps.each(torch.ones(2), central(), eps=2.0**-23, position=0).sizes
        tensor([0.5000, 0.5000])

    Args:
        step_sizes: one for each tensor that requires grad, in the order of the arguments.

    Raises:
        TypeError: an entry is no step size.
        ValueError: (when used) there are more such tensors than entries.
    """

    step_sizes: tuple[StepSize, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.step_sizes, (tuple, list)):
            raise TypeError(
                f"step_sizes must be a tuple, got {self.step_sizes!r}: give a step size for each tensor that requires "
                "grad, or the step size itself where one suits all"
            )
        for number, step_size in enumerate(self.step_sizes):
            require_step_size(f"step_sizes[{number}]", step_size)

    def each(self, x: Tensor, stencil: Stencil, eps: float, position: int = 0) -> Steps:
        """See `StepSize.each`."""
        return self.of(position).each(x, stencil, eps, position)

    def inside(self, x: Tensor, position: int) -> Tensor:
        """See `StepSize.inside`."""
        return self.of(position).inside(x, position)

    def of(self, position: int) -> StepSize:
        """The step size of one input."""
        if position >= len(self.step_sizes):
            raise ValueError(
                f"step_sizes has {len(self.step_sizes)} entries, but there are more tensors that require grad; give "
                "one entry for each"
            )
        return self.step_sizes[position]


Bound = float | Tensor | tuple["float | Tensor | None", ...] | None


@dataclass(frozen=True, eq=False)
class BoundedStep:
    """Another step size, kept inside ``[lower, upper]``: a blackbox is never evaluated outside.

    A one-sided formula is turned to the side that has room, and its step is shrunk where neither has enough. Of a
    two-sided one either the step is shrunk, or a one-sided formula of the same order takes its place, whichever loses
    less to round-off and truncation. Random directions move every element at once: their step shrinks to what the
    tightest element allows. Bounds inside bounds hold all together.

    Args:
        step_size: how far to go where there is room.
        lower: smallest x; a float, a tensor that broadcasts against x, or a tuple with an entry (or None) for each
            tensor that requires grad, in the order of the arguments. None for no bound.
        upper: largest x, likewise.

    Raises:
        TypeError: step_size is none, or a bound is no number.
        ValueError: a bound that is NaN; (when used) an element of x lies outside, or there is no room on either side.
    """

    step_size: StepSize
    lower: Bound = None
    upper: Bound = None

    def __post_init__(self) -> None:
        require_step_size("step_size", self.step_size)
        for name, bound in (("lower", self.lower), ("upper", self.upper)):
            entries = bound if isinstance(bound, tuple) else (bound,)
            if any(entry is not None and bool(_numbers(name, entry).isnan().any()) for entry in entries):
                raise ValueError(f"{name} must not be NaN, got {bound!r}: nothing lies inside it; None for no bound")

    def each(self, x: Tensor, stencil: Stencil, eps: float, position: int = 0) -> Steps:
        """See `StepSize.each`."""
        # Inner bounds are part of `inside`: what they made of the step would hide the step that is wanted.
        sizes, kept_sides = unbounded(self.step_size, position).each(x, stencil, eps, position)
        wanted, sign = sizes.abs(), sizes.sign()
        below, above = _room(self, x, position)
        ahead, behind = torch.where(sign > 0, above, below), torch.where(sign > 0, below, above)
        if not stencil.is_two_sided:
            # a backward formula goes down where its step is positive
            if max(stencil.offsets) <= 0:
                ahead, behind = behind, ahead
            size, turned = _towards_room(wanted, ahead, behind, stencil.reach, kept_sides)
            return Steps(_refuse_lost("the room between lower and upper", torch.where(turned, -size, size) * sign, x))
        two_sided = torch.minimum(wanted, torch.minimum(below, above) / stencil.reach)
        one_sided_stencil = stencil.one_sided()
        size, turned = _towards_room(wanted, ahead, behind, one_sided_stencil.reach, kept_sides)
        one_sided = _loss(one_sided_stencil, size / wanted) < _loss(stencil, two_sided / wanted)
        if kept_sides is not None:
            one_sided |= kept_sides
        size = torch.where(one_sided, torch.where(turned, -size, size), two_sided) * sign
        _refuse_lost("the room between lower and upper", size, x)
        return Steps(size, one_sided if bool(one_sided.any()) else None)

    def inside(self, x: Tensor, position: int) -> Tensor:
        """See `StepSize.inside`."""
        x = self.step_size.inside(x, position)
        return x.clamp(self._bound("lower", x, position), self._bound("upper", x, position))

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
        return _broadcast(name, bound, x, position)


def steps_around(
    step_size: StepSize, x: Tensor, stencil: Stencil, eps: float, scale: float, position: int = 0
) -> Tensor:
    """The step of every element for directions in which all elements move at once, each in units of its own step.

    With ``x + offset * steps * d`` for a direction d the slope belongs to ``steps * gradient``: what it adds to the
    gradient is ``slope * d / steps``.

    Args:
        step_size: how far; see `StepSize.each` for x, stencil, eps and position.
        x: the point.
        stencil: the formula.
        eps: relative precision.
        scale: the largest entry of any direction, up to which all points stay inside the bounds.
        position: which of the tensors that require grad x is.

    Raises:
        ValueError: an element is so close to its bound that less than a quarter of its step is left.
    """
    wanted = unbounded(step_size, position).each(x, stencil, eps, position).sizes.abs()
    below, above = _room(step_size, x, position)
    fitting = torch.minimum(below, above) / (scale * stencil.reach)
    if bool((fitting < wanted / 4).any()):
        worst = int((fitting / wanted).argmin())
        raise ValueError(
            f"bounds leave random directions a step of {float(fitting.reshape(-1)[worst]):.3g} for element "
            f"{_spelled(worst, x)} of differentiated tensor {position}, where {float(wanted.reshape(-1)[worst]):.3g} "
            "is needed: they move all elements at once, to both sides; use Coordinates(), which turn round"
        )
    return torch.fmin(wanted, fitting)  # of an element that is NaN there is no room to speak of


def _room(step_size: StepSize, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """How far x may move down and up within all bounds, less what rounding might add."""
    lower = step_size.inside(torch.full_like(x, -math.inf), position)
    upper = step_size.inside(torch.full_like(x, math.inf), position)
    for name, outside in (("lower", lower - x), ("upper", x - upper)):
        if bool((outside > 0).any()):
            worst = int(outside.argmax())
            raise ValueError(
                f"{name} excludes x: element {_spelled(worst, x)} of differentiated tensor {position} is "
                f"{float(x.reshape(-1)[worst]):.6g}, {float(outside.max()):.3g} outside; clamp x before the call, "
                "or widen the bound"
            )
    if bool((lower >= upper).any()):
        raise ValueError(
            f"lower and upper leave no room to move differentiated tensor {position}: they are equal somewhere; "
            "pass that input without requires_grad"
        )
    # Differences, quotients and multiples of the step round by half an eps each.
    margin = 1 - 4 * torch.finfo(x.dtype).eps
    return (x - lower) * margin, (upper - x) * margin


def unbounded(step_size: StepSize, position: int) -> StepSize:
    """The step size of one input without its bounds."""
    while isinstance(step_size, (BoundedStep, PerInputStep)):
        step_size = step_size.step_size if isinstance(step_size, BoundedStep) else step_size.of(position)
    return step_size


def _towards_room(
    wanted: Tensor, ahead: Tensor, behind: Tensor, reach: int, kept_sides: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The step, no longer than the roomier side allows, and where that side is the one behind."""
    turned = (ahead < wanted * reach) & (behind > ahead)
    if kept_sides is not None:
        turned &= ~kept_sides
    return torch.minimum(wanted, torch.where(turned, behind, ahead) / reach), turned


def _loss(stencil: Stencil, share: Tensor) -> Tensor:
    """Truncation and round-off for a share of the step at which both are of one size, in units of that size."""
    return abs(stencil.error_constant) * share**stencil.order + stencil.amplification / share


# A little above sqrt(2), so that what is half a power up to rounding goes up.
_HALF_UP = 1.4143

# Without its mantissa a number is the power of two below it.
_EXPONENT = {torch.float32: (torch.int32, -(2**23)), torch.float64: (torch.int64, -(2**52))}


def _power_of_two_below(h: Tensor) -> Tensor:
    if h.dtype not in _EXPONENT:
        return torch.exp2(torch.log2(h).floor_())
    integer, mask = _EXPONENT[h.dtype]
    return h.view(integer).bitwise_and(mask).view(h.dtype)


def require_step_size(name: str, value: Any) -> None:
    """Refuse what does not choose steps.

    Raises:
        TypeError: the value is no `StepSize`.
    """
    if isinstance(value, type) or not (hasattr(value, "each") and hasattr(value, "inside")):
        instead = "make one, RelativeStep() say"
        if isinstance(value, (int, float, Tensor)):
            number = "t" if isinstance(value, Tensor) else repr(value)
            instead = f"give AbsoluteStep({number}), or RelativeStep({number}) for a step relative to x"
        raise TypeError(f"{name} must be a StepSize, got {value!r}: {instead}")


def require_positive(name: str, value: float | Tensor, instead: str) -> None:
    """Refuse a distance that x cannot be moved by.

    Raises:
        ValueError: the value, or one in the tensor, is not positive and finite.
    """
    number = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    if not number and not (isinstance(value, Tensor) and bool(((value > 0) & value.isfinite()).all())):
        raise ValueError(f"{name} must be a positive, finite number, got {value!r}: x has to move; {instead}")


def _refuse_zero(sizes: Tensor, x: Tensor, position: int) -> None:
    if bool((sizes == 0).any()):
        index = _spelled(int((sizes == 0).int().argmax()), x)
        raise ValueError(
            f"floor leaves no step to element {index} of differentiated tensor {position}: it is 0, or too small for a "
            "step relative to it; give as floor the size that counts as small there, RelativeStep(floor=...)"
        )


def _refuse_lost(name: str, sizes: Tensor, x: Tensor) -> Tensor:
    """The sizes; a step after which x is the same number would make the slope 0 / 0."""
    lost = (x + sizes == x) & x.isfinite()
    if bool(lost.any()):
        value, size = float(x[lost][0]), float(sizes[lost][0].abs())
        raise ValueError(
            f"{name} gives a step of {size:.3g}, which is lost in rounding next to an x of {value:.6g} in {x.dtype}; "
            f"take a larger step, {4 * torch.finfo(x.dtype).eps * abs(value):.2g} at least (RelativeStep() suits the "
            "precision), or evaluate in float64"
        )
    return sizes


def _numbers(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}") from error


def _broadcast(name: str, value: float | Tensor, x: Tensor, position: int) -> Tensor:
    """Values for the elements of x."""
    tensor = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    try:
        return tensor.expand(x.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} does not broadcast against differentiated tensor {position} of "
            f"shape {tuple(x.shape)}; give a float, or step sizes and bounds for each tensor (PerInputStep, a tuple)"
        ) from error


def _spelled(flat: int, x: Tensor) -> tuple[int, ...]:
    return tuple(int(k) for k in torch.unravel_index(torch.tensor(flat), x.shape))
