"""Gradients for operations that autograd cannot see through, by finite differences."""

import sys
import types
from typing import Any

from ignite_tbptt.blackbox.certificate import Certificate
from ignite_tbptt.blackbox.coloring import Banded, banded, detect_sparsity
from ignite_tbptt.blackbox.command import blackbox_from_command
from ignite_tbptt.blackbox.coordinates import Coordinates
from ignite_tbptt.blackbox.cut_report import CutCall, CutKind, GraphCut, GraphCutReport
from ignite_tbptt.blackbox.cuts import find_graph_cuts
from ignite_tbptt.blackbox.errors import BlackboxError, UntrustedGradientWarning
from ignite_tbptt.blackbox.estimator import SPSA, CentralDifference, Estimator, ForwardDifference, GaussianSmoothing
from ignite_tbptt.blackbox.executors import Workers
from ignite_tbptt.blackbox.function import BlackboxFunction, blackbox
from ignite_tbptt.blackbox.guided import GuidedDirections
from ignite_tbptt.blackbox.handler import FiniteDifferenceGradients
from ignite_tbptt.blackbox.journal import Journaled
from ignite_tbptt.blackbox.measured_step import MeasuredStep
from ignite_tbptt.blackbox.module import Blackbox, bind, unbind
from ignite_tbptt.blackbox.moves import Directions
from ignite_tbptt.blackbox.noise import NoiseEstimate, estimate_noise
from ignite_tbptt.blackbox.options import Certify
from ignite_tbptt.blackbox.over_ranks import OverRanks
from ignite_tbptt.blackbox.random_directions import Gaussian, Orthogonal, Rademacher
from ignite_tbptt.blackbox.stencil import Stencil, backward, central, forward
from ignite_tbptt.blackbox.step_size import AbsoluteStep, BoundedStep, PerInputStep, RelativeStep, Steps, StepSize
from ignite_tbptt.blackbox.sweep import StepSweep, step_sweep
from ignite_tbptt.blackbox.task import EvaluationCount, Executor, Result, SerialEvaluation, StackedEvaluation, Task
from ignite_tbptt.blackbox.umbridge import blackbox_from_umbridge
from ignite_tbptt.blackbox.umbridge_server import UmbridgeServer, serve_umbridge

Evaluator = Executor


class _CallablePackage(types.ModuleType):
    """``from ignite_tbptt import blackbox`` gives this package, which is called like the function in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return blackbox(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage

__all__ = [
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
