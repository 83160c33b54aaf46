"""Who asks for it sees how many evaluations of a long gradient are done; nobody else pays for it."""

from __future__ import annotations

import copy
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import tqdm.auto

from ignite_tbptt.blackbox import (
    Blackbox,
    BlackboxError,
    CentralDifference,
    FiniteDifferenceGradients,
    Workers,
    blackbox,
    progress,
)

Bars = list[Any]


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Bars:
    found: Bars = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.options, self.count, self.closed = options, options["initial"], False
            self.start_t = time.time()
            found.append(self)

        def update(self, count: int) -> None:
            self.count += count

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    monkeypatch.setattr(progress, "_PATIENCE", -1)  # every gradient is a long one
    return found


def slow(x: torch.Tensor) -> torch.Tensor:
    return (x**2).detach()


@pytest.mark.parametrize("where", ["serial", "threads", "rows"])
def test_a_long_gradient_shows_its_evaluations(where: str, bars: Bars) -> None:
    x = torch.rand(8, 1, dtype=torch.float64, requires_grad=True)
    with ThreadPoolExecutor(2) as pool:
        every: dict[str, dict[str, Any]] = {
            "serial": {},
            "threads": {"executor": Workers(pool)},
            "rows": {"in_dims": 0, "vectorized": False},
        }
        options = every[where]
        f = blackbox(slow, progress=True, estimator=CentralDifference(), **options)
        truth = blackbox(slow, estimator=CentralDifference(), **options)
        for _ in range(3):
            found = torch.autograd.grad(f(x).sum(), x)[0]
            assert torch.equal(found, torch.autograd.grad(truth(x).sum(), x)[0])
    assert f.count.calls + f.count.probes == truth.count.calls + truth.count.probes
    assert len(bars) == 3
    assert bars[-1].count == 16  # of the third gradient, which verifies nothing
    for bar in bars:
        assert bar.closed
        assert bar.options["desc"] == "gradient of slow"


def test_a_short_gradient_and_who_did_not_ask_see_nothing(bars: Bars, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(4, dtype=torch.float64, requires_grad=True)
    blackbox(slow)(x).sum().backward()
    monkeypatch.setattr(progress, "_PATIENCE", 60)
    blackbox(slow, progress=True)(x).sum().backward()
    assert not bars


def test_the_bar_ends_with_an_error(bars: Bars) -> None:
    def failing(x: torch.Tensor) -> torch.Tensor:
        if len(bars):
            raise OSError("the disk is full")
        return slow(x)

    x = torch.rand(20, dtype=torch.float64, requires_grad=True)
    f = Blackbox(failing, progress=True)
    with pytest.raises(BlackboxError, match="the disk is full"):
        f(x).sum().backward()
    assert bars.pop().closed
    twin = copy.deepcopy(f)
    with pytest.raises(BlackboxError, match="the disk is full"):
        twin(x * 0.5).sum().backward()


def test_a_handler_asks_for_it_too(bars: Bars) -> None:
    from ignite.engine import Engine

    class Slow(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach()

    model = Slow(2, 2).double()
    engine = Engine(lambda engine, batch: model(batch).sum().backward())
    with FiniteDifferenceGradients(model, modules=Slow, progress=True).attach(engine):
        engine.run([torch.ones(3, 2, dtype=torch.float64)], max_epochs=2)
    assert len(bars) == 2
    assert all(bar.closed for bar in bars)
    assert bars[0].options["desc"] == "gradient of Slow"


def test_without_tqdm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"progress=True draws with tqdm.*pip install 'ignite-tbptt\[progress\]'"
    ):
        blackbox(slow, progress=True)
