"""Gradients for operations that autograd cannot see through, by finite differences."""

from ignite_tbptt.blackbox.cut_report import CutCall, CutKind, GraphCut, GraphCutReport
from ignite_tbptt.blackbox.graph_cuts import find_graph_cuts

__all__ = ["CutCall", "CutKind", "GraphCut", "GraphCutReport", "find_graph_cuts"]
