"""Truncated back-propagation through time for PyTorch-Ignite, and gradients for blackboxes."""

__version__ = "0.1.0"

__all__ = ["__version__"]
