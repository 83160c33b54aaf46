"""One call of a module as a function of a flat list of tensors, which is what finite differences need.

The tensors are those among the call's inputs, in the order of torch's pytree, and then the module's parameters that
require grad. Evaluations go through `torch.func.functional_call`, never through in-place moves of a weight, and start
from the `ModuleState` in which the call began. `module` makes these calls, from hooks or from a wrapper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ignite_tbptt import nest
from ignite_tbptt.blackbox.arguments import Arguments
from ignite_tbptt.blackbox.estimator import Estimator
from ignite_tbptt.blackbox.evaluation import EvaluationCount, Evaluator
from ignite_tbptt.blackbox.function import differentiable_call
from ignite_tbptt.blackbox.module_state import ModuleState

__all__ = ["Differencing", "ModuleCall", "tensors_of_call"]


@dataclass(frozen=True)
class Differencing:
    """How the gradients of a module are estimated, and where that is counted.

    Attributes:
        estimator: how; None for central differences.
        evaluator: where the evaluations run; None for one after the other.
        in_dims: the batch axis of each positional argument with independent rows, as in torch.vmap.
        out_dims: the batch axis of the outputs, where in_dims is given.
        count: evaluations and seconds.
    """

    estimator: Estimator | None = None
    evaluator: Evaluator | None = None
    in_dims: Any = None
    out_dims: int | Sequence[int] = 0
    count: EvaluationCount = field(default_factory=EvaluationCount)


class _Placeholder(Enum):
    # an enum member stays the same object through pickle and deepcopy
    TENSOR = "tensor"


_TENSOR = _Placeholder.TENSOR


class _Inputs:
    """The shape of one call's arguments: where the tensors were among the rest."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], owner: str) -> None:
        leaves, self._spec = tree_flatten((args, kwargs))
        for leaf in leaves:
            _refuse_closed(
                leaf, f"{owner}: an input", [tensor for tensor in nest.tensors(leaf) if tensor.requires_grad]
            )
        self.count = sum(isinstance(leaf, Tensor) for leaf in leaves)
        # placeholders where tensors were, so that the graph does not keep the caller's tensors alive
        self._rest = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments again, with other tensors in the places of these."""
        replacements = iter(tensors)
        leaves = [next(replacements) if leaf is _TENSOR else leaf for leaf in self._rest]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs


class ModuleCall:
    """One call of a module as a function of a flat list of tensors: those among its inputs, then its parameters."""

    def __init__(
        self,
        module: nn.Module,
        state: ModuleState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        owner: str,
        *,
        hooked: bool,
    ) -> None:
        self._module = module
        self._state = state
        self._inputs = _Inputs(args, kwargs, owner)
        self._owner = owner
        self._hooked = hooked
        self._parameters = [name for name, value in module.named_parameters() if value.requires_grad]

    def __call__(self, *tensors: Tensor) -> Any:
        """What the module returns with these tensors, in the state in which the call began."""
        args, kwargs = self._inputs.with_tensors(tensors)
        moved = dict(zip(self._parameters, tensors[self._inputs.count :], strict=True))
        with self._state.entered(self._module) as buffers:
            if self._hooked:
                return torch.func.functional_call(self._module, {**buffers, **moved}, args, kwargs)
            by_name = {f"module.{name}": tensor for name, tensor in {**buffers, **moved}.items()}
            return torch.func.functional_call(_BareForward(self._module), by_name, args, kwargs)

    def differentiable(self, outputs: Any, tensors: Sequence[Tensor], how: Differencing) -> Any:
        """The outputs of this call, with a ``grad_fn`` where any of the tensors requires grad."""
        for leaf in tree_flatten(outputs)[0]:
            _refuse_closed(leaf, f"{self._owner}: an output", list(nest.tensors(leaf)))
        return differentiable_call(
            self,
            tensors,
            estimator=how.estimator,
            evaluator=how.evaluator,
            in_dims=self._flat_in_dims(how.in_dims, tensors),
            out_dims=how.out_dims,
            names=[*(f"input {k}" for k in range(self._inputs.count)), *(f"parameter {n}" for n in self._parameters)],
            label=self._owner,
            count=how.count,
            outputs=tree_map(_detached, outputs),
            streams=self._state.streams,
        )

    def _flat_in_dims(self, in_dims: Any, tensors: Sequence[Tensor]) -> list[int | None] | None:
        if in_dims is None:
            return None
        args, kwargs = self._inputs.with_tensors(tensors)
        of_inputs = Arguments(self._module.forward, args, kwargs).flat_in_dims(in_dims)
        # all rows share the parameters
        return [*(of_inputs or ()), *[None] * len(self._parameters)]


class _BareForward(nn.Module):
    """Calls a module's forward without its hooks; exists because functional_call takes modules only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def tensors_of_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What a call depends on, in the order in which `ModuleCall` takes it."""
    inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    return [*inputs, *(parameter for parameter in module.parameters() if parameter.requires_grad)]


def _refuse_closed(leaf: Any, what: str, inside: list[Tensor]) -> None:
    if inside and not isinstance(leaf, Tensor):
        raise TypeError(
            f"{what} of type {type(leaf).__name__} holds tensors that a gradient has to reach, and finite differences "
            "cannot take it apart; use tensors, tuples, lists or dicts, or register the type with torch's pytree"
        )


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
