"""The longest of the examples runs, at a size that shows nothing but that."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_copy_task_compares_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(EXAMPLES / "choose_truncation.py"))
    settings = script["main"].__globals__
    settings.update({"BATCH": 60, "ROWS": 4, "WARM_UP": 1})
    arguments = ["--steps", "180", "--window", "20", "--seeds", "0", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["choose_truncation.py", *arguments])
    script["main"]()
    lines = capsys.readouterr().out.splitlines()
    for seed in (0, 1):
        (row,) = [line.split() for line in lines if line.startswith(f"{seed} ")]
        assert len(row) == 7
        assert all(float(perplexity) > 1 for perplexity in row[1:-1])
    chosen = [line.split(": ")[1].split(", ") for line in lines if "chosen" in line]
    assert all(length[0] == "15" and len(length) == 3 for length in chosen)
    assert sum("standard error" in line for line in lines) == 4
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"choose_truncation_{name}.png" for name in ("before", "after", "runs")}
