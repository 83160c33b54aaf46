"""Evaluations shared by the ranks of a process group: each runs some, and all have the results.

The idea: ranks that hold the same model and the same inputs ask for the same evaluations. Each runs every n-th of them,
and one exchange gives all results to all ranks, so that every rank goes on with the same gradient. What the ranks ask
for is compared in the same exchange. Pairs with every estimator; random directions are the same on all ranks then.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from ignite_tbptt.blackbox.journal import bytes_of
from ignite_tbptt.blackbox.task import Result, Task
from ignite_tbptt.random_streams import RandomStreams

__all__ = ["OverRanks"]


@dataclass(frozen=True, eq=False)
class OverRanks:
    """An executor of evaluations that ranks with the same inputs share.

    Example::

        simulate = blackbox(simulator, numpy=True, executor=OverRanks())
        loss = simulate(x).sum()  # the same x on every rank
        loss.backward()  # each rank runs its share of the evaluations, and has the whole gradient

    Every rank of the group has to take the gradient, with the same inputs and the same seeds. The gradient is bit for
    bit the one that a rank by itself would have. Ranks with data of their own, under DistributedDataParallel say, have
    nothing to share: each of them evaluates its own. Each rank makes the forward call itself, unless its rows are
    evaluated one by one. `EvaluationCount` counts the evaluations of all ranks.

    Args:
        group: a process group of ``torch.distributed``; all ranks by default.

    Raises:
        RuntimeError: when used: there is no process group, or this rank is not in it.
        ValueError: when used, on every rank: the group has one rank, or its ranks hold different inputs.
    """

    group: Any = None

    alike_on_all_ranks = True

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterator[Result]:
        """See `Executor`."""
        own, count = self._place()
        asked = list(tasks)
        mine = [_watched(function, task) for task in asked[own::count]]
        everyone: list[Any] = [None] * count
        dist.all_gather_object(everyone, (_digest(asked), mine), self.group)
        digests = [digest for digest, _ in everyone]
        if len(set(digests)) > 1:
            others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise ValueError(
                f"ranks {others} of the group hold other inputs of {asked[0].program.label if asked else 'it'}, or "
                "other random numbers, than rank 0: OverRanks shares the evaluations of one gradient; give all ranks "
                "the same inputs and the same seeds of torch, numpy and random, or leave OverRanks out where each has "
                "data of its own"
            )
        shares = [iter(share) for _, share in everyone]
        return (next(shares[number % count]) for number in range(len(asked)))

    def _place(self) -> tuple[int, int]:
        """This rank, and how many there are."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "OverRanks shares evaluations between ranks, and torch.distributed is not initialized: call "
                "torch.distributed.init_process_group first, or use a ProcessPoolExecutor on one machine"
            )
        own, count = dist.get_rank(self.group), dist.get_world_size(self.group)
        if own < 0:
            raise RuntimeError(f"rank {dist.get_rank()} is not in the group of OverRanks: take gradients on its ranks")
        if count < 2:
            raise ValueError(
                "OverRanks got a group of one rank, which has nobody to share with: start two or more, or leave it out"
            )
        return own, count


def _watched(function: Callable[[Task], Result], task: Task) -> Result:
    """Evaluate; whether random numbers are drawn is told to all ranks with the result."""
    if task.streams is not None:
        return replace(function(task), drew=True)
    streams = RandomStreams.latest()
    result = function(task)
    return replace(result, drew=result.drew_since(streams))


def _digest(tasks: list[Task]) -> bytes:
    """Equal where ranks ask for the same evaluations: every point holds all of x but for one move."""
    digest = hashlib.sha256(str(len(tasks)).encode())
    for task in tasks[:1] + tasks[-1:]:
        held = [tensor for state in task.program.states for tensor in state.tensors]
        for tensor in (*task.points, *held):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor))
        if task.streams is not None:
            digest.update(bytes_of(task.streams.torch_cpu))
            digest.update(pickle.dumps((task.streams.python, task.streams.numpy_legacy)))
    return digest.digest()
