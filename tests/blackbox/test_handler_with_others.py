"""The handler beside what people use with it: Ignite's handlers, copies and files of the model, compilers, autocast."""

from __future__ import annotations

import copy
import pickle
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import Checkpoint, EMAHandler, ProgressBar
from ignite.handlers.tensorboard_logger import TensorboardLogger
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt.blackbox import EvaluationCount, FiniteDifferenceGradients, StackedEvaluation, bind
from ignite_tbptt.blackbox.module import Blackbox
from tests.blackbox.cut_models import CENTRAL64, Cell, Recurrent, Through, assert_near, gradients, twins
from tests.blackbox.helpers import relative_error

Batch = tuple[Tensor, Tensor]


def assert_learned_alike(model: nn.Module, truth: dict[str, Tensor]) -> None:
    """What a few steps of a few weights leave apart, each with a gradient off by CENTRAL64 of itself."""
    torch.testing.assert_close(dict(model.state_dict()), dict(truth), rtol=10 * CENTRAL64, atol=10 * CENTRAL64)


def sequential(cut: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), Through(nn.Linear(3, 3), nn.Tanh(), cut=cut), nn.Linear(3, 1))


def batches(count: int = 3, rows: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    xs = [torch.randn(rows, 2, dtype=torch.float64, generator=generator) for _ in range(count)]
    return [(x, x.prod(1, keepdim=True)) for x in xs]


def trainer_of(model: nn.Module) -> Engine:
    # without momentum: after a break it would go on from another state
    return create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss)


def trained_twin(smooth: nn.Module, epochs: int = 1) -> dict[str, Tensor]:
    trainer_of(smooth).run(batches(), max_epochs=epochs)
    return smooth.state_dict()


def test_a_checkpoint_goes_into_a_fresh_model_with_and_without_a_handler(tmp_path: Path) -> None:
    cut, smooth = twins(sequential)
    trainer = trainer_of(cut)
    keys = list(cut.state_dict())
    checkpoint = Checkpoint({"model": cut, "trainer": trainer}, str(tmp_path), global_step_transform=lambda *_: 0)
    with FiniteDifferenceGradients(cut, "1").attach(trainer):
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), checkpoint)
        trainer.run(batches())
    file = tmp_path / str(checkpoint.last_checkpoint)
    assert list(torch.load(file, weights_only=True)["model"]) == keys
    truth = trained_twin(smooth)
    for bound in (False, True):
        fresh = sequential(True).double()
        if bound:
            bind(fresh.get_submodule("1"))
        going_on = trainer_of(fresh)
        Checkpoint.load_objects({"model": fresh, "trainer": going_on}, checkpoint=str(file))
        assert_learned_alike(fresh, truth)
        assert going_on.state.iteration == 3


def test_averages_are_those_of_the_twin() -> None:
    averages: list[nn.Module] = []
    for model in twins(sequential):
        trainer = trainer_of(model)
        if model[1].cut:
            FiniteDifferenceGradients(model).attach(trainer)
        ema = EMAHandler(model, momentum=0.25)
        ema.attach(trainer, event=Events.ITERATION_COMPLETED)
        trainer.run(batches(), max_epochs=2)
        averages.append(ema.ema_model)
    assert_learned_alike(averages[0], averages[1].state_dict())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_made_during_the_run_trains_like_the_model(how: Any) -> None:
    cut, smooth = twins(sequential)
    trainer = trainer_of(cut)
    copies: list[nn.Module] = []

    @trainer.on(Events.ITERATION_STARTED(once=2))
    def part_ways() -> None:
        copies.append(how(cut))
        trainer_of(copies[0]).run(batches()[1:])

    with FiniteDifferenceGradients(cut, "1").attach(trainer):
        trainer.run(batches())
    truth = trained_twin(smooth)
    assert_learned_alike(cut, truth)
    assert_learned_alike(copies[0], truth)


HEADERS = Path(sysconfig.get_paths()["include"]) / "Python.h"
needs_compiler = pytest.mark.skipif(not (shutil.which("c++") and HEADERS.exists()), reason="needs a C++ compiler")


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)])
@pytest.mark.filterwarnings("ignore")  # what the compiler says to itself
def test_a_compiled_model_trains(backend: str) -> None:
    cut, smooth = twins(sequential)
    compiled: Any = torch.compile(cut, backend=backend)
    trainer = trainer_of(compiled)
    handler = FiniteDifferenceGradients(compiled, "1")
    try:
        with handler.attach(trainer):
            trainer.run(batches())
    finally:
        # what the Inductor of torch 2.4 loads has been linked with -ffast-math, and takes them from the whole process
        torch.set_flush_denormal(False)
    assert handler.nfev > 0
    assert_learned_alike(cut, trained_twin(smooth))


class Detached(nn.Module):
    """Cuts in whatever precision it is, which numpy would not."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.inner, self.cut = nn.Linear(8, 8), cut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x).tanh()
        return y.detach() if self.cut else y


def test_autocast_costs_a_bound_module_no_digits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Detached(cut=True))
    x, target = torch.randn(16, 8), torch.randint(-4, 4, (16, 8)).float() / 4
    seen: dict[str, Tensor] = {}
    model[0].register_forward_hook(lambda module, args, output: seen.update(h=output.detach()))

    def update(engine: Engine, batch: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(batch)
        assert y.dtype == torch.bfloat16
        (y.float() * target).sum().backward()

    engine = Engine(update)
    with FiniteDifferenceGradients(model, "1").attach(engine):
        engine.run([x])
    assert seen["h"].dtype == torch.bfloat16
    # the truth for the module: what went into it, in float64
    twin = Detached(cut=False).double()
    twin.load_state_dict(model[1].state_dict())
    h = seen["h"].double().requires_grad_()
    true = torch.autograd.grad((twin(h) * target).sum(), [*twin.parameters(), h])
    found = [parameter.grad for parameter in model[1].parameters()]
    # central differences in float32, see `accuracy`; in bfloat16 they would be off by 2^-8 over their step, 0.25
    assert relative_error(found, true[:2]) <= 3e-5
    # further up the gradient of h goes through bfloat16 into a product: two roundings of 2^-8 at most
    into_h = x.double().T @ true[2]
    first = model.get_parameter("0.weight").grad
    assert relative_error([first], [into_h.T]) <= 2 * 2.0**-8


def test_functional_call_differentiates_what_it_is_given() -> None:
    cut, smooth = twins(sequential)
    x = batches(1)[0][0]
    others = {name: (value.detach() + 0.5).requires_grad_() for name, value in smooth.named_parameters()}
    found: list[tuple[Tensor, ...]] = []

    def update(engine: Engine, batch: Tensor) -> None:
        y = torch.func.functional_call(cut, others, (batch,))
        found.append(torch.autograd.grad(y.sin().sum(), [*others.values()]))

    engine = Engine(update)
    with FiniteDifferenceGradients(cut, "1").attach(engine):
        engine.run([x])
    true = torch.autograd.grad(torch.func.functional_call(smooth, others, (x,)).sin().sum(), [*others.values()])
    assert relative_error(found[0], true) <= CENTRAL64
    assert all(parameter.grad is None for parameter in cut.parameters())


def test_loggers_see_the_run_and_the_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboardX")
    cut, _ = twins(sequential)
    trainer = trainer_of(cut)
    handler = FiniteDifferenceGradients(cut, "1").attach(trainer)
    spent: list[tuple[int, float]] = []

    class Written:
        """A writer that keeps what it is given."""

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            spent.append((step, value))

        def close(self) -> None:
            pass

    tensorboard = TensorboardLogger(log_dir=str(tmp_path))
    tensorboard.writer.close()
    tensorboard.writer = Written()
    tensorboard.attach_output_handler(
        trainer,
        Events.ITERATION_COMPLETED,
        tag="blackbox",
        output_transform=lambda output: {"nfev": handler.nfev},
    )
    norms: dict[str, float] = {}

    @trainer.on(Events.ITERATION_COMPLETED)
    def norms_of_gradients() -> None:
        norms.update({name: float(p.grad.norm()) for name, p in cut.named_parameters() if p.grad is not None})

    ProgressBar(persist=True).attach(trainer, output_transform=lambda loss: {"loss": loss, "nfev": handler.nfev})
    trainer.run(batches())
    tensorboard.close()
    # two evaluations for each of 12 parameters and of 6 x 3 inputs, at each of three batches
    assert spent == [(step, 60.0 * step) for step in (1, 2, 3)]
    assert norms.keys() == dict(cut.named_parameters()).keys()
    assert all(norms.values())
    assert "nfev=180" in capsys.readouterr().err


class TestStacked:
    """Points in one call along the batch axis, through modules and the handler."""

    @pytest.mark.parametrize("wrapped", [False, True], ids=["bind", "Blackbox"])
    def test_modules(self, wrapped: bool) -> None:
        cut, smooth = twins(Cell)
        sizes: list[int] = []
        forward = cut.forward

        def counted(x: Tensor, h: Tensor) -> Tensor:
            sizes.append(len(x))
            return forward(x, h)  # type: ignore[no-any-return]

        cut.forward = counted
        options: dict[str, Any] = {"in_dims": 0, "executor": StackedEvaluation()}
        if wrapped:
            module: Any = Blackbox(cut, **options)
            count = module.count
        else:
            module, count = cut, EvaluationCount()
            bind(cut, count=count, **options)
        mine = [torch.randn(7, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        theirs = [x.detach().clone().requires_grad_() for x in mine]
        for _ in range(3):  # at the third gradient nothing is verified
            for x in (*mine, *cut.parameters()):
                x.grad = None
            sizes.clear()
            spent = count.nfev
            module(*mine).sin().sum().backward()
        smooth(*theirs).sin().sum().backward()
        assert_near(gradients(cut, *mine), gradients(smooth, *theirs))
        # forward; each of 6 weights, which rows share, both ways; and 4 columns of x and h both ways in one call
        assert sizes == [7] + [7] * 12 + [7 * 8]
        assert count.nfev - spent == 12 + 8

    @pytest.mark.parametrize("modules", [None, "cell"])
    def test_the_handler(self, modules: Any) -> None:
        cut, smooth = twins(Recurrent)
        x = torch.randn(4, 3, 1, dtype=torch.float64)
        for model in (cut, smooth):
            trainer = create_supervised_trainer(
                model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss, model_transform=lambda output: output[0]
            )
            if model is cut:
                handler = FiniteDifferenceGradients(cut, modules, in_dims=0, executor=StackedEvaluation())
                handler.attach(trainer)
            trainer.run([(x, x.cumsum(0).tanh())] * 2)
        assert_learned_alike(cut, smooth.state_dict())
        assert handler.nfev > 0

    def test_without_in_dims_it_says_so(self) -> None:
        cut, _ = twins(sequential)
        trainer = trainer_of(cut)
        with (
            pytest.raises(ValueError, match=r"StackedEvaluation needs to know .* in_dims"),
            FiniteDifferenceGradients(cut, "1", executor=StackedEvaluation()).attach(trainer),
        ):
            trainer.run(batches())
