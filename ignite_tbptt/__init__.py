"""Truncated back-propagation through time for PyTorch-Ignite, and gradients for blackboxes."""

from ignite_tbptt.adaptive_truncation import AdaptiveTruncation
from ignite_tbptt.blackbox import Blackbox, FiniteDifferenceGradients, find_graph_cuts
from ignite_tbptt.evaluator import create_supervised_tbptt_evaluator, time_steps_as_samples
from ignite_tbptt.events import EpochTimeWise, RunningTimeWise, SequenceWise, Tbptt_Events
from ignite_tbptt.gradient_decay import GradientDecay
from ignite_tbptt.gradient_horizon import GradientHorizon
from ignite_tbptt.handlers import TbpttProgressBar
from ignite_tbptt.hidden import detach_hidden, reset_hidden
from ignite_tbptt.sequence import split_sequence
from ignite_tbptt.streams import ContiguousStreams
from ignite_tbptt.trainer import create_supervised_tbptt_trainer, supervised_tbptt_training_step
from ignite_tbptt.truncation import FixedTruncation, Segment, TruncationPolicy, Window
from ignite_tbptt.truncation_policies import (
    AnticipatedReweightedTruncation,
    FullBackpropagation,
    RandomTruncation,
    SlidingTruncation,
)

__version__ = "0.1.0"

__all__ = [
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
