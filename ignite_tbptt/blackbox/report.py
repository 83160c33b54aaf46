"""What is known of a blackbox, in a few lines that can be printed."""

from __future__ import annotations

from ignite_tbptt.blackbox.facts import Facts
from ignite_tbptt.blackbox.options import Options
from ignite_tbptt.blackbox.task import EvaluationCount

__all__ = ["report_of"]

# So many columns of an input are listed.
_SHOWN = 8


def report_of(label: str, options: Options, facts: Facts, count: EvaluationCount) -> str:
    """Return what gradients have cost, which steps were measured, what was verified and what was warned of."""
    estimator = facts.suited or options.estimator
    lines = [
        f"{label}, by {type(estimator.directions).__name__} and a formula of order {estimator.stencil.order}",
        f"  gradients: {count.gradients}, by {count.nfev} evaluations in {count.calls} calls, and {count.probes} more "
        f"to verify and to measure; {count.seconds:.3g} s inside of {count.wall_seconds:.3g} s",
    ]
    if not facts.measurements:
        lines.append(f"  step: {estimator.step_size}")
    for found in facts.measurements.values():
        for position, some in found.items():
            for column, step, size in some[:_SHOWN]:
                which = f"column {column} of " if len(some) > 1 else ""
                kind = "" if step.accepted else ", at which truncation does not show"
                lines.append(
                    f"  step: {step.h:.2g} for {which}differentiated input {position} where x is of size {size:.2g}"
                    f"{kind}; noise {step.noise:.1e} of the outputs together"
                )
            if len(some) > _SHOWN:
                lines.append(f"  step: and {len(some) - _SHOWN} more columns of differentiated input {position}")
    if facts.stackable:
        shared = "share calls" if any(facts.stackable.values()) else "are evaluated one by one"
        lines.append(f"  rows: independent, as verified; their points {shared}")
    if getattr(estimator.directions, "sparsity", None) is not None:
        lines.append(
            "  sparsity: columns that share no output are moved together; the pattern held where it was looked at"
        )
    if facts.certificate is not None:
        lines.append(f"  certificate: {facts.certificate}")
    if count.hint:
        lines.append(f"  hint: {count.hint}")
    return "\n".join(lines)
