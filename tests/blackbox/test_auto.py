"""estimator="auto": what it takes, says, and leaves as it was."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ignite_tbptt.blackbox import Blackbox, CentralDifference, UntrustedGradientWarning, bind, blackbox


def total(x: Tensor) -> Tensor:
    return (x**2).sum(-1).detach()


def gradient(f: Any, x: Tensor) -> Tensor:
    return torch.autograd.grad(f(x).sum(), x)[0]


@pytest.mark.parametrize(("size", "evaluations"), [(500, 1000), (501, 128)])
def test_coordinates_within_the_budget_and_guided_directions_beyond(
    size: int, evaluations: int, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.linspace(-1, 1, size, dtype=torch.float64, requires_grad=True)
    f = blackbox(total, estimator="auto")
    with caplog.at_level(logging.INFO, "ignite_tbptt"):
        found = [gradient(f, x) for _ in range(2)]
    assert f.nfev == 2 * evaluations
    (line,) = caplog.messages
    if size == 500:
        assert line == "total: 500 columns at 2 evaluations each are within the budget of 1000: every coordinate"
        assert torch.equal(found[0], gradient(blackbox(total, estimator=CentralDifference()), x))
        assert "by Coordinates" in f.report()
    else:
        assert line.startswith("total: 501 columns at 2 evaluations each are more than the budget of 1000: Guided")
        assert line.endswith("128")
        assert torch.cosine_similarity(found[1], x, dim=0) > torch.cosine_similarity(found[0], x, dim=0)
        assert "by GuidedDirections" in f.report()


def test_columns_of_independent_rows_are_counted_once() -> None:
    x = torch.linspace(-1, 1, 4000, dtype=torch.float64).view(40, 100).requires_grad_()
    f = blackbox(total, estimator="auto", in_dims=0)
    assert torch.allclose(gradient(f, x), 2 * x, atol=1e-8)
    assert f.nfev == 200


def test_what_is_chosen_follows_the_inputs() -> None:
    f = blackbox(lambda x: torch.round(total(x), decimals=3), estimator="auto")
    few = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    with pytest.warns(UntrustedGradientWarning, match="steps were measured"):
        gradient(f, few)
    before = f.nfev
    gradient(f, torch.ones(2000, dtype=torch.float64, requires_grad=True))
    assert f.nfev - before == 128


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.ones(600, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.gains * x).sum().detach()


def test_modules_too() -> None:
    x = torch.ones(600, dtype=torch.float64)
    boxed, bound = Blackbox(Gain(), estimator="auto"), Gain()
    boxed(x).backward()
    assert boxed.nfev == 128
    assert "directions" in boxed.state_dict()
    remove = bind(bound, estimator="auto")
    bound(x).backward()
    remove()
    assert bound.gains.grad is not None
    assert (bound.gains.grad**2).sum() < 600


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="estimator must be an Estimator or \"auto\", got 'automatic'"):
        blackbox(total, estimator="automatic")  # type: ignore[call-overload]  # wrong on purpose
