"""The handler on real engines: gradients while they run, nothing of it afterwards."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import Checkpoint, EMAHandler
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt.blackbox import FiniteDifferenceGradients
from ignite_tbptt.blackbox.function import blackbox
from tests.blackbox.cut_models import CENTRAL64, Cell, Recurrent, Through, twins

Batch = tuple[Tensor, Tensor]


def sequences(count: int = 3, steps: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    xs = [torch.randn(steps, 3, 1, dtype=torch.float64, generator=generator) for _ in range(count)]
    return [(x, x.cumsum(0).tanh()) for x in xs]


def recurrent_trainer(model: nn.Module, lr: float = 0.05) -> Engine:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return create_supervised_trainer(
        model, optimizer, F.mse_loss, model_transform=lambda output: output[0], device="cpu"
    )


def run_inside(outer: Engine, inner: Engine) -> None:
    outer.add_event_handler(Events.ITERATION_COMPLETED, lambda: inner.run(sequences(1), max_epochs=1))


def hooks_of(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def assert_same_training(cut: nn.Module, smooth: nn.Module, start: dict[str, Tensor], factor: float = 10.0) -> None:
    """What the weights moved by agrees; each of a few steps may add its own error to those before it."""
    moved = smooth.state_dict()
    for name, value in cut.state_dict().items():
        distance = (moved[name] - start[name]).norm()
        assert distance > 0, name
        assert (value - moved[name]).norm() <= factor * CENTRAL64 * distance, name


@pytest.mark.parametrize("modules", [None, "cell", ["cell"], Cell, [Cell], "instance"])
def test_training_equals_that_of_the_differentiable_twin(modules: Any) -> None:
    cut, smooth = twins(Recurrent)
    start = copy.deepcopy(smooth.state_dict())
    trainer = recurrent_trainer(cut)
    handler = FiniteDifferenceGradients(cut, cut.cell if modules == "instance" else modules)
    keys = list(cut.state_dict())
    seen: list[list[int]] = []
    assert handler.attach(trainer) is handler
    assert hooks_of(cut) == [0] * 5
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(hooks_of(cut)))
    trainer.run(sequences(), max_epochs=2)
    recurrent_trainer(smooth).run(sequences(), max_epochs=2)
    assert_same_training(cut, smooth, start)
    assert seen == [[0, 0, 2, 0, 0]] * 6
    assert hooks_of(cut) == [0] * 5
    assert list(cut.state_dict()) == keys
    # at each of 4 steps 6 weights and 6 inputs, at all but the first 6 values of the state; each is moved both ways
    assert handler.nfev == (2 * 3) * 2 * (4 * 12 + 3 * 6)
    assert list(handler.counts) == ["cell"]
    assert handler.seconds > 0


def test_independent_rows_cost_no_more_than_one() -> None:
    cut, smooth = twins(Recurrent)
    start = copy.deepcopy(smooth.state_dict())
    trainer = recurrent_trainer(cut)
    handler = FiniteDifferenceGradients(cut, "cell", in_dims=0)
    with handler.attach(trainer):
        trainer.run(sequences(2))
    recurrent_trainer(smooth).run(sequences(2))
    assert_same_training(cut, smooth, start)
    # 6 weights and 2 columns at each of 4 steps, 2 columns of the state at all but the first; some to verify the rows
    least = 2 * 2 * (4 * 8 + 3 * 2)
    assert least <= handler.nfev <= least + 4


def test_without_the_handler_the_cell_and_encoder_do_not_learn() -> None:
    cut, _ = twins(Recurrent)
    start = copy.deepcopy(cut.state_dict())
    recurrent_trainer(cut).run(sequences())
    assert torch.equal(cut.cell.mix.weight, start["cell.mix.weight"])
    assert torch.equal(cut.encode.weight, start["encode.weight"])


def test_what_was_found_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    cut, _ = twins(Recurrent)
    handler = FiniteDifferenceGradients(cut)
    handler.logger.propagate = True
    with caplog.at_level(logging.INFO), handler.attach(recurrent_trainer(cut)):
        handler._start(Engine(lambda *_: None))
        with torch.no_grad():
            cut(sequences()[0][0])
        assert handler.report is None
        cut(sequences()[0][0])
    assert handler.report is not None
    assert handler.report.modules == ["cell"]
    assert "finite differences for cell (6 parameter values)" in caplog.text
    assert "cut_models.py" in caplog.text


def test_a_model_without_a_cut_trains_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    one, other = twins(lambda cut: Recurrent(False))
    trainer = recurrent_trainer(one)
    handler = FiniteDifferenceGradients(one).attach(trainer)
    handler.logger.propagate = True
    trainer.run(sequences())
    recurrent_trainer(other).run(sequences())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert handler.nfev == 0
    assert "no cut found" in caplog.text


def test_looking_for_cuts_draws_no_random_numbers_and_counts_no_batch() -> None:
    def make(cut: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), Through(nn.Linear(4, 1), cut=cut))

    cut, smooth = twins(make)
    start = copy.deepcopy(smooth.state_dict())
    data = [(torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)) for _ in range(2)]
    for model in (cut, smooth):
        torch.manual_seed(11)
        trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss)
        if model is cut:
            FiniteDifferenceGradients(model).attach(trainer)
        trainer.run(data, max_epochs=2)
    # BatchNorm makes the weights before it a direction in which the loss hardly changes: their movement is small
    assert cut[1].num_batches_tracked == smooth[1].num_batches_tracked == 4
    torch.testing.assert_close(cut.state_dict(), smooth.state_dict(), rtol=1e-6, atol=1e-9)
    assert not torch.equal(start["0.weight"], cut.state_dict()["0.weight"])


def test_a_cut_in_the_model_itself_binds_the_model() -> None:
    cut, smooth = twins(lambda cut: Through(nn.Linear(1, 1), cut=cut))
    start = copy.deepcopy(smooth.state_dict())
    for model in (cut, smooth):
        trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss)
        if model is cut:
            handler = FiniteDifferenceGradients(model).attach(trainer)
        trainer.run(sequences())
    assert_same_training(cut, smooth, start)
    assert list(handler.counts) == ["Through"]
    assert hooks_of(cut) == [0] * 3


def test_steps_and_signs_are_named_but_not_bound() -> None:
    class Rounding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.round()

    model = nn.Sequential(nn.Linear(1, 1), Rounding(), nn.Linear(1, 1)).double()
    handler = FiniteDifferenceGradients(model)
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss)
    with handler.attach(trainer):
        trainer.run(sequences())
    assert handler.report is not None
    assert handler.report.modules == ["1"]
    assert handler.counts == {}


def test_an_exception_leaves_the_model_restored_inside_with() -> None:
    cut, _ = twins(Recurrent)
    trainer = recurrent_trainer(cut)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: 1 / 0)
    handler = FiniteDifferenceGradients(cut, "cell")
    with pytest.raises(ZeroDivisionError), handler.attach(trainer):
        trainer.run(sequences())
    assert hooks_of(cut) == [0] * 5
    assert not trainer.has_event_handler(handler._start)


def test_an_exception_without_with_is_mended_by_detach_or_by_the_next_run() -> None:
    cut, smooth = twins(Recurrent)
    start = copy.deepcopy(smooth.state_dict())
    trainer = recurrent_trainer(cut)
    handler = FiniteDifferenceGradients(cut, "cell").attach(trainer)

    @trainer.on(Events.EPOCH_STARTED(once=1))
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer.run(sequences())
    assert hooks_of(cut) == [0, 0, 2, 0, 0]
    trainer = recurrent_trainer(cut)
    handler.attach(trainer)
    trainer.run(sequences())
    recurrent_trainer(smooth).run(sequences())
    assert_same_training(cut, smooth, start)
    handler.detach()
    handler.detach()
    assert hooks_of(cut) == [0] * 5


def test_attached_twice_is_attached_once() -> None:
    cut, _ = twins(Recurrent)
    trainer = recurrent_trainer(cut)
    handler = FiniteDifferenceGradients(cut, "cell")
    handler.attach(trainer)
    handler.attach(trainer)
    trainer.run(sequences(1))
    once = handler.nfev
    trainer.run(sequences(1), max_epochs=2)
    assert once > 0
    assert handler.nfev == 2 * once
    assert hooks_of(cut) == [0] * 5


@pytest.mark.parametrize("how", [{}, {"skip_completed": True}])
def test_a_terminated_run_is_a_completed_run(how: dict[str, bool]) -> None:
    if not how.keys() <= inspect.signature(Engine.terminate).parameters.keys():
        pytest.skip("Ignite before 0.5.2 has no skip_completed")
    cut, _ = twins(Recurrent)
    trainer = recurrent_trainer(cut)
    FiniteDifferenceGradients(cut, "cell").attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: trainer.terminate(**how))
    trainer.run(sequences())
    assert hooks_of(cut) == [0] * 5


def test_two_handlers_on_two_engines_share_a_model() -> None:
    cut, smooth = twins(Recurrent)
    start = copy.deepcopy(smooth.state_dict())
    for model in (cut, smooth):
        outer, inner = recurrent_trainer(model), recurrent_trainer(model)
        if model is cut:
            first = FiniteDifferenceGradients(model, "cell").attach(outer)
            second = FiniteDifferenceGradients(model, Cell).attach(inner)
        run_inside(outer, inner)
        outer.run(sequences(2))
    assert_same_training(cut, smooth, start)
    assert first.nfev == second.nfev > 0
    assert hooks_of(cut) == [0] * 5


def test_one_handler_on_two_engines_stays_until_both_are_done() -> None:
    cut, smooth = twins(Recurrent)
    start = copy.deepcopy(smooth.state_dict())
    for model in (cut, smooth):
        outer, inner = recurrent_trainer(model), recurrent_trainer(model)
        if model is cut:
            handler = FiniteDifferenceGradients(model, "cell")
            handler.attach(outer)
            handler.attach(inner)
        run_inside(outer, inner)
        outer.run(sequences(2))
    assert_same_training(cut, smooth, start)
    assert hooks_of(cut) == [0] * 5


def test_a_custom_engine_with_two_models_and_two_losses() -> None:
    def adversaries(cut: bool) -> nn.Module:
        generator = nn.Linear(2, 3)
        return nn.ModuleDict({"g": generator, "d": nn.Sequential(Through(nn.Linear(3, 2), cut=cut), nn.Linear(2, 1))})

    cut, smooth = twins(adversaries)
    start = copy.deepcopy(smooth.state_dict())
    noise = torch.randn(4, 5, 2, dtype=torch.float64)
    for models in (cut, smooth):
        g, d = models["g"], models["d"]
        step_g, step_d = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (g, d))

        def update(engine: Engine, z: Tensor, g=g, d=d, step_g=step_g, step_d=step_d) -> float:  # type: ignore[no-untyped-def]
            step_d.zero_grad()
            real, fake = d(torch.ones(5, 3, dtype=torch.float64)), d(g(z).detach())
            (F.softplus(-real).mean() + F.softplus(fake).mean()).backward()
            step_d.step()
            step_g.zero_grad()
            loss = F.softplus(-d(g(z))).mean()
            loss.backward()
            step_g.step()
            return float(loss.detach())

        engine = Engine(update)
        if models is cut:
            FiniteDifferenceGradients(d).attach(engine)
        engine.run(list(noise))
    assert_same_training(cut, smooth, start)


def test_averaged_copies_and_checkpoints_are_those_of_the_twin(tmp_path: Path) -> None:
    cut, smooth = twins(Recurrent)
    saved: dict[str, Any] = {}
    averages: dict[str, Any] = {}
    for name, model in (("cut", cut), ("smooth", smooth)):
        trainer = recurrent_trainer(model)
        if model is cut:
            FiniteDifferenceGradients(model, "cell").attach(trainer)
        # made after the run has begun, so that the copy is of a model that is bound
        trainer.add_event_handler(
            Events.ITERATION_STARTED(once=1),
            lambda trainer=trainer, model=model, name=name: averages.update(
                {name: _averaging(model, trainer)},
            ),
        )
        checkpoint = Checkpoint({"model": model, "trainer": trainer}, str(tmp_path / name), filename_prefix=name)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), checkpoint)
        trainer.run(sequences())
        (file,) = (tmp_path / name).iterdir()
        saved[name] = torch.load(file, weights_only=True)["model"]
    assert list(saved["cut"]) == list(saved["smooth"])
    torch.testing.assert_close(saved["cut"], saved["smooth"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(averages["cut"].state_dict(), averages["smooth"].state_dict(), rtol=1e-7, atol=1e-9)
    x = sequences()[0][0]
    assert not averages["cut"].cell(x[0].expand(3, 2), x[0].expand(3, 2)).requires_grad
    fresh = Recurrent(True).double()
    fresh.load_state_dict(saved["cut"])


def _averaging(model: nn.Module, trainer: Engine) -> nn.Module:
    handler = EMAHandler(model, momentum=0.5)
    handler.attach(trainer, event=Events.ITERATION_COMPLETED)
    return handler.ema_model


def test_a_model_can_be_pickled_and_copied_before_its_first_forward() -> None:
    cut, _ = twins(Recurrent)
    handler = FiniteDifferenceGradients(cut)
    trainer = recurrent_trainer(cut)
    copies: list[Any] = []
    trainer.add_event_handler(
        Events.STARTED, lambda: copies.extend([copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))])
    )
    handler.attach(trainer)
    trainer = recurrent_trainer(cut)
    handler.attach(trainer)
    trainer.add_event_handler(
        Events.STARTED, lambda: copies.extend([copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))])
    )
    trainer.run(sequences(1))
    assert len(copies) == 2
    for other in copies:
        assert not other.cell(torch.ones(1, 2).double(), torch.ones(1, 2).double()).requires_grad
        other(sequences()[0][0])


@pytest.mark.parametrize("whole", [False, True], ids=["submodule", "model"])
def test_a_compiled_model_trains_and_is_restored(whole: bool) -> None:
    cut, smooth = twins(lambda cut: nn.Sequential(nn.Linear(1, 2), Through(nn.Linear(2, 1), cut=cut)))
    start = copy.deepcopy(smooth.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if whole:
            compiled: Any = torch.compile(cut, backend="eager")
        else:
            compiled = cut
            cut[1].compile(backend="eager")
        # compiled once without the hooks, which must not be what runs afterwards
        compiled(sequences()[0][0])
        trainer = create_supervised_trainer(compiled, torch.optim.SGD(cut.parameters(), lr=0.1), F.mse_loss)
        handler = FiniteDifferenceGradients(compiled).attach(trainer)
        trainer.run(sequences())
        assert not cut[1](sequences()[0][0].expand(-1, -1, 2)).requires_grad
    create_supervised_trainer(smooth, torch.optim.SGD(smooth.parameters(), lr=0.1), F.mse_loss).run(sequences())
    assert_same_training(cut, smooth, start)
    assert list(handler.counts) == ["1"]


TWO_RANKS = """
    import os, sys, warnings
    warnings.simplefilter("ignore")
    import ignite.distributed as idist
    import torch
    from torch.nn import functional as F
    from ignite.engine import create_supervised_trainer
    from ignite_tbptt.blackbox import FiniteDifferenceGradients
    from tests.blackbox.cut_models import Recurrent, twins

    def train(rank):
        cut, smooth = twins(Recurrent)
        torch.manual_seed(rank)
        data = [(x, x.cumsum(0).tanh()) for x in torch.randn(3, 4, 3, 1, dtype=torch.float64)]
        weights = []
        for model in (cut, smooth):
            ddp = torch.nn.parallel.DistributedDataParallel(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            trainer = create_supervised_trainer(ddp, optimizer, F.mse_loss, model_transform=lambda output: output[0])
            if model is cut:
                handler = FiniteDifferenceGradients(ddp).attach(trainer)
            trainer.run(data)
            weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        error = (weights[0] - weights[1]).norm() / weights[1].norm()
        assert error < 1e-7, error
        everywhere = idist.all_gather(weights[0][None])
        assert torch.equal(everywhere[0], everywhere[1])
        assert handler.nfev > 0 and not cut.cell._forward_hooks
        if rank == 0:
            print("trained alike on both ranks", flush=True)
        idist.barrier()  # a rank that leaves early can take the other down with it
        os._exit(0)  # gloo now and then aborts where the interpreter takes its threads down

    if __name__ == "__main__":
        # ranks meet in a file: a port could be another run's, and with it would go the rank that serves it
        with idist.Parallel(backend="gloo", nproc_per_node=2, init_method=sys.argv[1]) as parallel:
            parallel.run(train)
"""


def test_two_ranks_train_alike(tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(textwrap.dedent(TWO_RANKS))
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), f"file://{tmp_path}/meeting"],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "trained alike on both ranks" in done.stdout


def test_nested_choices_keep_the_outermost() -> None:
    cut, _ = twins(Recurrent)
    assert FiniteDifferenceGradients(cut, ["cell.mix", "cell"])._chosen == ["cell"]
    assert FiniteDifferenceGradients(cut, [nn.Linear, "cell"])._chosen == ["encode", "decode", "cell"]
    assert FiniteDifferenceGradients(cut, ["cell", ""])._chosen == [""]


def test_a_module_replaced_between_runs_is_the_one_bound() -> None:
    cut, _ = twins(Recurrent)
    trainer = recurrent_trainer(cut)
    handler = FiniteDifferenceGradients(cut, "cell").attach(trainer)
    trainer.run(sequences(1))
    spent = handler.nfev
    cut.cell = Cell(True).double()
    trainer.run(sequences(1), max_epochs=2)
    assert handler.nfev == 2 * spent > 0
    assert hooks_of(cut) == [0] * 5


def test_a_shared_module_goes_by_either_name() -> None:
    shared = Cell(True)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert FiniteDifferenceGradients(model, "b")._chosen == ["a"]


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ("cel", ValueError, r"there is no module 'cel' in Recurrent; the nearest names are \['cell'"),
        ("zzz", ValueError, r"nearest names are \['encode', 'cell'"),
        (nn.Conv2d, ValueError, r"no Conv2d in Recurrent; it is made of \['Cell', 'Linear', 'Recurrent'\]"),
        (Cell(True), ValueError, "this Cell is not part of Recurrent"),
        ([], ValueError, "modules is empty"),
        (3, TypeError, "modules must be names, classes or modules, got 3; None has the cuts found"),
        ([3], TypeError, "expected names, module classes or modules, got 3 of type int"),
    ],
)
def test_modules_that_are_not_there_are_refused(modules: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FiniteDifferenceGradients(Recurrent(True), modules)


def test_a_model_without_modules_has_no_nearest_names() -> None:
    with pytest.raises(
        ValueError, match="no module 'weight' in Linear; it has no modules inside; pass the model itself"
    ):
        FiniteDifferenceGradients(nn.Linear(2, 2), "weight")


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        FiniteDifferenceGradients(sequences)  # type: ignore[arg-type]


def test_a_module_with_no_cut_is_told() -> None:
    _, smooth = twins(Recurrent)
    trainer = recurrent_trainer(smooth)
    with (
        FiniteDifferenceGradients(smooth, "cell").attach(trainer),
        pytest.warns(UserWarning, match="cell: autograd sees"),
    ):
        trainer.run(sequences(1))


def test_loggers_read_from_the_state_what_gradients_cost() -> None:
    cut, _ = twins(Recurrent)
    trainer = recurrent_trainer(cut)
    handler = FiniteDifferenceGradients(cut, "cell").attach(trainer)
    seen: list[tuple[int, float, float]] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def read() -> None:
        state: Any = trainer.state
        seen.append((state.nfev, state.seconds, state.wall_seconds))
        assert 0 < state.gradient_share < 1
        assert state.evaluations_per_second > 0

    trainer.run(sequences())
    assert seen[-1] == (handler.nfev, handler.seconds, handler.wall_seconds)
    assert 0 < handler.seconds < handler.wall_seconds
    assert seen[0][0] < seen[-1][0]
    before = seen[-1]
    trainer.run(sequences(1))  # of a second run its own evaluations count
    state: Any = trainer.state
    rate = (state.nfev - before[0]) / (state.wall_seconds - before[2])
    assert state.evaluations_per_second == pytest.approx(rate)
    handler.detach()


def test_the_log_says_what_in_dims_would_save() -> None:
    class Waves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(np.sin(x.detach().numpy()))

    model = nn.Sequential(nn.Linear(3, 4), Waves()).double()
    batch = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss)
    handler = FiniteDifferenceGradients(model, "1").attach(trainer)
    lines: list[str] = []
    listening = logging.Handler()
    listening.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    handler.logger.addHandler(listening)
    handler.logger.setLevel(logging.INFO)
    trainer.run([batch] * 2)
    # 32 elements, both ways, twice
    assert re.match(r"1: 128 evaluations for 2 gradients, \d+ more to verify and to measure, in \d+ calls", lines[-1])
    assert "its 8 rows look independent: in_dims=0 would take 1/8 of the evaluations" in lines[-1]


def test_rows_that_depend_on_one_another_are_given_no_such_advice() -> None:
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    apart, together = blackbox(lambda x: x.detach().sin()), blackbox(lambda x: x.detach() - x.detach().mean(0))
    for f in (apart, together):
        f(x).sum().backward()
    assert "its 8 rows look independent: in_dims=0 would take 1/8 of the evaluations" in apart.count.hint
    assert together.count.hint == ""
