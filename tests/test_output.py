"""What `engine.state.output` is at ITERATION_COMPLETED, for those who attach the ordinary Ignite way."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint, DiskSaver, EpochOutputStore, TerminateOnNan
from ignite.metrics import Accuracy, Average, Loss, MeanAbsoluteError, MeanSquaredError, RunningAverage
from torch import Tensor
from torch.nn import functional as F

from ignite_tbptt import (
    EpochTimeWise,
    Tbptt_Events,
    create_supervised_tbptt_evaluator,
    create_supervised_tbptt_trainer,
    split_sequence,
)
from ignite_tbptt.output import BatchOutput, OutputInChunks
from tests.helpers import Forecaster, batches, seeded, sgd

EPS = torch.finfo(torch.float32).eps


def predictions(x: Tensor, y: Tensor, y_pred: Tensor, loss: Tensor) -> dict[str, Any]:
    return {"loss": loss.item(), "y_pred": y_pred.detach(), "y": y}


def test_the_output_of_several_windows_is_their_weighted_mean() -> None:
    output = BatchOutput()
    assert output.result() is None
    only = object()
    output.add(only, 3)
    assert output.result() is only
    output = BatchOutput()
    for k, weight in ((1.0, 4), (2.0, 4), (5.0, 2)):
        output.add({"a": k, "b": (torch.tensor(k), 3 * k), "name": "x", "y": torch.ones(2)}, weight)
    result = output.result()
    assert result["a"] == 2.2
    assert result["b"][0].item() == pytest.approx(2.2, rel=4 * EPS)
    assert result["b"][1] == pytest.approx(6.6, rel=1e-15)
    assert isinstance(result["name"], OutputInChunks)
    assert isinstance(result["y"], OutputInChunks)
    changing = BatchOutput()
    changing.add({"a": 1.0}, 1)
    changing.add({"b": 1.0}, 1)
    assert isinstance(changing.result(), OutputInChunks)


def test_an_output_that_is_not_there_cannot_be_used() -> None:
    output: Any = OutputInChunks()
    uses: list[Any] = [
        len,
        float,
        list,
        torch.as_tensor,
        lambda o: o[0],
        lambda o: o.mean(),
        lambda o: o + 1,
        lambda o: 1 * o,
    ]
    for use in [*uses, lambda o: torch.cat([o, torch.ones(1)]), lambda o: F.mse_loss(o, torch.ones(1))]:
        with pytest.raises(TypeError, match=r"Handle Tbptt_Events\.TIME_ITERATION_COMPLETED"):
            use(output)
    assert isinstance(pickle.loads(pickle.dumps(copy.deepcopy(output))), OutputInChunks)


def test_metrics_attached_to_the_evaluator_the_ordinary_way() -> None:
    model = seeded(Forecaster)
    data = batches(2)
    with torch.no_grad():
        whole = sum(F.mse_loss(model(x)[0], y).item() for x, y in data) / 2 * 2  # MeanSquaredError: over rows of 2
    evaluator = create_supervised_tbptt_evaluator(model, tbtt_step=100)
    flat = partial(MeanSquaredError, output_transform=lambda output: [part.flatten(0, 1) for part in output])
    flat().attach(evaluator, "mse")
    assert evaluator.run(data).metrics["mse"] == pytest.approx(whole, rel=160 * EPS)
    evaluator = create_supervised_tbptt_evaluator(model, tbtt_step=4)
    flat().attach(evaluator, "right", usage=EpochTimeWise())
    assert evaluator.run(data).metrics["right"] == pytest.approx(whole, rel=160 * EPS)
    for metric in (flat(), MeanSquaredError(), MeanAbsoluteError(), Accuracy(), Loss(F.mse_loss)):
        evaluator = create_supervised_tbptt_evaluator(model, tbtt_step=4)
        metric.attach(evaluator, "part")
        with pytest.raises(TypeError, match=r"usage=EpochTimeWise\(\)"):
            evaluator.run(data)
    store: Any = EpochOutputStore(output_transform=lambda output: output[0])
    store.attach(evaluator := create_supervised_tbptt_evaluator(model, tbtt_step=4))
    with pytest.raises(TypeError, match="TIME_ITERATION_COMPLETED"):
        evaluator.run(data)


def test_numbers_of_an_evaluator_are_averaged_over_the_steps_of_a_batch() -> None:
    model = seeded(Forecaster)
    x, y = batches(1)[0]
    evaluator = create_supervised_tbptt_evaluator(
        model, tbtt_step=4, output_transform=lambda x, y, y_pred: F.mse_loss(y_pred, y)
    )
    Average().attach(evaluator, "loss")
    whole = F.mse_loss(model(x)[0], y).item()
    assert evaluator.run([(x, y)]).metrics["loss"] == pytest.approx(whole, rel=80 * EPS)
    assert evaluator.state.counted_steps == 10  # type: ignore[attr-defined]


def test_a_metric_on_the_trainer_reads_the_output_of_a_transform() -> None:
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, output_transform=predictions)
    losses: list[float] = []
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, lambda e: losses.append(e.state.output["loss"]))
    Average(output_transform=lambda output: output["loss"]).attach(trainer, "loss")
    metrics = trainer.run(batches(2)).metrics
    by_hand = [(4 * a + 4 * b + 2 * c) / 10 for a, b, c in (losses[:3], losses[3:])]
    assert metrics["loss"] == pytest.approx(sum(by_hand) / 2, rel=1e-15)
    MeanSquaredError().attach(trainer, "mse")
    with pytest.raises(TypeError, match="TIME_ITERATION_COMPLETED"):
        trainer.run(batches(1))


def padded_trainer(steps: int = 4, **kwargs: Any) -> Any:
    model = seeded(Forecaster)
    return create_supervised_tbptt_trainer(
        model, sgd(model), F.mse_loss, steps, loss_weight=lambda x, y: float((y != 0).all(-1).all(-1).sum()), **kwargs
    )


def test_metrics_and_terminate_on_nan_pass_over_a_batch_without_an_output() -> None:
    (x, y), (x2, _) = batches(2)
    trainer = padded_trainer()
    seen: list[Any] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: seen.append((e.state.output, e.state.counted_steps))
    )
    averages = {"running": RunningAverage(output_transform=lambda loss: loss), "mean": Average()}
    for name, metric in averages.items():
        metric.attach(trainer, name)
    for event in (Events.ITERATION_COMPLETED, Tbptt_Events.TIME_ITERATION_COMPLETED):
        trainer.add_event_handler(event, TerminateOnNan())
    state = trainer.run([(x, y), (x2, torch.zeros_like(y))])
    assert seen[1] == (None, 0)
    assert seen[0][1] == 10
    assert state.iteration == 2
    assert state.metrics["mean"] == state.metrics["running"] == pytest.approx(seen[0][0], rel=1e-15)
    assert averages["mean"].is_attached(trainer)
    averages["mean"].detach(trainer)
    assert not averages["mean"].is_attached(trainer)


def test_a_nan_in_the_outputs_of_windows_is_not_passed_over() -> None:
    x, y = batches(1)[0]
    x[1] = float("nan")
    trainer = padded_trainer()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    assert trainer.run([(x, y), (x, y)]).iteration == 1
    trainer = padded_trainer(output_transform=lambda x, y, y_pred, loss: y_pred)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    with pytest.raises(TypeError, match="TIME_ITERATION_COMPLETED"):
        trainer.run([(x, y)])


def test_a_metric_under_two_names_is_updated_once() -> None:
    trainer = padded_trainer()
    updates: list[int] = []

    class Counted(Average):
        def update(self, output: Any) -> None:
            updates.append(1)
            super().update(output)

    metric = Counted()
    for usage in (None, EpochTimeWise()):
        for name in "ab":
            metric.attach(trainer, name, **({} if usage is None else {"usage": usage}))
    trainer.run(batches(1))
    assert len(updates) == 4  # a batch and its three windows


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 100])
def test_padded_evaluation_does_not_depend_on_the_chunks(steps: int) -> None:
    """Rows of different lengths: the loss over the steps that are there, in chunks and of the whole sequence."""
    model = seeded(Forecaster)
    lengths = torch.tensor([20, 13, 5, 2])
    mask = (torch.arange(20)[:, None] < lengths).float()
    (x, y) = batches(1, steps=20)[0]

    def loss_fn(y_pred: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        y, mask = target
        return ((y_pred - y).square().mean(-1) * mask).sum() / mask.sum().clamp(min=1)

    with torch.no_grad():
        expected = loss_fn(model(x)[0], (y, mask)).item()
    metric = Loss(loss_fn, batch_size=lambda target: len(target[0]))
    evaluator = create_supervised_tbptt_evaluator(
        model, {"loss": metric}, steps, loss_weight=lambda x, target: target[1].sum()
    )
    again = Loss(loss_fn, batch_size=lambda target: len(target[0]))
    again.attach(evaluator, "again", usage=EpochTimeWise())
    metrics = evaluator.run([(x, (y, mask)), (x.flip(1), (y.flip(1), mask.flip(1)))]).metrics
    assert metrics["loss"] == metrics["again"] == pytest.approx(expected, rel=160 * EPS)
    # the metric itself is as it was: elsewhere it weighs as it says
    other = create_supervised_tbptt_evaluator(model, {"loss": metric}, 100)
    assert other.run([(x, (y, mask))]).metrics["loss"] == pytest.approx(expected, rel=160 * EPS)
    assert metric._batch_size((y, mask)) == 20


def test_a_bad_weight_is_refused_by_the_evaluator() -> None:
    evaluator = create_supervised_tbptt_evaluator(seeded(Forecaster), loss_weight=lambda x, y: float("nan"))
    with pytest.raises(ValueError, match="loss_weight must return a finite number"):
        evaluator.run(batches(1))


def test_the_evaluator_tells_which_steps_a_chunk_covers() -> None:
    evaluator: Any = create_supervised_tbptt_evaluator(seeded(Forecaster), tbtt_step=4)
    seen: list[tuple[int, int]] = []
    for event in (Tbptt_Events.TIME_ITERATION_STARTED, Tbptt_Events.TIME_ITERATION_COMPLETED):
        evaluator.add_event_handler(event, lambda e: seen.append((e.state.window_start, e.state.window_stop)))
    evaluator.run(batches(1))
    assert seen == [edges for edges in ((0, 4), (4, 8), (8, 10)) for _ in range(2)]


def test_many_to_one_is_measured_the_ordinary_way() -> None:
    class Classifier(Forecaster):
        def forward(self, x: Tensor, hidden: Any = None) -> Any:
            y, hidden = super().forward(x, hidden)
            return y[-1], hidden

    model = seeded(Classifier)
    x, y = batches(1)[0]
    evaluator = create_supervised_tbptt_evaluator(model, tbtt_step=4, split_batch=partial(split_sequence, final=[1]))
    Loss(F.mse_loss).attach(evaluator, "loss")
    expected = F.mse_loss(model(x)[0], y[-1]).item()
    assert evaluator.run([(x, y[-1])]).metrics["loss"] == pytest.approx(expected, rel=8 * EPS)


def test_a_checkpoint_that_cannot_tell_windows_apart_is_refused(tmp_path: Any) -> None:
    trainer = padded_trainer()
    saver = DiskSaver(str(tmp_path), require_empty=False)
    for event in (Tbptt_Events.TIME_ITERATION_COMPLETED, Tbptt_Events.BACKWARD_COMPLETED(every=2)):
        with pytest.raises(ValueError, match=r"=lambda engine, event: engine\.state\.time_iteration"):
            trainer.add_event_handler(event, Checkpoint({"trainer": trainer}, saver, n_saved=1))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, Checkpoint({"trainer": trainer}, saver, n_saved=1))
    score: Any = lambda engine: -engine.state.output  # noqa: E731
    best = Checkpoint({"trainer": trainer}, saver, n_saved=1, score_function=score, score_name="loss")
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, best)
    losses: list[float] = []
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, lambda e: losses.append(e.state.output))
    trainer.run(batches(1))
    assert best.last_checkpoint == tmp_path / f"trainer_loss={-min(losses):.4f}.pt"
