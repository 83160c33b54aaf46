"""Evaluations that begin when a call is made, while the forward pass goes on.

The idea: where a function will be moved to is known when its call ends. So the evaluations of the call can be handed to
a pool at once, ``Workers(pool, ahead=True)``, and its backward finds them done. What they rely on may change until
then, the step or what is known of random numbers; they are made again then. Pairs with `executors`, which begins when
it is called, and with `round`, which takes what has come of it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ignite_tbptt.blackbox.block import Group
from ignite_tbptt.blackbox.coordinates import Coordinates
from ignite_tbptt.blackbox.errors import UntrustedGradientWarning
from ignite_tbptt.blackbox.point import Evaluations, Job, Point, jobs_of, key_of
from ignite_tbptt.blackbox.record import Record, autocast_off
from ignite_tbptt.blackbox.task import ALONE
from ignite_tbptt.random_streams import RandomStreams
from ignite_tbptt.warn import warn

__all__ = ["UnderWay", "begin", "is_under_way", "take"]


class UnderWay:
    """The evaluations of one call; they end with this object, which its node holds.

    Attributes:
        point: x of the call.
    """

    def __init__(
        self, point: Point, jobs: Sequence[tuple[Group, Job]], evaluations: Evaluations, streams: RandomStreams | None
    ) -> None:
        self.point, self._jobs, self._evaluations, self._streams = point, jobs, evaluations, streams
        record = point.record
        self._steps = record.measured_steps
        record.facts.under_way[record.number] = weakref.ref(self)
        record.facts.bytes_ahead += record.held_bytes

    def __del__(self) -> None:
        record = self.point.record
        record.facts.under_way.pop(record.number, None)
        record.facts.bytes_ahead -= record.held_bytes

    def holds(self) -> bool:
        """Whether what the evaluations rely on is as it was."""
        record = self.point.record
        if record.draws or record.measured_steps is not self._steps:
            return False
        if self._streams is None or not self._streams.have_moved():
            return True
        if not record.facts.keeps_to_backward:
            record.facts.keeps_to_backward = True
            warn(
                f"ahead=True gains nothing for {record.flat.label} on threads: random numbers were drawn between its "
                "call and its backward, by it or by the rest of the model, so its evaluations are made again, and at "
                "the backward from now on; give it a pool of processes",
                UntrustedGradientWarning,
            )
        return False

    def values(self) -> Iterable[tuple[Group, Job, list[Tensor]]]:
        """Wait for what came out; to be asked for once."""
        found = self._evaluations.values()
        return [(group, job, own) for (group, job), own in zip(self._jobs, found, strict=True)]


def begin(record: Record, room: int) -> UnderWay | None:
    """Hand the evaluations of a call over, where they can be known and what comes out has room, in bytes."""
    facts = record.facts
    if record.draws or facts.keeps_to_backward or facts.is_first(key_of(record)):
        return None
    if not isinstance(record.asked.directions, Coordinates) or facts.bytes_ahead + record.held_bytes > room:
        return None
    start = time.perf_counter()
    with ALONE, torch.no_grad(), autocast_off(record.tensors):
        point = Point([record])
        # only in this process a function can draw unseen
        streams = RandomStreams.latest() if record.options.ahead == "here" else None
        jobs = [(group, job) for group in point.groups for job in jobs_of(point, group)]
        found = UnderWay(point, jobs, Evaluations([job for _, job in jobs]), streams)
    record.count.wall_seconds += time.perf_counter() - start
    return found


def take(record: Record) -> UnderWay | None:
    """The evaluations of a call that are under way, if they still hold; they are nobody else's then."""
    found = is_under_way(record)
    record.facts.under_way.pop(record.number, None)
    return found


def is_under_way(record: Record) -> UnderWay | None:
    """The same, which are left where they are."""
    reference = record.facts.under_way.get(record.number)
    found: UnderWay | None = None if reference is None else reference()
    return found if found is not None and found.point.record is record and found.holds() else None
