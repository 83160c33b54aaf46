"""Functions of one row: the truth is the same function with a loop over the rows inside."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ignite_tbptt.blackbox import (
    Blackbox,
    BlackboxError,
    CentralDifference,
    ForwardDifference,
    Journaled,
    SerialEvaluation,
    StackedEvaluation,
    UntrustedGradientWarning,
    Workers,
    blackbox,
    blackbox_from_command,
)


def simulate(x: Any, scale: Any, w: Any) -> Any:
    """One row: x (3,), a number, and weights that all rows share."""
    assert x.shape == (3,)
    assert scale.shape == ()
    return {"path": np.cumsum(np.sin(x * w)) * scale, "end": float(scale * (x @ w))}


def in_a_loop(x: Any, scale: Any, w: Any) -> Any:
    rows = [simulate(one, s, w) for one, s in zip(x.T, scale, strict=True)]
    return {"path": np.stack([row["path"] for row in rows], 1), "end": np.array([row["end"] for row in rows])}


def inputs() -> list[Tensor]:
    x = torch.linspace(0.2, 2, 12, dtype=torch.float64).view(3, 4)
    return [
        t.requires_grad_() for t in (x, torch.tensor([1.0, 2, -1, 0.5]).double(), torch.tensor([1.0, 2, 3]).double())
    ]


def gradients(f: Any) -> list[Tensor]:
    x = inputs()
    out = f(*x)
    assert out["path"].shape == (3, 4)
    assert out["end"].shape == (4,)
    total = (out["path"] ** 2).sum() + out["end"].cos().sum()
    return [out["path"].detach(), *torch.autograd.grad(total, x)]


@pytest.mark.parametrize("way", ["blackbox", "Blackbox"])
@pytest.mark.parametrize("where", ["serial", "threads", "journal"])
def test_gradients_are_those_with_a_loop_inside(way: str, where: str, tmp_path: Path) -> None:
    make: Any = {"blackbox": blackbox, "Blackbox": Blackbox}[way]
    options: dict[str, Any] = {"numpy": True, "in_dims": (1, 0, None), "estimator": CentralDifference()}
    options["out_dims"] = (1, 0)
    truth = gradients(make(in_a_loop, executor=SerialEvaluation(), **options))
    with ThreadPoolExecutor(3) as pool:
        executor = {"serial": None, "threads": Workers(pool, retries=1), "journal": Journaled(tmp_path / "j", pool)}[
            where
        ]
        f = make(simulate, executor=executor, vectorized=False, **options)
        found = gradients(f)
    assert all(map(torch.equal, found, truth))
    # the points of a column of x in 4 rows, of the scale and of the weights
    assert f.nfev == 2 * (3 + 1 + 3)
    assert f.count.calls == 4 * f.nfev


def test_a_row_that_moves_costs_one_evaluation_of_that_row() -> None:
    calls: list[Tensor] = []

    def row(x: Tensor) -> Tensor:
        calls.append(x)
        return (x**2).sum().detach()

    f = blackbox(row, in_dims=0, vectorized=False, estimator=ForwardDifference())
    x = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(4):  # verified at gradients 1, 2 and 4
        calls.clear()
        (gradient,) = torch.autograd.grad(f(x).sum(), x)
        if _ == 2:
            assert len(calls) == 5 * (1 + 3)
    assert torch.allclose(gradient, 2 * x, atol=1e-6)
    assert all(call.shape == (3,) for call in calls)


class Cell(nn.Module):
    """Of one row, with weights and a counter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2).double()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x.clone()
        return torch.from_numpy(np.tanh(self.layer(self.seen).detach().numpy()))


@pytest.mark.parametrize("pooled", [False, True])
def test_a_module_of_one_row(pooled: bool) -> None:
    cell = Cell()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3).requires_grad_()
    wanted = torch.autograd.grad(torch.tanh(cell.layer(x)).sum(), [x, *cell.layer.parameters()])
    with ThreadPoolExecutor(4) as pool:
        f = Blackbox(
            cell, in_dims=0, vectorized=False, executor=pool if pooled else None, estimator=CentralDifference()
        )
        found = torch.autograd.grad(f(x).sum(), [x, *cell.layer.parameters()])
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(found, wanted, strict=True))
    assert cell.calls == (0 if pooled else 4)


def test_a_program_that_knows_no_batches() -> None:
    program = "import sys; a, b = map(float, sys.argv[1:]); print(a * b, a + b)"
    with ThreadPoolExecutor(4) as pool:
        f = blackbox_from_command([sys.executable, "-S", "-c", program], in_dims=0, executor=pool)
        x = torch.tensor([[2.0, 3.0], [4.0, 5.0]], dtype=torch.float64, requires_grad=True)
        out = f(x)
        out[:, 0].sum().backward()
    assert torch.equal(out, torch.tensor([[6.0, 5.0], [20.0, 9.0]], dtype=torch.float64))
    assert torch.allclose(x.grad, x.detach().flip(1))  # type: ignore[arg-type]


def test_a_row_that_fails_is_named_or_lost_alone() -> None:
    def row(x: Any) -> Any:
        if x[0] > 2:
            raise OSError("diverged")
        return x**2

    start = torch.tensor([[1.0, 0.5], [2.0, 0.5], [0.5, 0.5]], dtype=torch.float64)
    options: dict[str, Any] = {"numpy": True, "in_dims": 0, "vectorized": False, "estimator": CentralDifference()}
    with pytest.raises(OSError, match="diverged"):
        blackbox(row, **options)(start + 1)
    x = start.clone().requires_grad_()
    with pytest.raises(BlackboxError, match=r"row raised OSError: diverged\s+in evaluation \d+, at row \d, "):
        blackbox(row, **options)(x).sum().backward()
    with ThreadPoolExecutor(2) as pool:
        f = blackbox(row, executor=Workers(pool, failed="nan"), **options)
        with (
            pytest.raises(OSError, match="diverged"),
            pytest.warns(UntrustedGradientWarning, match="1 of 3 evaluations"),
        ):
            f(start + 1)
        with pytest.warns(UntrustedGradientWarning, match=r"\d of \d+ evaluations were lost"):
            f(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * start, rtol=1e-5)
    assert torch.allclose(x.grad[[0, 2]], 2 * start[[0, 2]], rtol=1e-9)  # from both sides


def test_rows_of_different_kinds() -> None:
    def ragged(x: Any) -> Any:
        return np.zeros(2 if x[0] > 1 else 3) + x.sum()

    def worded(x: Any) -> Any:
        return x * 2, "large" if x[0] > 1 else "small"

    x = torch.tensor([[0.5, 1.0], [2.0, 1.0]])
    options: dict[str, Any] = {"numpy": True, "in_dims": 0, "vectorized": False}
    with pytest.raises(BlackboxError, match=r"row 1 gave shape \(2,\) instead of \(3,\) .* compared with row 0"):
        blackbox(ragged, **options)(x)
    with pytest.raises(BlackboxError, match="row 1 gave other values beside its numbers, compared with row 0"):
        blackbox(worded, **options)(x)
    with pytest.raises(ValueError, match=r"out_dims puts the rows of <lambda> at axis 2, but output 0 .* \(2,\)"):
        blackbox(lambda x: x * 2, out_dims=2, **options)(x)
    with pytest.raises(ValueError, match="out_dims has 2 entries for 1 outputs of <lambda>"):
        blackbox(lambda x: x * 2, out_dims=(0, 0), **options)(x)
    with pytest.raises(ValueError, match="<lambda> was given a batch of no rows, and vectorized=False"):
        blackbox(lambda x: x * 2, **options)(x[:0])


def test_random_numbers_are_refused() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x * torch.rand(())

    f = blackbox(noisy, in_dims=0, vectorized=False)
    with pytest.raises(BlackboxError, match="it draws random numbers, and rows that are evaluated one by one"):
        f(torch.ones(2, 3, requires_grad=True)).sum().backward()


def test_what_contradicts() -> None:
    for make in (blackbox, Blackbox):
        with pytest.raises(ValueError, match=r"vectorized=False evaluates rows one by one, and .*: give in_dims"):
            make(torch.sin, vectorized=False)
        with pytest.raises(ValueError, match="vectorized=False evaluates one row a call, and Stacked"):
            make(torch.sin, in_dims=0, vectorized=False, executor=StackedEvaluation())
