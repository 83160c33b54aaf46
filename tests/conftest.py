"""Settings that hold for all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples at every run: a test that fails on one machine fails on all. No deadline: machines differ.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")
