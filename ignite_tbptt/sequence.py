"""Where time is cut: the length of a nested batch and views into it along its time axis.

`split_sequence` is the default of the trainer's and the evaluator's `split_batch`. A splitter gets the batch and
the time axis and returns the number of time steps and a function ``cut(start, steps)``, which like torch.narrow
gives the chunk of that many steps from `start` on. Chunks have the nest of the batch and are views, so that a long
batch on the host costs the device one chunk at a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from ignite_tbptt import nest
from ignite_tbptt.nest import Path

Cut = Callable[[int, int], Any]
"""From a start and a number of time steps to that part of the batch."""

SplitBatch = Callable[[Any, int], tuple[int, Cut]]
"""From a batch and its time axis to the number of time steps and the function that cuts chunks out of it."""


def split_sequence(
    batch: Any,
    dim: int,
    static: Collection[Hashable] = (),
    final: Collection[Hashable] = (),
) -> tuple[int, Cut]:
    """Cut a nested batch along its time axis.

    Every tensor of the batch is cut into views along `dim`; what is not a tensor goes with every chunk as it is.

    Example:
        A batch ``{"x": (B, T, F), "speaker": (B,), "y": (B, T)}`` whose speaker has no time axis::

            split_batch = functools.partial(split_sequence, static=["speaker"])
            trainer = create_supervised_tbptt_trainer(model, optimizer, loss_fn, 50, dim=1, split_batch=split_batch)

        A batch ``(x, y)`` with one target for the whole sequence, many-to-one::

            split_batch = functools.partial(split_sequence, final=[1])

    Args:
        batch: nest of tensors: dicts, tuples, named tuples, lists, dataclasses.
        dim: time axis of the tensors; may be negative.
        static: entries without a time axis that go whole with every chunk. An entry is named by its key, index or
            field in the batch, or by a tuple of those where it lies deeper: ``("x", "speaker")``.
        final: entries without a time axis that go whole with the chunk that ends the sequence and are None in the
            others. For the target this makes a many-to-one task: the trainer takes no loss from a chunk whose target
            is None, so the gradient comes from the last window.

    Returns:
        The number of time steps, and the function ``cut(start, steps)``.

    Raises:
        ValueError: no tensor has a time axis, `dim` is out of range for one of them, they disagree about the
            length, the length is 0, or `static` or `final` names an entry that the batch does not have.
        TypeError: the batch holds a packed sequence or a numpy array, which have no axis to cut here.
    """
    whole = {_as_path(entry): False for entry in static} | {_as_path(entry): True for entry in final}
    plan = _Plan(dim, whole)
    cut_run = plan.run_cutter(batch, ())
    if plan.unseen:
        names = ", ".join(nest.spell("batch", path) for path in plan.unseen)
        alike = [path for path, _ in nest.leaves(batch) if any(path[-len(part) :] == part for part in plan.unseen)]
        raise ValueError(
            f"static and final must name entries of the batch, but it has no {names}."
            + (f" Name {_entry(alike[0])} instead, the keys that lead to it." if alike else "")
        )
    plan.length = _agreed_length(plan.lengths, dim)
    return plan.length, _RunAhead(cut_run, plan.length)


def _entry(path: Path) -> str:
    """Spell a path as an entry of `static` or `final`."""
    return repr(path[0] if len(path) == 1 else path)


def _as_path(entry: Hashable) -> Path:
    return entry if isinstance(entry, tuple) else (entry,)


_CutRun = Callable[[int, int, int], Iterable[Any]]
"""From a start, a number of time steps and a count to so many chunks of so many steps, one after the other."""


class _RunAhead:
    """Cuts chunks one by one, and where they follow one another with equal lengths the next ones in one go.

    torch.split makes a view in a third of the time that a narrow of its own takes; the views hold no memory.
    """

    RUN = 32

    def __init__(self, cut_run: _CutRun, length: int) -> None:
        self._cut_run, self._length = cut_run, length
        self._ready: Iterator[Any] = iter(())
        self._left, self._next, self._steps = 0, -1, 0

    def __call__(self, start: int, steps: int) -> Any:
        if start != self._next or steps != self._steps:
            self._left, self._next, self._steps = 0, start + steps, steps
            return next(iter(self._cut_run(start, steps, 1)))
        if not self._left:
            self._left = min(self.RUN, max(1, (self._length - start) // steps))
            self._ready = iter(self._cut_run(start, steps, self._left))
        self._left -= 1
        self._next += steps
        return next(self._ready)


class _Plan:
    """Turns a batch into the function that cuts it, and collects on the way how long its tensors are.

    The nest is walked once for a batch, not once for a chunk.
    """

    def __init__(self, dim: int, whole: dict[Path, bool]) -> None:
        self.dim = dim
        self.whole = whole
        self.unseen = set(whole)
        self.lengths: dict[Path, int] = {}
        self.length = 0
        self._first: tuple[str, int] | None = None

    def run_cutter(self, node: Any, path: Path) -> _CutRun:
        if path in self.whole:
            self.unseen.discard(path)
            return partial(self._only_at_the_end, node) if self.whole[path] else partial(_repeated, node)
        _refuse_uncuttable(node, path)
        if isinstance(node, torch.Tensor):
            name = nest.spell("batch", path)
            self.lengths[path] = _length(node, self.dim, path)
            if self.dim < 0:
                self._refuse_ambiguous_axis(name, node)
            return partial(self._views, node)
        pairs = nest.children(node)
        if pairs is None:
            return partial(_repeated, node)
        runs = [self.run_cutter(child, (*path, key)) for key, child in pairs]
        if not runs:
            return partial(_repeated, node)
        if type(node) is tuple:  # the usual (x, y): zip makes just that
            return lambda start, steps, count: zip(*[run(start, steps, count) for run in runs], strict=True)
        return lambda start, steps, count: (
            nest.rebuild(node, list(values)) for values in zip(*[run(start, steps, count) for run in runs], strict=True)
        )

    def _refuse_ambiguous_axis(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a negative `dim` that is another axis here than in the first tensor, where both could be time."""
        axis = self.dim % tensor.ndim
        if self._first is None:
            self._first = name, axis
        first_name, first_axis = self._first
        if axis != first_axis < tensor.ndim and tensor.shape[axis] == tensor.shape[first_axis]:
            raise ValueError(
                f"dim={self.dim} is axis {first_axis} of {first_name} and axis {axis} of {name}, whose shape "
                f"{tuple(tensor.shape)} has {tensor.shape[axis]} along both: which of them is time cannot be told. "
                f"Count dim from the front: dim={first_axis}, say."
            )

    def _views(self, tensor: torch.Tensor, start: int, steps: int, count: int) -> Iterable[Any]:
        views: Iterable[Any] = tensor.narrow(self.dim, start, steps * count).split(steps, self.dim)
        return views

    def _only_at_the_end(self, node: Any, start: int, steps: int, count: int) -> Iterable[Any]:
        return [node if start + steps * (index + 1) == self.length else None for index in range(count)]


def _repeated(node: Any, start: int, steps: int, count: int) -> Iterable[Any]:
    return repeat(node, count)


def _refuse_uncuttable(node: Any, path: Path) -> None:
    if isinstance(node, PackedSequence):
        raise TypeError(
            f"{nest.spell('batch', path)} is a PackedSequence, which has no time axis to cut. Pad the sequences "
            "(torch.nn.utils.rnn.pad_packed_sequence) and give the trainer loss_weight to leave the padding out."
        )
    if isinstance(node, np.ndarray):
        raise TypeError(
            f"{nest.spell('batch', path)} is a numpy array, which would go uncut with every chunk. "
            "Give the batch tensors: torch.from_numpy(array)."
        )


def _length(tensor: torch.Tensor, dim: int, path: Path) -> int:
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(
            f"dim={dim} is out of range for {nest.spell('batch', path)} of shape {tuple(tensor.shape)}: it has no such "
            "time axis. If it holds for the whole sequence, name it in "
            f"split_batch=functools.partial(split_sequence, static=[{_entry(path)}]), or final=[{_entry(path)}] for a "
            "target."
        )
    return tensor.shape[dim]


def _agreed_length(found: dict[Path, int], dim: int) -> int:
    if not found:
        raise ValueError("batch holds no tensor to cut along time: give tensors, or a split_batch of your own.")
    lengths = set(found.values())
    if len(lengths) > 1:
        listing = ", ".join(f"{nest.spell('batch', path)} has {length}" for path, length in found.items())
        usual = statistics.mode(found.values())
        odd = ", ".join(_entry(path) for path, length in found.items() if length != usual)
        raise ValueError(
            f"the tensors of the batch disagree about the number of time steps along dim={dim}: {listing}. Cut them "
            "to one length, or name those without a time axis in "
            f"split_batch=functools.partial(split_sequence, static=[{odd}]), or final=[{odd}] for a target."
        )
    (length,) = lengths
    if length == 0:
        names = ", ".join(nest.spell("batch", path) for path in found)
        raise ValueError(f"batch is an empty sequence: {names} have 0 time steps along dim={dim}.")
    return length
