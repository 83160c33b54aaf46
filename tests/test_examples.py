"""The examples run, at a size that shows nothing but that."""

from __future__ import annotations

import importlib.util
import inspect
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str, **settings: Any) -> None:
    """Run an example as a script of its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        main = runpy.run_path(str(EXAMPLES / name))["main"]
        main.__globals__.update(settings)
        main(*([arguments] if inspect.signature(main).parameters else []))


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_the_examples_share_their_options(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        run(name, "--help")
    told = capsys.readouterr().out
    assert "--output" in told
    assert "--quick" in told
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == "matplotlib" else find(module))
    with pytest.raises(SystemExit):
        run(name, "--output", str(tmp_path / "none"))
    assert "pip install 'ignite-tbptt[plot" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("ignore:the first backward pass left")  # one example trains a cut model, to show it
@pytest.mark.parametrize(
    "name", ["blackbox_in_recurrent_model", "blackbox_regression", "external_program", "truncation_bias"]
)
def test_a_quick_run_draws_its_picture(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    run(f"{name}.py", "--quick", "--output", str(tmp_path / "pictures"))
    picture = tmp_path / "pictures" / f"{name}.png"
    assert picture.stat().st_size > 10_000
    assert str(picture) in capsys.readouterr().out


def test_a_controller_is_trained_through_mujoco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco")
    pytest.importorskip("gymnasium")
    pytest.importorskip("matplotlib")
    run("mujoco_control.py", "--quick", "--output", str(tmp_path))
    assert (tmp_path / "mujoco_control.png").stat().st_size > 10_000
    assert "trained    upright for" in capsys.readouterr().out


def test_the_copy_task_compares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--steps", "180", "--window", "20", "--seeds", "0", "1", "--output", str(tmp_path)]
    run("choose_truncation.py", *arguments, BATCH=60, ROWS=4, WARM_UP=1)
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
