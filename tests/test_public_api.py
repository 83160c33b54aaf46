"""The names that users import: pinned, documented, and importable without the extras."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import ignite_tbptt

NAMES = [
    "AdaptiveTruncation",
    "AnticipatedReweightedTruncation",
    "Blackbox",
    "ContiguousStreams",
    "EpochTimeWise",
    "FiniteDifferenceGradients",
    "FixedTruncation",
    "FullBackpropagation",
    "GradientDecay",
    "GradientHorizon",
    "RandomTruncation",
    "RunningTimeWise",
    "Segment",
    "SequenceWise",
    "SlidingTruncation",
    "TbpttProgressBar",
    "Tbptt_Events",
    "TruncationPolicy",
    "Window",
    "__version__",
    "create_supervised_tbptt_evaluator",
    "create_supervised_tbptt_trainer",
    "detach_hidden",
    "find_graph_cuts",
    "reset_hidden",
    "split_sequence",
    "supervised_tbptt_training_step",
    "time_steps_as_samples",
]


def test_the_exported_names_are_pinned() -> None:
    assert sorted(ignite_tbptt.__all__) == NAMES
    assert all(hasattr(ignite_tbptt, name) for name in NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("__version__", "Window")])
def test_every_exported_name_is_documented(name: str) -> None:
    documented = getattr(ignite_tbptt, name)
    assert inspect.getdoc(documented)
    if inspect.isfunction(documented):
        documentation = inspect.getdoc(documented) or ""
        for parameter in inspect.signature(documented).parameters:
            assert f"{parameter}:" in documentation or "The arguments, and what they raise" in documentation, parameter


MODULES = [module.name for module in pkgutil.walk_packages(ignite_tbptt.__path__, "ignite_tbptt.")]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_states_its_idea_and_its_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert doctest.testmod(module).failed == 0


@pytest.mark.slow
def test_the_package_imports_without_the_extras_and_says_which_one_is_missing() -> None:
    script = """
import sys
for extra in ("tqdm", "matplotlib", "scipy", "dask", "mujoco"):
    sys.modules[extra] = None
import ignite_tbptt
try:
    ignite_tbptt.TbpttProgressBar()
except ModuleNotFoundError as error:
    assert "pip install 'ignite-tbptt[progress]'" in str(error), error
else:
    raise AssertionError("tqdm was imported")
"""
    result = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
