"""The handlers that people attach to an Ignite engine, on time events."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import (
    Checkpoint,
    DiskSaver,
    EarlyStopping,
    EMAHandler,
    FastaiLRFinder,
    HandlersTimeProfiler,
    LinearCyclicalScheduler,
    LRScheduler,
    ProgressBar,
    Timer,
)
from ignite.handlers.state_param_scheduler import PiecewiseLinearStateScheduler
from ignite.handlers.tensorboard_logger import GradsScalarHandler, OutputHandler, TensorboardLogger
from ignite.metrics import Average, RunningAverage
from torch.nn import functional as F

from ignite_tbptt import (
    EpochTimeWise,
    RunningTimeWise,
    SequenceWise,
    Tbptt_Events,
    TbpttProgressBar,
    create_supervised_tbptt_evaluator,
    create_supervised_tbptt_trainer,
)
from tests.helpers import Forecaster, batches, same, seeded, sgd, weights


def make_trainer(**kwargs: Any) -> Any:
    model = seeded(Forecaster)
    optimizer = sgd(model)
    trainer: Any = create_supervised_tbptt_trainer(model, optimizer, F.mse_loss, 4, **kwargs)
    trainer.model, trainer.optimizer = model, optimizer
    return trainer


def chunk_losses(trainer: Any) -> list[float]:
    losses: list[float] = []
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, lambda: losses.append(trainer.state.output))
    return losses


def test_metric_usages_of_time_iterations() -> None:
    trainer = make_trainer()
    losses = chunk_losses(trainer)
    for name, usage in (("epoch", EpochTimeWise()), ("sequence", SequenceWise()), ("run", RunningTimeWise())):
        Average().attach(trainer, name, usage=usage)
    sequences: list[float] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: sequences.append(trainer.state.metrics["sequence"]))
    metrics = trainer.run(batches(2), max_epochs=2).metrics
    assert sequences == pytest.approx([sum(losses[i : i + 3]) / 3 for i in (0, 3, 6, 9)])
    assert metrics["epoch"] == pytest.approx(sum(losses[6:]) / 6)
    assert metrics["run"] == pytest.approx(sum(losses) / 12)


def test_running_average_of_the_output() -> None:
    trainer = make_trainer()
    losses = chunk_losses(trainer)
    RunningAverage(alpha=0.5, output_transform=lambda loss: loss).attach(trainer, "loss", usage=RunningTimeWise())
    metrics = trainer.run(batches(1)).metrics
    assert metrics["loss"] == pytest.approx(losses[0] * 0.25 + losses[1] * 0.25 + losses[2] * 0.5)


def test_checkpoint_on_time_events_names_files_by_time_iteration(tmp_path: Path) -> None:
    trainer = make_trainer()
    saver = Checkpoint(
        {"model": trainer.model, "trainer": trainer},
        DiskSaver(str(tmp_path)),
        n_saved=None,
        global_step_transform=lambda engine, event: engine.state.time_iteration,
    )
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED(every=2), saver)
    trainer.run(batches(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint_{step}.pt" for step in (2, 4, 6)]
    torch.load(tmp_path / "checkpoint_4.pt", weights_only=True)


def test_early_stopping_on_time_events() -> None:
    trainer = make_trainer()
    stopper = EarlyStopping(patience=2, score_function=lambda engine: 0.0, trainer=trainer)
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, stopper)
    trainer.run(batches(3))
    assert trainer.state.time_iteration == 3


def test_lr_scheduler_on_optimizer_steps() -> None:
    trainer = make_trainer(gradient_accumulation_steps=2)
    scheduler = LRScheduler(torch.optim.lr_scheduler.StepLR(trainer.optimizer, step_size=1, gamma=0.5))
    trainer.add_event_handler(Tbptt_Events.OPTIMIZER_STEP_COMPLETED, scheduler)
    trainer.run(batches(2))  # three steps on six windows: the first event sets the first value
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)


def rates_of_steps(optimizer: torch.optim.Optimizer) -> list[float]:
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: rates.append(opt.param_groups[0]["lr"]))
    return rates


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["torch", "wrapped", "ignite"])
def test_schedulers_give_each_step_the_rate_that_they_give_it_in_ignite(kind: str, accumulation: int) -> None:
    """Of torch and of Ignite: in a loop of Ignite's own with as many iterations as there are optimizer steps."""

    def scheduler_of(optimizer: Any) -> Any:
        if kind == "torch":
            step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5).step
            return lambda engine: step()
        if kind == "wrapped":
            return LRScheduler(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        return LinearCyclicalScheduler(optimizer, "lr", 1.0, 0.0, 4)

    optimizer = sgd(seeded(Forecaster))
    expected = rates_of_steps(optimizer)
    engine = Engine(lambda engine, batch: optimizer.step())
    engine.add_event_handler(
        Events.ITERATION_COMPLETED if kind == "torch" else Events.ITERATION_STARTED, scheduler_of(optimizer)
    )
    engine.run(range(6 // accumulation))
    trainer = make_trainer(gradient_accumulation_steps=accumulation)
    rates = rates_of_steps(trainer.optimizer)
    trainer.add_event_handler(
        Tbptt_Events.OPTIMIZER_STEP_COMPLETED if kind == "torch" else Tbptt_Events.BACKWARD_COMPLETED,
        scheduler_of(trainer.optimizer),
    )
    trainer.run(batches(2))
    assert rates == expected


def test_state_param_scheduler_schedules_tbtt_step() -> None:
    trainer = make_trainer()
    schedule = PiecewiseLinearStateScheduler(param_name="tbtt_step", milestones_values=[(1, 2.0), (3, 10.0)])
    schedule.attach(trainer, Events.ITERATION_STARTED)
    counts: list[int] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: counts.append(trainer.state.time_iterations_per_sequence)
    )
    trainer.run(batches(4))
    assert counts == [5, 2, 1, 1]  # chunks of 2, 6, 10 and 10 steps


def test_ema_handler_on_optimizer_steps() -> None:
    trainer = make_trainer()
    ema = EMAHandler(trainer.model, momentum=0.5)
    ema.attach(trainer, name="momentum", event=Tbptt_Events.OPTIMIZER_STEP_COMPLETED)
    averages = weights(trainer.model)
    history: list[Any] = []
    trainer.add_event_handler(Tbptt_Events.OPTIMIZER_STEP_COMPLETED, lambda: history.append(weights(trainer.model)))
    trainer.run(batches(1))
    for step in history:
        averages = [torch.lerp(average, weight, 0.5) for average, weight in zip(averages, step, strict=True)]
    for average, expected in zip(ema.ema_model.parameters(), averages, strict=True):
        assert torch.allclose(average, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Run completed without loss diverging")
def test_lr_finder_finds_and_restores() -> None:
    trainer = make_trainer()
    before = weights(trainer.model)
    finder = FastaiLRFinder()
    to_save = {"model": trainer.model, "optimizer": trainer.optimizer}
    with finder.attach(trainer, to_save=to_save, start_lr=1e-4, end_lr=1.0, num_iter=12, diverge_th=100.0) as finding:
        finding.run(batches(15))
    results = finder.get_results()
    assert len(results["lr"]) == len(results["loss"]) >= 10
    assert same(before, weights(trainer.model))
    trainer.run(batches(1))


def test_timer_times_windows() -> None:
    trainer = make_trainer()
    timer: Any = Timer(average=True)
    timer.attach(
        trainer,
        start=Events.STARTED,
        resume=Tbptt_Events.TIME_ITERATION_STARTED,
        pause=Tbptt_Events.TIME_ITERATION_COMPLETED,
        step=Tbptt_Events.TIME_ITERATION_COMPLETED,
    )
    trainer.run(batches(2))
    assert timer.step_count == 6
    assert timer.value() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_logger_gets_a_point_for_every_window(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    trainer = make_trainer()
    points: list[tuple[str, float, int]] = []
    logger = TensorboardLogger(log_dir=str(tmp_path))
    logger.writer.add_scalar = lambda *point: points.append(point)
    step = lambda engine, event: engine.state.time_iteration  # noqa: E731
    output = OutputHandler("train", output_transform=lambda loss: {"loss": loss}, global_step_transform=step)
    logger.attach(trainer, output, Tbptt_Events.TIME_ITERATION_COMPLETED)
    logger.attach(trainer, GradsScalarHandler(trainer.model), Tbptt_Events.BACKWARD_COMPLETED(every=3))
    losses = chunk_losses(trainer)
    trainer.run(batches(2))
    logger.close()
    logged = [(value, at) for name, value, at in points if name == "train/loss"]
    assert logged == list(zip(losses, range(1, 7), strict=True))
    gradients = [(float(value), at) for name, value, at in points if name.startswith("grads")]
    assert len(gradients) == 2 * len(list(trainer.model.parameters()))
    assert all(value > 0 for value, _ in gradients)


def test_handlers_time_profiler_counts_time_handlers() -> None:
    trainer = make_trainer()

    @trainer.on(Tbptt_Events.TIME_ITERATION_COMPLETED)
    def work() -> None:
        pass

    profiler = HandlersTimeProfiler()
    profiler.attach(trainer)
    trainer.run(batches(2))
    rows = [row for row in profiler.get_results() if "work" in str(row[0])]
    assert len(rows) == 1


def test_ignites_own_progress_bar_on_its_own_events() -> None:
    trainer = make_trainer()
    out = io.StringIO()
    ProgressBar(file=out).attach(trainer, output_transform=lambda loss: {"loss": loss})
    trainer.run(batches(2))
    assert "loss=" in out.getvalue()


# Our own progress bar


def show(engine: Any, data: Any, max_epochs: int = 1, **kwargs: Any) -> str:
    out = io.StringIO()
    TbpttProgressBar(persist=True, file=out, mininterval=0, ascii=True).attach(engine, **kwargs)
    engine.run(data, max_epochs=max_epochs)
    return out.getvalue()


def test_the_progress_bar_says_where_it_is() -> None:
    trainer = make_trainer()
    RunningAverage(output_transform=lambda loss: loss).attach(trainer, "average", usage=RunningTimeWise())
    shown = show(trainer, batches(2), 2, metric_names=["average"], output_transform=lambda loss: {"loss": loss})
    assert "Epoch [1/2] batch [1/2] chunk [1/3]:  17%" in shown
    assert "Epoch [2/2] batch [2/2] chunk [3/3]: 100%" in shown
    assert "6/6" in shown
    assert "average=" in shown
    assert "loss=" in shown
    assert "0it [" not in shown  # nothing is drawn before there is something to say


def test_the_progress_bar_estimates_sequences_to_come() -> None:
    data = [*batches(1, steps=4), *batches(1, steps=12), *batches(1, steps=8)]
    shown = show(make_trainer(), data)
    assert " 1/3 " in shown  # three sequences of one chunk
    assert " 2/6 " in shown  # (1 + 3) / 2 chunks a sequence
    assert " 6/6 " in shown


def test_the_progress_bar_of_an_evaluator_and_of_a_terminated_run() -> None:
    evaluator = create_supervised_tbptt_evaluator(seeded(Forecaster), tbtt_step=4)
    assert "batch [2/2] chunk [3/3]: 100%" in show(evaluator, batches(2))
    trainer = make_trainer()
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED(once=2), lambda engine: engine.terminate())
    assert show(trainer, batches(2)).endswith("\n")  # closed


def test_the_progress_bar_refuses_an_engine_without_time() -> None:
    from ignite.engine import Engine

    with pytest.raises(ValueError, match=r"engine fires no time iterations.*ProgressBar"):
        TbpttProgressBar().attach(Engine(lambda engine, batch: None))
    with pytest.raises(TypeError, match="metric_names must be a list of names, got the string 'loss'"):
        TbpttProgressBar().attach(make_trainer(), "loss")


def test_the_progress_bar_is_quiet_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    settings: list[dict[str, Any]] = [{}, {"disable": False, "mininterval": 0}]
    for kwargs in settings:
        trainer = make_trainer()
        TbpttProgressBar(**kwargs).attach(trainer)
        trainer.run(batches(1))
        assert bool(capsys.readouterr().err) == bool(kwargs)
