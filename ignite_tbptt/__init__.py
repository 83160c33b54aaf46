"""Truncated back-propagation through time for PyTorch-Ignite, and gradients for blackboxes."""

from ignite_tbptt.adaptive import AdaptiveTruncation
from ignite_tbptt.blackbox import Blackbox, FiniteDifferenceGradients, find_graph_cuts
from ignite_tbptt.decay import GradientDecay
from ignite_tbptt.evaluator import create_supervised_tbptt_evaluator, time_steps_as_samples
from ignite_tbptt.events import EpochTimeWise, RunningTimeWise, SequenceWise, Tbptt_Events
from ignite_tbptt.hidden import detach_hidden, reset_hidden
from ignite_tbptt.horizon import GradientHorizon
from ignite_tbptt.policies import (
    AnticipatedReweightedTruncation,
    FixedTruncation,
    FullBackpropagation,
    RandomTruncation,
    SlidingTruncation,
)
from ignite_tbptt.progress_bar import TbpttProgressBar
from ignite_tbptt.sequence import split_sequence
from ignite_tbptt.streams import ContiguousStreams
from ignite_tbptt.trainer import create_supervised_tbptt_trainer, supervised_tbptt_training_step
from ignite_tbptt.truncation import Segment, TruncationPolicy, Window

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
