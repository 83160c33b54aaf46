"""Long sequences as batches whose rows go on from batch to batch: the data that `stateful=True` asks for.

A text, a recording, a trajectory is one stream of time steps. It is laid out as rows, each a contiguous piece, and
every batch holds the next steps of every row; so row i of a batch begins where row i of the one before ended.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist

from ignite_tbptt import nest


class ContiguousStreams:
    """Lays a long sequence out as rows and yields it batch by batch.

    Example:
        >>> import torch
        >>> text = torch.arange(9)
        >>> streams = ContiguousStreams((text[:-1], text[1:]), rows=2, steps=3)
        >>> [x.tolist() for x, y in streams]  # time first: row 0 is 0 1 2 3, row 1 is 4 5 6 7
        [[[0, 4], [1, 5], [2, 6]], [[3, 7]]]

        With the trainer, which carries the state from batch to batch and asks for the right batch on resume::

            trainer = create_supervised_tbptt_trainer(model, optimizer, loss_fn, 50, stateful=True)
            trainer.run(ContiguousStreams((text[:-1], text[1:]), rows=32, steps=1000), max_epochs=10)

    Args:
        data: tensor of shape (N, ...), or a nest of such tensors of one length N, time first. Batches are views of
            it and have its nest.
        rows: rows of a batch, on each rank.
        steps: time steps of a batch; the last batch of an epoch has what is left of the rows.
        dim: 0 for batches of shape (steps, rows, ...), 1 for (rows, steps, ...).
        remainder: what to do with the ``N % (rows * world_size)`` steps at the end that do not make every row one step
            longer: "error", or "drop" them; `dropped` tells how many.
        rank: which share of the rows this process has; None asks torch.distributed, where it is initialised.
        world_size: number of ranks that share the sequence; None as for `rank`.

    Attributes:
        row_length: time steps of a row.
        dropped: time steps of `data` that are in no row of any rank.

    Raises:
        TypeError: `rows`, `steps`, `rank` or `world_size` is no int, or `data` holds something that is no tensor.
        ValueError: one of them is out of range, the tensors differ in length, there are fewer steps than rows, or
            steps are left over and `remainder` is "error".
    """

    def __init__(
        self,
        data: Any,
        rows: int,
        steps: int,
        *,
        dim: int = 0,
        remainder: Literal["error", "drop"] = "error",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        spread = dist.is_available() and dist.is_initialized()
        if rank is None:
            rank = dist.get_rank() if spread else 0
        if world_size is None:
            world_size = dist.get_world_size() if spread else 1
        for name, value, least in (
            ("rows", rows, 1),
            ("steps", steps, 1),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
        ):
            _check_int(name, value, least)
        if rank >= world_size:
            raise ValueError(f"rank must be below world_size={world_size}, got {rank}.")
        if dim not in (0, 1):
            raise ValueError(f"dim must be 0, time first, or 1, rows first, got {dim!r}.")
        if remainder not in ("error", "drop"):
            raise ValueError(f"remainder must be 'error' or 'drop', got {remainder!r}.")
        length = _common_length(data)
        self.row_length, self.dropped = divmod(length, rows * world_size)
        if self.row_length == 0:
            raise ValueError(
                f"data have {length} time steps, fewer than one for each of the {rows * world_size} rows: ask for "
                "fewer rows."
            )
        if self.dropped and remainder == "error":
            raise ValueError(
                f"data of {length} time steps do not divide into {rows * world_size} rows: {self.dropped} steps at the "
                f"end are left over. Pass remainder='drop' to leave them out, or cut data to a multiple of "
                f"{rows * world_size}."
            )
        self.rows, self.steps, self.dim = rows, steps, dim
        self._laid_out = nest.map_tensors(lambda tensor: self._lay_out(tensor, rank), data)
        self._checksum = _checksum(data)
        self._next_start = 0

    def _lay_out(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        share = self.rows * self.row_length
        rows = tensor[rank * share : (rank + 1) * share].reshape(self.rows, self.row_length, *tensor.shape[1:])
        return rows if self.dim == 1 else rows.transpose(0, 1)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return math.ceil(self.row_length / self.steps)

    def resume_at(self, batch: int) -> None:
        """Let the next iteration, and only that, begin with batch number `batch` (from 0) of the epoch.

        The trainer calls it when a run goes on inside an epoch.

        Raises:
            ValueError: there is no such batch.
        """
        if not 0 <= batch < len(self):
            raise ValueError(f"batch must be one of the {len(self)} batches of an epoch, got {batch}.")
        self._next_start = batch

    def fingerprint(self) -> dict[str, int]:
        """Return what two streams have in common if batch number i is the same in both: rows, steps, length, checksum.

        The checksum is that of a sample of the data, as they were when the streams were made. The trainer keeps the
        fingerprint in its state dict, and refuses to go on inside of other data.
        """
        return {"rows": self.rows, "steps": self.steps, "row_length": self.row_length, "checksum": self._checksum}

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the batches of an epoch."""
        first, self._next_start = self._next_start, 0
        return (self[index] for index in range(first, len(self)))

    def __getitem__(self, index: int) -> Any:
        """Return batch number `index` of the epoch, for ``DataLoader(streams, batch_size=None)``."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be one of the {len(self)} batches of an epoch, got {index}.")
        start = index * self.steps
        steps = min(self.steps, self.row_length - start)
        return nest.map_tensors(lambda tensor: tensor.narrow(self.dim, start, steps), self._laid_out)


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def _common_length(data: Any) -> int:
    lengths: dict[str, int] = {}
    for path, leaf in nest.leaves(data):
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            got = "a tensor without axes" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise TypeError(f"{nest.spell('data', path)} must be a tensor with time as its first axis, got {got}.")
        lengths[nest.spell("data", path)] = len(leaf)
    if len(set(lengths.values())) != 1:
        listing = ", ".join(f"{name} has {length}" for name, length in lengths.items()) or "there is no tensor"
        raise ValueError(f"the tensors of data must have the same number of time steps: {listing}.")
    return next(iter(lengths.values()))


def _checksum(data: Any, samples: int = 4096) -> int:
    checksum = 0
    for tensor in nest.tensors(data):
        places = torch.linspace(0, tensor.numel() - 1, min(samples, tensor.numel()), dtype=torch.float64).long()
        sample = tensor.detach()[torch.unravel_index(places.to(tensor.device), tensor.shape)].cpu()
        checksum = zlib.crc32(sample.view(torch.uint8).numpy().tobytes(), checksum)
    return checksum
