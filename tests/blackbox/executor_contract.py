"""What every executor has to give bit for bit as the caller's thread does: one list of cases, for all of them.

An executor that lives elsewhere, between ranks say, imports `CASES` and compares with ``gradients(case, map)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ignite_tbptt.blackbox import SPSA, Blackbox, CentralDifference, ForwardDifference, blackbox
from tests.blackbox.slow_programs import (
    Simulator,
    cumulated,
    decorated,
    noisy_away_from_one,
    noisy_wave,
    of_many,
    recurrent,
    rooted,
    wave,
)

Case = Callable[[Any], list[Tensor]]


def gradients(case: str, executor: Any) -> list[Tensor]:
    """The gradients of a case, and a number drawn after them: random streams go on as if nothing had been."""
    torch.manual_seed(0)
    return [*CASES[case](executor), torch.rand(3)]


def _of(fn: Any, *inputs: Tensor, **options: Any) -> Case:
    def case(executor: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        f: Any = blackbox(fn, executor=executor, **{"numpy": True, "estimator": CentralDifference(), **options})
        return [g for _ in range(2) for g in torch.autograd.grad(f(*leaves).sum(), leaves)]

    return case


def _window(executor: Any) -> list[Tensor]:
    inputs = torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2)
    gain, found = torch.ones(2, dtype=torch.float64, requires_grad=True), list[Tensor]()
    f: Any = blackbox(recurrent, numpy=True, executor=executor, estimator=CentralDifference())
    for start in range(2):
        h = torch.full((2,), float(start), dtype=torch.float64)
        for x in inputs:
            h = f(x * gain, h * gain)
        found += torch.autograd.grad(h.sum(), gain)
    return found


def _module(executor: Any) -> list[Tensor]:
    module = Simulator()
    f = Blackbox(module, executor=executor, estimator=CentralDifference())
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3).requires_grad_()
    leaves, found = [x, *module.layer.parameters()], list[Tensor]()
    for _ in range(2):
        total = f(x).sum() + f(x * 2).sum()  # the buffer has counted in between
        found += torch.autograd.grad(total, leaves)
    return found


def _many_tensors(executor: Any) -> list[Tensor]:
    """4,800 tensors at a time: more than a process may hold open files, were each sent as one."""
    inputs = [torch.full((2,), 1.01, dtype=torch.float64, requires_grad=True) for _ in range(40)]
    f = blackbox(of_many, executor=executor, estimator=CentralDifference())
    return list(torch.autograd.grad(f(inputs).sum(), inputs))


_X = torch.linspace(0.2, 2, 12, dtype=torch.float64).view(4, 3)
_W = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
_OF_TENSORS = {"numpy": False}
_DECORATED: Any = decorated

CASES: dict[str, Case] = {
    "coupled outputs": _of(cumulated, _X),
    "independent rows": _of(wave, _X, _W, in_dims=(0, None)),
    "random directions": _of(wave, _X, _W, estimator=SPSA(3)),
    "the other side of x": _of(rooted, torch.tensor([0.0, 0.5, 2.0]).double(), estimator=ForwardDifference()),
    "random numbers": _of(noisy_wave, _X, **_OF_TENSORS),
    "random numbers away from x alone": _of(noisy_away_from_one, torch.ones(3).double(), **_OF_TENSORS),
    "a decorated function": _of(_DECORATED.__wrapped__, torch.ones(2).double(), **_OF_TENSORS),
    "a window of calls": _window,
    "many tensors": _many_tensors,
    "a module": _module,
}
