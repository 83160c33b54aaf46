"""The names that users import, pinned; each documented, with its examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

from ignite_tbptt import blackbox as package

MODULES = [
    "coloring",
    "estimator",
    "executors",
    "function",
    "journal",
    "measured_step",
    "module",
    "moves",
    "noise",
    "stencil",
    "step_size",
    "sweep",
    "umbridge_server",
]
EXPORTED = [
    "SPSA",
    "AbsoluteStep",
    "Banded",
    "Blackbox",
    "BlackboxError",
    "BlackboxFunction",
    "BoundedStep",
    "CentralDifference",
    "Certificate",
    "Certify",
    "Coordinates",
    "CutCall",
    "CutKind",
    "Directions",
    "Estimator",
    "EvaluationCount",
    "Evaluator",
    "Executor",
    "FiniteDifferenceGradients",
    "ForwardDifference",
    "Gaussian",
    "GaussianSmoothing",
    "GraphCut",
    "GraphCutReport",
    "GuidedDirections",
    "Journaled",
    "MeasuredStep",
    "NoiseEstimate",
    "Orthogonal",
    "OverRanks",
    "PerInputStep",
    "Rademacher",
    "RelativeStep",
    "Result",
    "SerialEvaluation",
    "StackedEvaluation",
    "Stencil",
    "StepSize",
    "StepSweep",
    "Steps",
    "Task",
    "UmbridgeServer",
    "UntrustedGradientWarning",
    "Workers",
    "backward",
    "banded",
    "bind",
    "blackbox",
    "blackbox_from_command",
    "blackbox_from_umbridge",
    "central",
    "detect_sparsity",
    "estimate_noise",
    "find_graph_cuts",
    "forward",
    "serve_umbridge",
    "step_sweep",
    "unbind",
]


def test_the_exported_names() -> None:
    assert package.__all__ == EXPORTED
    for name in package.__all__:
        assert inspect.getdoc(getattr(package, name)), name


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"ignite_tbptt.blackbox.{name}"))
    assert results.failed == 0
