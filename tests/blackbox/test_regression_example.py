"""The first example does what it says: the string is learned as well as the formula."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def test_both_find_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parents[2] / "examples" / "blackbox_regression.py"
    spec = importlib.util.spec_from_file_location("blackbox_regression", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "blackbox_regression", example)
    spec.loader.exec_module(example)
    monkeypatch.chdir(tmp_path)
    example.main()
    lines = capsys.readouterr().out.splitlines()
    weights = {line.split()[0]: [float(word) for word in line.split()[1:3]] for line in lines[1:3]}
    for name in ("torch", "string"):
        assert weights[name] == pytest.approx([1.1996, -3.3987], abs=1e-3)
    assert weights["string"] == pytest.approx(weights["torch"], abs=2e-4)
    assert lines[3].startswith("1600 evaluations")
    assert (tmp_path / "output" / "blackbox_regression.png").stat().st_size > 10_000
