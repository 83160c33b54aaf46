"""Gradients for operations that autograd cannot see through, by finite differences."""

from ignite_tbptt.blackbox.cut_report import CutCall, CutKind, GraphCut, GraphCutReport
from ignite_tbptt.blackbox.graph_cuts import find_graph_cuts
from ignite_tbptt.blackbox.handler import FiniteDifferenceGradients
from ignite_tbptt.blackbox.module import Blackbox, bind, unbind

__all__ = [
    "Blackbox",
    "CutCall",
    "CutKind",
    "FiniteDifferenceGradients",
    "GraphCut",
    "GraphCutReport",
    "bind",
    "find_graph_cuts",
    "unbind",
]
