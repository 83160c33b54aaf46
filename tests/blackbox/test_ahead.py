"""Evaluations that begin before their backward: the same bits, in less time, and nothing of what has changed since."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
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
    BoundedStep,
    CentralDifference,
    Journaled,
    RelativeStep,
    SerialEvaluation,
    UntrustedGradientWarning,
    Workers,
    bind,
    blackbox,
    node,
)


class Counted:
    """A simulator that knows where it was evaluated."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.calls, self.lock = seconds, 0, threading.Lock()

    def __call__(self, x: Any) -> Any:
        with self.lock:
            self.calls += 1
        time.sleep(self.seconds)
        return np.tanh(x) * x

    def settled(self) -> int:
        """How often it was called, when it is called no more."""
        before = -1
        while before != self.calls:
            before = self.calls
            time.sleep(0.05)
        return before


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def slope(x: Tensor) -> Tensor:
    return (x.tanh() + x * (1 - x.tanh() ** 2)).detach()


WRAPPED: dict[str, Any] = {
    "alone": lambda workers, path: {"executor": workers},
    "one at a time": lambda workers, path: {"executor": SerialEvaluation(executor=workers)},
    "rows": lambda workers, path: {"executor": workers, "in_dims": 0, "vectorized": False},
    "journal": lambda workers, path: {"executor": Journaled(path, workers)},
    "progress": lambda workers, path: {"executor": workers, "progress": True},
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_evaluations_are_there_before_the_backward(wrapped: str, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    simulator, x = Counted(), leaf(0.3, -0.7)
    f = blackbox(
        simulator,
        numpy=True,
        estimator=CentralDifference(),
        **WRAPPED[wrapped](Workers(pool, ahead=True), tmp_path / "journal"),
    )
    torch.autograd.grad(f(x).sum(), x)  # the first gradient verifies; so do the second and the fourth
    torch.autograd.grad(f(x + 0.1).sum(), x)
    rows = 2 if wrapped == "rows" else 1
    points = 4 // rows  # each column of a row, both ways
    start = simulator.settled()
    y = f(x + 0.2)
    assert simulator.settled() - start == rows * (1 + points)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert simulator.settled() - start == rows * (1 + points)
    assert torch.allclose(found, slope(x + 0.2), rtol=1e-8)
    assert f.nfev == 3 * points


def test_calls_that_no_backward_reaches_stop_with_their_graph() -> None:
    simulator, x = Counted(0.01), leaf(*range(20))
    with ThreadPoolExecutor(1) as pool:
        f = blackbox(simulator, numpy=True, estimator=CentralDifference(), executor=Workers(pool, ahead=True))
        torch.autograd.grad(f(x).sum(), x)
        start = simulator.calls
        y = f(x)
        del y
        assert simulator.settled() - start < 10  # of 41
        (found,) = torch.autograd.grad(f(x).sum(), x)
    assert torch.allclose(found, slope(x), rtol=1e-8)


def test_random_numbers_of_the_rest_of_the_model_are_told_from_those_of_the_function(pool: ThreadPoolExecutor) -> None:
    simulator, x = Counted(), leaf(0.3, -0.7)
    f = blackbox(simulator, numpy=True, estimator=CentralDifference(), executor=Workers(pool, ahead=True))
    torch.autograd.grad(f(x).sum(), x)

    def dropped() -> tuple[Tensor, Tensor]:
        y = f(x)
        kept = nn.functional.dropout(torch.ones(2, dtype=torch.float64))
        return torch.autograd.grad((y * kept).sum(), x)[0], slope(x) * kept

    with pytest.warns(UntrustedGradientWarning, match="ahead=True gains nothing for Counted on threads") as warned:
        found, truth = dropped()
    assert warned[0].filename == __file__
    assert torch.allclose(found, truth, rtol=1e-8)
    start = simulator.settled()
    y = f(x)
    assert simulator.settled() - start == 1
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], slope(x), rtol=1e-8)


def test_a_function_that_begins_to_draw_has_common_random_numbers(pool: ThreadPoolExecutor) -> None:
    def noisy(x: Tensor) -> Tensor:
        moved = bool((x > 1).all()) and bool((x != 2).any())
        return (x * x + torch.randn(2, dtype=x.dtype)).detach() if moved else (x * x).detach()

    x = leaf(0.5, 0.5)
    f = blackbox(noisy, estimator=CentralDifference(), executor=Workers(pool, ahead=True))
    torch.autograd.grad(f(x).sum(), x)
    y = f(x + 1.5)  # draws wherever it is moved to, and not at x
    time.sleep(0.2)
    with pytest.warns(UntrustedGradientWarning, match="gains nothing"):
        (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(found, 2 * (x + 1.5), rtol=1e-6)


def test_a_graph_that_is_kept_gives_its_gradient_again(pool: ThreadPoolExecutor) -> None:
    x = leaf(0.3, -0.7)
    f = blackbox(Counted(), numpy=True, estimator=CentralDifference(), executor=Workers(pool, ahead=True))
    torch.autograd.grad(f(x).sum(), x)
    y = f(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.allclose(first, slope(x), rtol=1e-8)


def test_inputs_that_were_changed_are_refused_as_ever(pool: ThreadPoolExecutor) -> None:
    x, w = leaf(0.3, -0.7), leaf(1.0, 2.0)
    f = blackbox(
        lambda x, w: np.tanh(x) * w, numpy=True, estimator=CentralDifference(), executor=Workers(pool, ahead=True)
    )
    f(x, w).sum().backward()
    y = f(x, w)
    with torch.no_grad():
        w += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_steps_that_were_measured_meanwhile_are_the_ones_that_count(pool: ThreadPoolExecutor) -> None:
    """Its digits are printed beyond 1, so the step is measured at the fourth gradient, when the fifth has begun."""

    def printed(x: Any) -> Any:
        return np.array([float(f"{v:.4f}") if v > 1 else v for v in np.exp(x)])

    def gradients(executor: Any) -> list[Tensor]:
        f = blackbox(printed, numpy=True, executor=executor)
        for _ in range(3):
            x = leaf(-0.5)
            f(x).sum().backward()
        x, z = leaf(0.37), leaf(0.73)
        ys = [f(x), f(z)]
        with pytest.warns(UntrustedGradientWarning, match="measure"):
            return [torch.autograd.grad(y.sum(), leaf)[0] for y, leaf in zip(ys, (x, z), strict=True)]

    found, truth = gradients(Workers(pool, ahead=True)), gradients(None)
    assert all(map(torch.equal, found, truth))
    assert torch.allclose(torch.cat(found), leaf(0.37, 0.73).exp().detach(), rtol=0.05)


def test_there_is_room_for_so_many(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, x = Counted(), leaf(0.3, -0.7)
    f = blackbox(simulator, numpy=True, estimator=CentralDifference(), executor=Workers(pool, ahead=True))
    torch.autograd.grad(f(x).sum(), x)
    monkeypatch.setattr(node, "HELD_BYTES", 2 * 2 * 8 * 2)  # the slopes of two calls
    start = simulator.settled()
    ys = [f(x) for _ in range(3)]
    assert simulator.settled() - start == 3 + 2 * 4
    (found,) = torch.autograd.grad(torch.stack(ys).sum(), x)
    assert torch.allclose(found, 3 * slope(x), rtol=1e-8)
    del ys
    start = simulator.settled()
    y = f(x)
    assert simulator.settled() - start == 1 + 4
    del y


def test_calls_that_are_counted_anew_are_not_mixed_up(pool: ThreadPoolExecutor) -> None:
    x, z = leaf(0.3, -0.7), leaf(1.3, 0.7)
    f = Blackbox(
        lambda x: np.tanh(x) * x, numpy=True, estimator=CentralDifference(), executor=Workers(pool, ahead=True)
    )
    f(x).sum().backward()
    state = f._facts.state_dict()
    y = f(x)
    f._facts.load_state_dict(state)
    total = f(z).sum()
    for leaf_of, output in ((x, y.sum()), (z, total)):
        assert torch.allclose(torch.autograd.grad(output, leaf_of)[0], slope(leaf_of), rtol=1e-8)


def test_errors_belong_to_the_backward() -> None:
    def fails(x: Any) -> Any:
        if x[0] > 2:
            raise OSError("the licence server is busy")
        return x * 2

    x = leaf(1.0, 1.0)
    with ThreadPoolExecutor(2) as pool:
        f = blackbox(fails, numpy=True, estimator=CentralDifference(), executor=Workers(pool, ahead=True))
        f(x).sum().backward()
        y = f(x + 1)
        with pytest.raises(BlackboxError, match=r"fails raised OSError: the licence server is busy\s+in evaluation"):
            y.sum().backward()
        (found,) = torch.autograd.grad(f(x).sum(), x)
        assert torch.allclose(found, torch.full_like(found, 2.0))
    y = f(x)
    with pytest.raises(BlackboxError, match="the pool was shut down"):
        y.sum().backward()


def test_modules_that_are_bound(pool: ThreadPoolExecutor) -> None:
    class Simulator(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Simulator.calls += 1
            return torch.from_numpy(np.tanh(x.detach().numpy()) * x.detach().numpy())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.simulator = Simulator()
            self.gain = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.simulator(x * self.gain)
            return out

    model, x = Model(), torch.tensor([0.3, -0.7], dtype=torch.float64)
    bind(model.simulator, estimator=CentralDifference(), executor=Workers(pool, ahead=True))
    for _ in range(2):
        model(x).sum().backward()
    model.gain.grad = None
    y = model(x)
    time.sleep(0.2)
    before = Simulator.calls
    y.sum().backward()
    assert Simulator.calls == before
    assert model.gain.grad is not None
    assert torch.allclose(model.gain.grad, slope(x) * x, rtol=1e-8)


def test_bounds_and_bad_words(pool: ThreadPoolExecutor) -> None:
    windows: Any = 4
    with pytest.raises(ValueError, match="ahead must be True, so that evaluations begin"):
        Workers(pool, ahead=windows)
    x = leaf(0.5, 1.0)
    step = BoundedStep(RelativeStep(), lower=0.0, upper=1.0)
    f = blackbox(Counted(), numpy=True, estimator=CentralDifference(step_size=step), executor=Workers(pool, ahead=True))
    for _ in range(3):
        (found,) = torch.autograd.grad(f(x).sum(), x)
    assert torch.allclose(found, slope(x), rtol=1e-6)
