"""The first example does what it says: the string is learned as well as the formula."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# The gradient of 400 steps is off by 2e-6 of itself (central differences in float32, see `accuracy`), and Adam turns
# that into as large a part of its step of 0.1 at most.
APART = 400 * 0.1 * 2e-6


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    path = Path(__file__).parents[2] / "examples" / "blackbox_regression.py"
    spec = importlib.util.spec_from_file_location("blackbox_regression", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setitem(sys.modules, "blackbox_regression", module)
    spec.loader.exec_module(module)
    return module


def test_both_find_the_weights(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["blackbox_regression.py"])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    weights = {line.split()[0]: [float(word) for word in line.split()[1:3]] for line in lines[1:3]}
    for name in ("torch", "string"):
        assert weights[name] == pytest.approx([1.1996, -3.3987], abs=1e-3)
    assert float(lines[3].split()[3]) <= APART
    assert lines[4].startswith("1600 evaluations")
    assert (tmp_path / "output" / "blackbox_regression.png").stat().st_size > 10_000


@pytest.mark.parametrize("seed", range(3))
def test_both_go_the_same_way_from_any_start(example: Any, seed: int) -> None:
    validation = torch.linspace(0, 1, 50)
    torch_run, text_run = (example.train(as_string, validation, seed=seed) for as_string in (False, True))
    assert text_run.weights == pytest.approx(torch_run.weights, abs=APART)
    assert text_run.losses[-1] < text_run.losses[0] / 10
