"""A progress bar over time iterations, for trainers and evaluators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ignite.engine import Engine, Events

from ignite_tbptt.events import Tbptt_Events


class TbpttProgressBar:
    """Progress bar over the time iterations of an epoch, which also says where in its batch the engine is.

    Example:
        ::

            RunningAverage(output_transform=lambda loss: loss).attach(trainer, "loss", usage=RunningTimeWise())
            TbpttProgressBar().attach(trainer, metric_names=["loss"])

        shows ``Epoch [2/5] batch [3/10] chunk [7/20]:  24%|##4       | 47/200 [00:05<00:16, loss=1.83]``.

    The total is the number of time iterations of the epoch, estimated from the batches seen so far where their
    lengths differ; without an epoch length it is that of the batch in hand. Nothing is shown where the error stream is
    no terminal, as in a log file; ``disable=False`` shows it there too.

    Args:
        persist: leave the bar of a finished epoch on the screen, also of one too short to be seen otherwise.
        tqdm_kwargs: arguments for tqdm: ``file``, ``mininterval``, ``disable`` and the like.

    Raises:
        ModuleNotFoundError: tqdm is not installed; the extra ``progress`` brings it.
    """

    def __init__(self, persist: bool = False, **tqdm_kwargs: Any) -> None:
        try:
            from tqdm.auto import tqdm
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "TbpttProgressBar draws with tqdm, which is not installed: pip install 'ignite-tbptt[progress]'."
            ) from error
        self._tqdm = tqdm
        in_terminals_only = {} if "file" in tqdm_kwargs else {"disable": None}
        # with a delay tqdm draws nothing before the first chunk is done: no "0it" for a short epoch
        self._tqdm_kwargs = {"leave": persist, "delay": 1e-9, **in_terminals_only, **tqdm_kwargs}
        self._bar: Any = None
        self._place = _Place()

    def attach(
        self,
        engine: Engine,
        metric_names: Sequence[str] | None = None,
        output_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        """Show the bar while `engine` runs.

        Args:
            engine: a trainer or an evaluator of this package.
            metric_names: entries of `engine.state.metrics` to show once they are there.
            output_transform: makes a number, or a dict of numbers by name, of `engine.state.output`.

        Raises:
            ValueError: the engine has no time iterations.
            TypeError: `metric_names` is a string.
        """
        if isinstance(metric_names, str):
            raise TypeError(f"metric_names must be a list of names, got the string {metric_names!r}.")
        if Tbptt_Events.TIME_ITERATION_COMPLETED not in engine._allowed_events:
            raise ValueError(
                "engine fires no time iterations: attach the bar to an engine of create_supervised_tbptt_trainer or "
                "create_supervised_tbptt_evaluator; others take ignite.handlers.ProgressBar."
            )
        engine.add_event_handler(Events.EPOCH_STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin_batch)
        engine.add_event_handler(
            Tbptt_Events.TIME_ITERATION_COMPLETED, self._advance, tuple(metric_names or ()), output_transform
        )
        # A run that is terminated skips EPOCH_COMPLETED.
        for event in (Events.EPOCH_COMPLETED, Events.TERMINATE, Events.COMPLETED):
            engine.add_event_handler(event, self._close)

    def _open(self, engine: Engine) -> None:
        self._close()
        state: Any = engine.state
        self._place = _Place(batch=state.tbptt.batch_in_epoch)
        self._bar = self._tqdm(total=None, **self._tqdm_kwargs)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _begin_batch(self) -> None:
        self._place.begin_batch()

    def _advance(
        self, engine: Engine, metric_names: Sequence[str], output_transform: Callable[[Any], Any] | None
    ) -> None:
        if self._bar is None:
            return
        state: Any = engine.state
        place = self._place
        place.chunk += 1
        self._bar.total = place.expected_chunks(state.time_iterations_per_sequence, state.epoch_length)
        of_epochs = "" if state.max_epochs is None else f"/{state.max_epochs}"
        of_batches = "" if state.epoch_length is None else f"/{state.epoch_length}"
        self._bar.set_description_str(
            f"Epoch [{state.epoch}{of_epochs}] batch [{place.batch}{of_batches}] "
            f"chunk [{place.chunk}/{state.time_iterations_per_sequence}]",
            refresh=False,
        )
        numbers = _numbers_to_show(state, metric_names, output_transform)
        if numbers:
            self._bar.set_postfix(numbers, refresh=False)
        self._bar.update(1)


@dataclass
class _Place:
    """Where in its epoch an engine is: number of the batch, of the chunk in it, and how many came before."""

    batch: int = 0
    chunk: int = 0
    finished_batches: int = 0
    finished_chunks: int = 0

    def begin_batch(self) -> None:
        if self.chunk:
            self.finished_batches += 1
            self.finished_chunks += self.chunk
        self.batch += 1
        self.chunk = 0

    def expected_chunks(self, in_this_batch: int, epoch_length: int | None) -> int:
        """Return the chunks of the epoch, if batches to come are on average as long as those up to this one."""
        known = self.finished_chunks + in_this_batch
        to_come = 0 if epoch_length is None else epoch_length - self.batch
        return known + round(to_come * known / (self.finished_batches + 1))


def _numbers_to_show(
    state: Any, metric_names: Sequence[str], output_transform: Callable[[Any], Any] | None
) -> dict[str, Any]:
    numbers = {name: state.metrics[name] for name in metric_names if name in state.metrics}
    if output_transform is not None:
        output = output_transform(state.output)
        numbers.update(output if isinstance(output, Mapping) else {"output": output})
    return numbers
