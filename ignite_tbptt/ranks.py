"""What the ranks of a distributed run must agree on before they start, so that a mismatch is an error and not a hang.

Ranks that average their gradients meet at every backward; one that runs fewer of them leaves the others waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ignite.distributed as idist
import torch

Result = TypeVar("Result")

REFUSED = -1
"""The number that a rank gives which has none, because its batch was refused or its data have no length."""


_MOST_CHARACTERS = 1000
"""Ignite gathers strings of up to 1024."""


def count() -> int:
    """Return the number of ranks."""
    return idist.get_world_size()


def own() -> int:
    """Return the number of this rank."""
    return idist.get_rank()


def gather(number: float) -> list[float]:
    """Return the number of every rank, in the order of ranks."""
    if count() == 1:
        return [number]
    numbers: Any = idist.all_gather(torch.tensor([float(number)], device=idist.device()))
    return [float(value) for value in numbers]


def mean_number(number: float) -> float:
    """Return the mean of a number over the ranks."""
    numbers = gather(number)
    return sum(numbers) / len(numbers)


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over the ranks."""
    if count() == 1:
        return tensor
    total: Any = idist.all_reduce(tensor.to(idist.device()))  # a sum
    return torch.as_tensor(total).to(tensor.device) / count()


def require_same(what: str, number: int) -> None:
    """Compare a number over the ranks.

    Raises:
        ValueError: on every rank, if they differ.
    """
    numbers = gather(number)
    if len(set(numbers)) > 1:
        raise ValueError(
            f"the ranks would run different numbers of {what}: {_by_rank(numbers)} ({REFUSED}: none, the batch was "
            "refused or has no length there). Ranks that average their gradients must run the same: give them batches "
            "of one length and the same tbtt_step (ContiguousStreams gives each rank an equal share)."
        )


def all_or_none(what: str, work: Callable[[], Result]) -> Result:
    """Return what `work` returns, if it returns on every rank.

    Where it raises on one, the others would go on and wait for it in vain.

    Raises:
        RuntimeError: `work` raised on another rank; the message says which, and what. On a rank where it raised
            itself, that exception goes on.
    """
    if count() == 1:
        return work()
    try:
        result = work()
    except Exception as error:
        idist.all_gather(f"{type(error).__name__}: {error}"[:_MOST_CHARACTERS])
        raise
    errors: Any = idist.all_gather("")
    failed = [f"on rank {rank} by {error}" for rank, error in enumerate(errors) if error]
    if failed:
        raise RuntimeError(f"{what} was ended {'; '.join(failed)}. The other ranks stop with it, so as not to hang.")
    return result


def _by_rank(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g} on rank {rank}" for rank, number in enumerate(numbers))
