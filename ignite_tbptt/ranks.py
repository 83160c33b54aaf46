"""What ranks that average their gradients must agree on, so that a mismatch is an error on all of them and not a hang.

Such ranks meet in every backward pass that is followed by an optimizer step; one that does not come leaves the others
waiting. So they exchange a `Ballot` before it: a dozen numbers, one small collective for a step. Ranks whose models are
not wrapped for averaging (DistributedDataParallel, FSDP) need not agree, and exchange nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

Result = TypeVar("Result")

REFUSED = -1
"""The number of a rank that has none, because its batch was refused or its data have no length."""


class Stop(IntEnum):
    """How a rank leaves the common loop; the order is that of precedence."""

    NOT = 0
    END_EPOCH = 1
    TERMINATE = 2
    DONE = 3
    INTERRUPT = 4
    FAILED = 5


class Ballot(NamedTuple):
    """What a rank tells the others before a step, or when it leaves.

    Attributes:
        stop: whether it leaves, and how.
        epoch: its epoch.
        iteration: its iteration.
        windows: time iterations of its batch.
        steps: time steps that count in the windows of this step.
        scale: sum of the scales of those windows, over those that have a loss.
        scaled: number of windows that have a loss.
        listens: handlers look at its gradients, and may withhold the step.
    """

    stop: int = Stop.NOT
    epoch: int = 0
    iteration: int = 0
    windows: int = 0
    steps: float = 0.0
    scale: float = 0.0
    scaled: float = 0.0
    listens: bool = False


def own() -> int:
    """Return the number of this process among all."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class Ranks:
    """The ranks that average the gradients of `model`; only this process where none do."""

    def __init__(self, model: Any) -> None:
        self._wrappers = [] if not isinstance(model, nn.Module) else [m for m in model.modules() if _averages(m)]
        self._group: Any = getattr(self._wrappers[0], "process_group", None) if self._wrappers else None
        self.count: int = dist.get_world_size(self._group) if self._wrappers else 1
        self.run_is_over = self.epoch_is_over = self._in_backward = False

    # Collectives

    def gather(self, number: float) -> list[float]:
        """Return the number of every rank."""
        return [row[0] for row in self._gather([number])]

    def _gather(self, numbers: Sequence[float]) -> list[list[float]]:
        if self.count == 1:
            return [list(numbers)]
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self._device())
        rows = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(rows, tensor, group=self._group)
        gathered: list[list[float]] = torch.stack(rows).tolist()
        return gathered

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over the ranks."""
        if self.count == 1:
            return tensor
        total = tensor.to(self._device(), copy=True)
        dist.all_reduce(total, group=self._group)
        return total.to(tensor.device) / self.count

    def _device(self) -> torch.device:
        if dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _tell(self, message: str) -> list[str]:
        messages: list[Any] = [""] * self.count
        dist.all_gather_object(messages, message, group=self._group)
        return messages

    # Agreement

    def require_same(self, what: str, number: float) -> None:
        """Compare a number over the ranks.

        Raises:
            ValueError: on every rank, if they differ.
        """
        _require_same(what, self.gather(number))

    def all_or_none(self, what: str, work: Callable[[], Result]) -> Result:
        """Return what `work` returns, if it returns on every rank.

        Raises:
            RuntimeError: `work` raised on another rank; the message says which, and what. On a rank where it raised
                itself, that exception goes on.
        """
        if self.count == 1:
            return work()
        try:
            result = work()
        except Exception as error:
            self._tell(f"{type(error).__name__}: {error}")
            raise
        failed = [f"on rank {rank} by {error}" for rank, error in enumerate(self._tell("")) if error]
        if failed:
            raise RuntimeError(
                f"{what} was ended {'; '.join(failed)}. The other ranks stop with it, so as not to hang."
            )
        return result

    def vote(self, own: Ballot) -> list[Ballot]:
        """Exchange ballots.

        Returns:
            Those of all ranks. Where one of them ends the epoch or the run, this rank is to do so, too.

        Raises:
            ValueError: on every rank, if they are at different places.
            RuntimeError: on every rank, if one failed or was interrupted alone.
        """
        if self.count == 1:
            return [own]
        while True:
            ballots = [Ballot._make(row) for row in self._gather(own)]
            ended_earlier = any(b.stop == Stop.END_EPOCH and b.epoch < own.epoch for b in ballots)
            if not (own.stop == Stop.NOT and ended_earlier) and not (
                own.stop == Stop.DONE and any(b.stop == Stop.END_EPOCH for b in ballots)
            ):
                break  # else the epoch that another rank has ended early has ended here by itself
        stop = max(int(ballot.stop) for ballot in ballots)
        self.epoch_is_over |= stop == Stop.END_EPOCH
        self.run_is_over |= stop >= Stop.TERMINATE and stop != Stop.INTERRUPT
        if stop == Stop.FAILED:
            self._raise_failure(ballots)
        if stop == Stop.INTERRUPT and any(ballot.stop != stop for ballot in ballots):
            self.run_is_over = True
            raise RuntimeError(
                f"interrupt() was called on {_where(ballots, stop)} alone: the others cannot finish their batch "
                "without it. Call it on every rank at the same time."
            )
        if stop == Stop.DONE and any(ballot.stop == Stop.NOT for ballot in ballots):
            raise ValueError(
                f"the ranks have different numbers of batches: the data ended on {_where(ballots, stop)}, and the "
                "others go on. Ranks that average their gradients must run the same."
            )
        if stop == Stop.NOT:
            self._require_same_place(ballots)
        return ballots

    def fail(self, error: BaseException, iteration: int) -> None:
        """Tell the others that this rank raises `error`, instead of the ballot that they wait for."""
        if self.count > 1 and not (self.run_is_over or self._in_backward):
            self.run_is_over = True
            self._gather(Ballot(Stop.FAILED, iteration=iteration, windows=REFUSED))
            self._tell(f"{type(error).__name__}: {error}")

    def _raise_failure(self, ballots: Sequence[Ballot]) -> None:
        reasons = [f"rank {rank} by {reason}" for rank, reason in enumerate(self._tell("")) if reason]
        numbers = _by_rank([ballot.windows for ballot in ballots])
        raise RuntimeError(
            f"the run was ended on {'; '.join(reasons)}. The ranks would run different numbers of time iterations in "
            f"iteration {ballots[0].iteration:g}: {numbers} ({REFUSED}: none), so the others stop as well."
        )

    def _require_same_place(self, ballots: Sequence[Ballot]) -> None:
        try:
            _require_same("epochs", [ballot.epoch for ballot in ballots])
            _require_same("iterations", [ballot.iteration for ballot in ballots])
            what = f"time iterations in iteration {ballots[0].iteration:g}"
            _require_same(what, [ballot.windows for ballot in ballots])
        except ValueError:
            self.run_is_over = True
            raise

    # Synchronisation of gradients

    def synchronised(self, synchronise: bool) -> AbstractContextManager[Any]:
        """Return the context for forward and backward of a window, in which gradients are averaged or only added up."""
        if synchronise or self.count == 1:
            return nullcontext()
        stack = ExitStack()
        for wrapper in self._wrappers:
            no_sync: Any = getattr(wrapper, "no_sync", nullcontext)
            stack.enter_context(no_sync())
        return stack

    def backward(self, run: Callable[[], None]) -> None:
        """Run a backward pass; an exception inside of it leaves the ranks at no place where they could still agree."""
        self._in_backward = True
        run()
        self._in_backward = False


def _averages(module: nn.Module) -> bool:
    """Return whether a module averages gradients over ranks."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return True
    names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.distributed")}
    return bool(names & {"FullyShardedDataParallel", "FSDPModule"})


def _where(ballots: Sequence[Ballot], stop: int) -> str:
    return ", ".join(f"rank {rank}" for rank, ballot in enumerate(ballots) if ballot.stop == stop)


def _by_rank(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g} on rank {rank}" for rank, number in enumerate(numbers))


def _require_same(what: str, numbers: Sequence[float]) -> None:
    if len(set(numbers)) > 1:
        raise ValueError(
            f"the ranks would run different numbers of {what}: {_by_rank(numbers)} ({REFUSED}: none, the batch was "
            "refused or has no length there). Ranks that average their gradients must run the same: give them batches "
            "of one length and the same tbtt_step (ContiguousStreams gives each rank an equal share)."
        )
