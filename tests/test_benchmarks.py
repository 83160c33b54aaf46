"""Benchmarks tell the site their figures in one form, and the page is made of those alone."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "figures.py"


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda script: script.stem)
def test_every_benchmark_tells_figures(script: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    told = any(isinstance(call.func, ast.Name) and call.func.id == "figure" for call in calls)
    assert told or script == FIGURES, f"{script.name} tells no figure: see {FIGURES.name}"


def collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, *names: str) -> Path:
    """Run the collection of figures in a folder with one benchmark."""
    (tmp_path / "benchmarks").mkdir(exist_ok=True)
    (tmp_path / "docs").mkdir(exist_ok=True)
    collector = tmp_path / "benchmarks" / "figures.py"
    collector.write_text(FIGURES.read_text())
    (tmp_path / "benchmarks" / "speed.py").write_text(source)
    monkeypatch.setattr(sys, "argv", [str(collector), *names])
    runpy.run_path(str(collector), run_name="__main__")
    return tmp_path / "docs" / "benchmarks.json"


def test_figures_go_from_a_script_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = '"""How fast?"""\nfrom figures import figure\nprint("a table")\nfigure("time, B=4", 1.23456, "ms")\n'
    kept = collected(tmp_path, monkeypatch, source)
    assert "a table" in capfd.readouterr().out
    entry = json.loads(kept.read_text())["speed"]
    assert entry["figures"] == [["time, B=4", "1.23", "ms"]]
    assert "torch" in entry["machine"]
    (tmp_path / "docs" / "measured.py").write_text((ROOT / "docs" / "measured.py").read_text())
    page: Any = runpy.run_path(str(tmp_path / "docs" / "measured.py"))["page_of_benchmarks"]()
    assert "How fast?" in page
    assert "python benchmarks/speed.py" in page
    assert "| time, B=4 | 1.23 ms |" in page


def test_a_benchmark_that_fails_keeps_the_figures_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = collected(tmp_path, monkeypatch, 'print("figure: a | 1 | x")\n')
    before = kept.read_text()
    with pytest.raises(SystemExit, match=r"speed\.py ended with exit status 3; benchmarks\.json is as it was"):
        collected(tmp_path, monkeypatch, 'print("figure: a | 2 | x")\nraise SystemExit(3)\n')
    assert kept.read_text() == before


def test_an_unknown_benchmark_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        collected(tmp_path, monkeypatch, "", "spead")
    assert "there is no benchmark spead; there are speed" in capsys.readouterr().err
