"""What each of two ranks does in the cases of test_over_ranks: python -m tests.blackbox.two_ranks FOLDER."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import Tensor

from ignite_tbptt.blackbox import (
    SPSA,
    BlackboxError,
    CentralDifference,
    FiniteDifferenceGradients,
    OverRanks,
    blackbox,
)
from tests.blackbox.executor_contract import CASES, gradients


def shared(fn: Callable[[Tensor], Tensor], x: Tensor, group: Any = None) -> Tensor:
    f = blackbox(fn, executor=OverRanks(group), estimator=CentralDifference())
    x = x.clone().requires_grad_()
    f(x).sum().backward()
    assert x.grad is not None
    return x.grad


def each_runs_its_share(rank: int) -> Any:
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin()

    f = blackbox(counted, executor=OverRanks(), estimator=CentralDifference())
    x = torch.linspace(0, 1, 10).double().requires_grad_()
    for _ in range(3):  # nothing is verified at the third
        calls.clear()
        f(x).sum().backward()
    return torch.tensor([len(calls), f.nfev])


def drawn_on_one_rank(rank: int) -> Any:
    """Rank 0 alone evaluates the point whose evaluation draws, and both have to take the gradient again."""

    def fn(x: Tensor) -> Tensor:
        noise = random.random() if float(x[0]) > 1 else 0.0
        return x * (1 + noise)

    random.seed(0)
    return shared(fn, torch.ones(3, dtype=torch.float64)), random.random()


def other_inputs(rank: int) -> Any:
    return shared(torch.sin, torch.full((3,), 1.0 + rank))


def other_seeds(rank: int) -> Any:
    torch.manual_seed(rank)
    try:
        return shared(lambda x: x * torch.rand(3), torch.ones(3))
    finally:
        torch.manual_seed(0)


def raises_away_from_x(rank: int) -> Any:
    def picky(x: Tensor) -> Tensor:
        if float(x[1]) > 1:
            raise ArithmeticError("no convergence")
        return x * 2

    return shared(picky, torch.ones(3))


def group_of_one(rank: int) -> Any:
    groups = [dist.new_group([each]) for each in range(2)]
    return shared(torch.sin, torch.ones(3), groups[rank])


class _Sum(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gains = torch.nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.gains * x).sum().detach()


def withheld_together(rank: int) -> Any:
    """The gradient of rank 1 alone is off."""
    model = torch.nn.Sequential(_Sum())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(engine: Engine, x: Tensor) -> None:
        model(x).backward()
        engine.fire_event(Events.GET_BATCH_STARTED)
        optimizer.step()

    trainer = Engine(step)
    handler = FiniteDifferenceGradients(model, "0", estimator=SPSA(1) if rank else CentralDifference(), certify=1)
    handler.withhold_steps(trainer, Events.GET_BATCH_STARTED, optimizer, above=0.3)
    with handler.attach(trainer):
        trainer.run([torch.ones(8)])
    return next(model.parameters()).detach()


def certified_together(rank: int) -> Any:
    f = blackbox(lambda x: x.exp().sum(), executor=OverRanks(), estimator=SPSA(2), certify=1)
    f(torch.ones(9, requires_grad=True)).backward()
    assert f.certificate is not None
    return torch.tensor([f.certificate.low, f.certificate.relative, f.certificate.high])


OWN: list[Callable[[int], Any]] = [
    each_runs_its_share,
    drawn_on_one_rank,
    other_inputs,
    other_seeds,
    raises_away_from_x,
    group_of_one,
    withheld_together,
    certified_together,
]


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    np.random.seed(0)
    random.seed(0)
    found: dict[str, Any] = {case: gradients(case, OverRanks()) for case in CASES}
    for case in OWN:
        try:
            found[case.__name__] = case(rank)
        except (ValueError, RuntimeError, BlackboxError) as error:
            found[case.__name__] = f"{type(error).__name__}: {error}"
    torch.save(found, Path(folder) / f"{rank}.pt")
    idist.barrier()


if __name__ == "__main__":
    with idist.launcher.Parallel(
        backend="gloo",
        nproc_per_node=2,
        init_method=f"file://{sys.argv[1]}/meeting",
        start_method="spawn",
        timeout=timedelta(seconds=60),
    ) as spawned:
        spawned.run(main, sys.argv[1])
