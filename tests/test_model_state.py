"""What runs again starts from where it started, whatever the model keeps, or it is refused."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from ignite.handlers.param_scheduler import LinearCyclicalScheduler, LRScheduler
from ignite.handlers.state_param_scheduler import PiecewiseLinearStateScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt import (
    AdaptiveTruncation,
    FullBackpropagation,
    GradientHorizon,
    SlidingTruncation,
    Tbptt_Events,
    create_supervised_tbptt_trainer,
)
from ignite_tbptt.model_state import ModelState
from tests.helpers import Forecaster, batches, same, seeded, sgd, weights

DATA = [tuple(part.double() for part in batch) for batch in batches(2, steps=12)]


class Keeps(Forecaster):
    """A model that keeps something beside its parameters, made by `start` and used by `use`."""

    def __init__(self, start: Callable[[], Any], use: Callable[[Keeps, Tensor], Any]) -> None:
        super().__init__()
        self.kept, self.use = start(), use

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        y, hidden = super().forward(x, hidden)
        return self.use(self, y), hidden


@dataclass
class Memory:
    mean: Tensor
    count: int = 0


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1.0


class OfTheClass:
    sign = 1


SIGN = 1


def flips(model: Keeps, y: Tensor) -> Any:
    model.kept = -model.kept
    return y * model.kept


def flips_a_global(model: Keeps, y: Tensor) -> Any:
    global SIGN  # noqa: PLW0603
    SIGN = -SIGN
    return y * SIGN


def flips_a_class(model: Keeps, y: Tensor) -> Any:
    model.kept.sign = -model.kept.sign
    return y * model.kept.sign


def counts(model: Keeps, y: Tensor) -> Any:
    model.kept.append(len(model.kept))
    return y / len(model.kept)


def remembers(model: Keeps, y: Tensor) -> Any:
    model.kept.count += 1
    model.kept.mean = model.kept.mean * 0.9 + y.detach().mean()
    return y * model.kept.mean + model.kept.count


def slots(model: Keeps, y: Tensor) -> Any:
    model.kept.value *= 1.1
    return y * model.kept.value


def writes(model: Keeps, y: Tensor) -> Any:
    model.kept.mul_(0.9).add_(y.detach().mean())
    return y * model.kept.clone()


def norms(model: Keeps, y: Tensor) -> Any:
    return model.kept["norm"](y.flatten(0, 1)).view_as(y)


KEEPERS: dict[str, tuple[Callable[[], Any], Callable[[Keeps, Tensor], Any]]] = {
    "number": (lambda: 1.0, flips),
    "global": (lambda: None, flips_a_global),
    "class": (lambda: OfTheClass, flips_a_class),
    "list": (list, counts),
    "dataclass": (lambda: Memory(torch.ones((), dtype=torch.float64)), remembers),
    "slots": (Slots, slots),
    "tensor in place": (lambda: torch.ones((), dtype=torch.float64), writes),
    "array": (lambda: np.ones(()), lambda model, y: y * float(model.kept.__imul__(1.1))),
    "module in a dict": (lambda: {"norm": nn.BatchNorm1d(2).double()}, norms),
    "numpy": (lambda: None, lambda model, y: y[torch.from_numpy(np.random.permutation(len(y)))]),
    "python": (lambda: None, lambda model, y: y * random.random()),
    "own numpy": (lambda: np.random.default_rng(3), lambda model, y: y * model.kept.random()),
    "own torch": (
        lambda: torch.Generator().manual_seed(3),
        lambda model, y: y * torch.rand((), generator=model.kept, dtype=torch.float64),
    ),
    "own python": (lambda: random.Random(3), lambda model, y: y * model.kept.random()),
    "dropout": (lambda: None, lambda model, y: F.dropout(y, 0.4)),
}


def run(make: Callable[[], Any], horizon: bool = False, lr: float = 0.1, policy: Any = None, **kwargs: Any) -> Any:
    """Train with everything seeded; return the model, its losses and the next random numbers."""
    global SIGN  # noqa: PLW0603
    SIGN = OfTheClass.sign = 1
    model = seeded(make).double()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    losses: list[float] = []
    policy = policy or FullBackpropagation(3)
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model, lr), kwargs.pop("loss_fn", F.mse_loss), policy, **kwargs
    )
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, lambda e: losses.append(e.state.output))
    if horizon:
        GradientHorizon(8, samples=2).attach(trainer)
    trainer.run(DATA)
    return model, losses, [torch.rand(1).item(), np.random.rand(), random.random()]


@pytest.mark.parametrize("kept", KEEPERS.values(), ids=KEEPERS.keys())
def test_segments_that_run_again_meet_what_the_model_kept(kept: Any) -> None:
    plain, losses, after = run(lambda: Keeps(*kept))
    model, ours, ours_after = run(lambda: Keeps(*kept), checkpoint_segments=True)
    assert ours_after == after
    assert ours[0] == losses[0]
    assert ours == pytest.approx(losses, rel=1e-12)
    for one, truth in zip(weights(model), weights(plain), strict=True):
        assert torch.allclose(one, truth, rtol=1e-12, atol=1e-14)  # the order of sums over segments
    if isinstance(plain.kept, dict):
        norm, truth = model.kept["norm"], plain.kept["norm"]
        assert norm.num_batches_tracked == truth.num_batches_tracked == 8
        assert torch.allclose(norm.running_var, truth.running_var, rtol=1e-12)


@pytest.mark.parametrize("kept", KEEPERS.values(), ids=KEEPERS.keys())
def test_a_measurement_puts_back_what_the_model_kept(kept: Any) -> None:
    plain, losses, after = run(lambda: Keeps(*kept))
    model, ours, ours_after = run(lambda: Keeps(*kept), horizon=True)
    assert (ours, ours_after) == (losses, after)
    assert same(weights(model), weights(plain))
    if isinstance(plain.kept, dict):
        assert same(list(model.kept["norm"].buffers()), list(plain.kept["norm"].buffers()))


def test_a_measurement_puts_back_embeddings_that_are_renormed_and_data_that_are_written_into() -> None:
    class Tokens(Forecaster):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3, max_norm=0.5)

        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            x[..., 0].mul_(0.5)
            return super().forward(self.embedding((x[..., 0].abs() * 4).long().clamp(max=4)), hidden)

    def trained(horizon: bool) -> list[Tensor]:
        data, DATA[:] = list(DATA), [tuple(part.clone() for part in batch) for batch in DATA]
        try:
            return weights(run(Tokens, horizon)[0])
        finally:
            DATA[:] = data

    assert same(trained(True), trained(False))


def test_what_a_measurement_cannot_put_back_is_said() -> None:
    turns = itertools.cycle([1.0, 2.0, 3.0])
    with pytest.warns(UserWarning, match="it keeps a state, or draws random numbers, where they cannot be put back"):
        run(lambda: Keeps(lambda: None, lambda model, y: y * next(turns)), horizon=True)


@pytest.mark.parametrize("how", ["sign", "rows", "element"])
def test_a_second_run_of_other_values_is_refused_though_the_norms_are_the_same(how: str) -> None:
    turn = itertools.count()

    def differs(model: Keeps, y: Tensor) -> Any:
        if next(turn) < 4 or how == "never":
            return y
        if how == "sign":
            return -y
        if how == "rows":
            return y.flip(0)
        sign = torch.ones_like(y)
        sign[1, 1, 1] = -1
        return y * sign

    with pytest.raises(RuntimeError, match="gave other results than the first time"):
        run(lambda: Keeps(lambda: None, differs), checkpoint_segments=True, loss_fn=lambda a, b: a.square().mean())


class InPlaceContainer(Forecaster):
    """Writes its state into the container that it is given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        y, h = super().forward(x, None if hidden is None else self.get(hidden))
        if hidden is None:
            return y, {"dict": {"h": h}, "list": [h, 0], "dataclass": Memory(h)}[self.kind]
        if self.kind == "dict":
            hidden["h"] = h
        elif self.kind == "list":
            hidden[0] = h
            hidden[1] += 1
        else:
            hidden.mean, hidden.count = h, hidden.count + 1
        return y, hidden

    def get(self, hidden: Any) -> Tensor:
        h: Tensor = hidden.mean if self.kind == "dataclass" else hidden[{"dict": "h", "list": 0}[self.kind]]
        return h


@pytest.mark.parametrize("policy", [3, SlidingTruncation(2, 4), FullBackpropagation(3)], ids=str)
@pytest.mark.parametrize("kind", ["dict", "list", "dataclass"])
def test_a_container_of_state_may_be_written_into(kind: str, policy: Any) -> None:
    arguments: dict[str, Any] = {"policy": policy, "stateful": True}
    model, losses, _ = run(lambda: InPlaceContainer(kind), checkpoint_segments=True, **arguments)
    truth, expected, _ = run(Forecaster, **arguments)
    assert losses == pytest.approx(expected, rel=1e-12)
    for one, other in zip(weights(model), weights(truth), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


class Leaky(nn.Module):
    """Integrates in place: h <- 0.9 h + w x."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.w, self.in_place = nn.Linear(3, 2), in_place

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.shape[1], 2) if h is None else h
        outputs = []
        for x_t in x:
            h = h.mul_(0.9).add_(self.w(x_t)) if self.in_place else h * 0.9 + self.w(x_t)
            outputs.append(h.clone())
        return torch.stack(outputs), h


@pytest.mark.parametrize(
    "policy", [4, SlidingTruncation(2, 4), SlidingTruncation(3, 5), FullBackpropagation(3)], ids=str
)
@pytest.mark.parametrize("arguments", [{}, {"horizon": True}, {"checkpoint_segments": True}], ids=str)
def test_a_state_that_is_written_in_place_is_as_good_as_a_new_one(policy: Any, arguments: Any) -> None:
    common = {"policy": policy, "stateful": True}
    model, losses, _ = run(lambda: Leaky(True), **common, **arguments)
    truth, expected, _ = run(lambda: Leaky(False), **common)
    assert losses == pytest.approx(expected, rel=1e-13)
    for one, other in zip(weights(model), weights(truth), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_the_decay_of_a_state_that_is_written_in_place_is_that_of_a_new_one() -> None:
    phi = []
    for in_place in (True, False):
        model = seeded(functools.partial(Leaky, in_place)).double()
        trainer = create_supervised_tbptt_trainer(model, sgd(model, 0.0), F.mse_loss, 4)
        horizon = GradientHorizon(8, samples=2)
        horizon.attach(trainer)
        trainer.run(DATA)
        phi.append(list(horizon.decay.phi))
    assert phi[0] == phi[1]


class Neuron(nn.Module):
    """Keeps its membrane on itself, as spiking networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.mem: Any = None

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for x_t in x:
            self.mem = self.fc(x_t) if self.mem is None else 0.9 * self.mem + self.fc(x_t)
            outputs.append(self.mem)
        return torch.stack(outputs)


def train_neuron(policy: Any, horizon: bool = False, checkpointed: bool = False, detach: bool = True) -> Any:
    model: Any = seeded(Neuron).double()
    losses: list[float] = []
    trainer: Any = create_supervised_tbptt_trainer(
        model,
        sgd(model),
        F.mse_loss,
        policy,
        model_fn=lambda model, x, hidden: (model(x), model.mem if detach else None),
        checkpoint_segments=checkpointed,
    )

    @trainer.on(Tbptt_Events.TIME_ITERATION_COMPLETED)
    def note(engine: Any) -> None:
        losses.append(engine.state.output)
        if detach:
            model.mem = model.mem.detach()

    @trainer.on(Events.ITERATION_STARTED)
    def reset() -> None:
        if detach:
            model.mem = None

    if horizon:
        GradientHorizon(8, samples=2).attach(trainer)
    trainer.run(DATA)
    return losses, weights(model)


def test_a_measurement_puts_back_neurons_that_keep_their_state() -> None:
    losses, truth = train_neuron(4)
    ours, trained = train_neuron(4, horizon=True)
    assert ours == losses
    assert same(trained, truth)


def test_the_gradient_through_an_attribute_crosses_segments_that_are_recomputed() -> None:
    losses, truth = train_neuron(FullBackpropagation(3))
    ours, trained = train_neuron(FullBackpropagation(3), checkpointed=True)
    assert ours == pytest.approx(losses, rel=1e-12)
    for one, other in zip(trained, truth, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_overlapping_windows_refuse_neurons_that_keep_their_state() -> None:
    with pytest.raises(ValueError, match=r"keeps a state of its own that is not rewound: mem\. Return it"):
        train_neuron(SlidingTruncation(2, 4))


@pytest.mark.parametrize("kind", ["count", "activations", "momentum", "spectral norm", "own generator"])
def test_overlapping_windows_take_what_is_no_state_of_the_sequence(kind: str) -> None:
    def use(model: Any, y: Tensor) -> Any:
        if kind == "activations":
            model.seen = y
        elif kind == "momentum":
            with torch.no_grad():
                model.kept.weight.mul_(0.9)
            return y + model.kept(y.detach())
        elif kind == "spectral norm":
            return y + model.kept(y)
        elif kind == "own generator":
            return y * torch.rand((), generator=model.kept)
        else:
            model.kept += 1
        return y

    makers: dict[str, Callable[[], Any]] = {
        "momentum": lambda: nn.Linear(2, 2).requires_grad_(False),
        "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
        "own generator": lambda: torch.Generator().manual_seed(3),
    }
    model, losses, _ = run(lambda: Keeps(makers.get(kind, int), use), policy=SlidingTruncation(2, 4))
    assert len(losses) == 12
    if kind == "count":
        assert model.kept == 22  # the check of the first prefix has been put back


def test_the_graph_of_an_earlier_window_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"keeps tensors with the graph of an earlier window: mem\. The trainer"):
        train_neuron(4, detach=False)


@pytest.mark.parametrize("policy", [4, SlidingTruncation(2, 4), SlidingTruncation(2, 3)], ids=str)
def test_batch_normalisation_counts_every_time_that_steps_are_run(policy: Any) -> None:
    model, _, _ = run(
        lambda: Keeps(lambda: nn.BatchNorm1d(2), lambda m, y: m.kept(y.flatten(0, 1)).view_as(y)), policy=policy
    )
    # Two batches of 12 steps: three chunks each; or 6 windows, of which 5 have a prefix of one segment. Of (2, 3) the
    # windows start one step before a multiple of 2, so that all new steps but the last two are two segments.
    assert int(model.kept.num_batches_tracked) == {"4": 6, "SlidingTruncation(k1=2, k2=4)": 22}.get(str(policy), 2 * 16)


# What torch itself brings along


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_around_the_whole_run(enabled: bool) -> None:
    def trained(checkpointed: bool) -> list[Tensor]:
        model = seeded(Forecaster)
        trainer = create_supervised_tbptt_trainer(
            model,
            sgd(model),
            lambda y_pred, y: F.mse_loss(y_pred.float(), y),
            FullBackpropagation(3),
            checkpoint_segments=checkpointed,
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            trainer.run(batches(1, steps=12))
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    ours, truth = trained(True), trained(False)
    for one, other in zip(ours, truth, strict=True):
        eps = 2.0**-8 if enabled else 2.0**-22  # four segments, the same terms summed in another order
        assert torch.allclose(one, other, rtol=4 * eps, atol=4 * eps * float(other.abs().max()))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_gradient_penalty_inside_the_model(hooked: bool) -> None:
    class Penalised(Forecaster):
        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y, hidden = super().forward(x, hidden)
                (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            return y + slope.square().mean(), hidden

    def make() -> nn.Module:
        model = Penalised(nn.RNN)
        if hooked:
            model.head.weight.register_hook(lambda gradient: gradient * 1.0)
        return model

    plain, losses, _ = run(make)
    model, ours, _ = run(make, checkpoint_segments=True)
    assert ours == pytest.approx(losses, rel=1e-12)
    for one, truth in zip(weights(model), weights(plain), strict=True):
        assert torch.allclose(one, truth, rtol=1e-11, atol=1e-14)


def test_an_embedding_that_is_renormed_in_a_segment_is_refused() -> None:
    class Tokens(Forecaster):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3, max_norm=0.1)

        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            return super().forward(self.embedding((x[..., 0].abs() * 2).long().clamp(max=4)), hidden)

    with pytest.raises(ValueError, match=r"it was given, embedding\.weight, and would meet .* without max_norm"):
        run(Tokens, checkpoint_segments=True)


def test_lazy_modules_get_their_shapes_in_a_plain_segment_and_before_a_measurement() -> None:
    def make() -> Any:
        return Keeps(nn.LazyBatchNorm1d, lambda m, y: m.kept(y.flatten(0, 1)).view_as(y))

    plain, losses, _ = run(make)
    model, ours, _ = run(make, checkpoint_segments=True)
    assert ours == pytest.approx(losses, rel=1e-12)
    assert model.kept.num_batches_tracked == plain.kept.num_batches_tracked == 8
    with pytest.raises(ValueError, match=r"lazy parameters, kept\.weight, .* call the model once"):
        run(make, horizon=True)


def test_a_measurement_in_inference_mode_is_refused() -> None:
    model = seeded(Forecaster).double()
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4)
    trainer.run(DATA)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.inference_mode\(\) does not allow"):
        GradientHorizon(8, samples=2).measure(trainer)


def test_a_copy_of_a_trainers_step_recomputes_its_own_model() -> None:
    model: Any = seeded(lambda: Keeps(*KEEPERS["dataclass"])).double()
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model), F.mse_loss, FullBackpropagation(3), checkpoint_segments=True
    )
    trainer.run(DATA)
    recompute, twin = copy.deepcopy((trainer.state.tbptt.step.recompute, model))
    before = weights(twin)
    x, y = DATA[0]
    loss = recompute(lambda x, y, h: F.mse_loss(twin(x, h)[0], y), x, y, None)
    loss.backward()
    expected = copy.deepcopy(model)
    for parameter in expected.parameters():
        parameter.grad = None
    F.mse_loss(expected(x)[0], y).backward()
    ours = [p.grad for p in twin.parameters()]
    assert same(before, weights(twin))
    assert twin.kept.count == expected.kept.count == 9
    assert all(o is not None for o in ours)


# The snapshot


def test_names_are_spelled_as_one_would_write_them() -> None:
    model: Any = seeded(lambda: Keeps(*KEEPERS["dataclass"])).double()
    model.norm = nn.BatchNorm1d(2).double()
    state = ModelState.of(model)
    assert state.now() is state
    model(DATA[0][0])
    model.norm(DATA[0][1][0])
    names = ["kept.count", "kept.mean", *(f"norm.{name}" for name, _ in model.norm.named_buffers())]
    assert sorted(state.changed()) == sorted(names)
    state.restore()
    assert state.changed() == []
    assert model.kept.count == 0


# Horizon and adaptation


def trainer_of(model: nn.Module, lr: float = 0.1, tbtt_step: Any = 4) -> tuple[Any, torch.optim.Optimizer]:
    optimizer = sgd(model, lr)
    return create_supervised_tbptt_trainer(model, optimizer, F.mse_loss, tbtt_step), optimizer


def test_a_measurement_of_nan_is_discarded() -> None:
    trainer, optimizer = trainer_of(seeded(Forecaster).double(), 0.0)
    horizon = GradientHorizon(8, samples=2)
    horizon.attach(trainer)
    AdaptiveTruncation(horizon, 0.5, 2, 12, optimizer).attach(trainer)
    found: list[Any] = []
    trainer.add_event_handler(
        Events.ITERATION_STARTED,
        lambda e: found.append((horizon.decay, e.state.gradient_decay_rate, e.state.tbtt_step)),
    )
    (x, y), _ = DATA
    broken = x.clone()
    broken[1] = math.nan
    with pytest.warns(UserWarning, match="measurement of the gradient horizon was discarded"):
        trainer.run([(x, y), (broken, y)])
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="gradients are NaN"):
        horizon.measure(trainer)


def test_handlers_detach() -> None:
    events: list[Any] = [
        Events.ITERATION_STARTED,
        Events.ITERATION_STARTED(every=1),
        Events.ITERATION_STARTED | Events.ITERATION_COMPLETED,
    ]
    for event in events:
        trainer, optimizer = trainer_of(seeded(Forecaster).double())
        horizon = GradientHorizon(8, samples=2)
        adaptive = AdaptiveTruncation(horizon, 0.5, 2, 3, optimizer)
        horizon.attach(trainer, event)
        adaptive.attach(trainer)
        with pytest.raises(ValueError, match="attached already"):
            adaptive.attach(trainer)
        adaptive.detach(trainer)
        trainer.run(DATA)
        assert trainer.state.tbtt_step == 4
        decay = horizon.decay
        horizon.detach(trainer)
        horizon.detach(trainer)
        trainer.run(DATA)
        assert horizon.decay is decay
        horizon.attach(trainer, event)
        adaptive.attach(trainer)
        trainer.run(DATA)
        assert trainer.state.tbtt_step == 3


def test_two_adaptive_truncations_are_refused() -> None:
    trainer, _ = trainer_of(Forecaster())
    horizon, other = GradientHorizon(8, samples=2), GradientHorizon(8, samples=2)
    for each in (horizon, other):
        each.attach(trainer, Events.ITERATION_STARTED(every=2))
    AdaptiveTruncation(horizon, 0.5, 1, 9).attach(trainer)
    for each in (horizon, other):
        with pytest.raises(ValueError, match="another AdaptiveTruncation sets the tbtt_step of this engine"):
            AdaptiveTruncation(each, 0.5, 1, 9).attach(trainer)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["torch", "ignite torch", "ignite", "tbtt_step"])
def test_a_scheduler_beside_is_refused(kind: str, late: bool, filtered: bool) -> None:
    trainer, optimizer = trainer_of(seeded(Forecaster).double())
    event: Any = Events.ITERATION_COMPLETED(every=1) if filtered else Events.ITERATION_COMPLETED
    horizon = GradientHorizon(8, samples=2)
    horizon.attach(trainer)
    adaptive = AdaptiveTruncation(horizon, 0.5, 1, 9, optimizer)
    if late:
        adaptive.attach(trainer)
    if kind == "tbtt_step":
        PiecewiseLinearStateScheduler([(1, 4), (9, 8)], "tbtt_step").attach(trainer, event)
    elif kind == "ignite":
        trainer.add_event_handler(event, LinearCyclicalScheduler(optimizer, "lr", 0.1, 0.2, 10))
    else:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer.add_event_handler(event, LRScheduler(scheduler) if kind == "ignite torch" else scheduler.step)
    message = "sets tbtt_step as well" if kind == "tbtt_step" else "sets the learning rates of the optimizer"
    with pytest.raises(ValueError, match=message):
        trainer.run(DATA) if late else adaptive.attach(trainer)


def test_schedulers_of_other_things_go_along() -> None:
    model = seeded(Forecaster).double()
    trainer, optimizer = trainer_of(model)
    horizon = GradientHorizon(8, samples=2)
    horizon.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, LinearCyclicalScheduler(sgd(model), "lr", 0.1, 0.2, 10))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, LinearCyclicalScheduler(optimizer, "momentum", 0.1, 0.2, 10))
    AdaptiveTruncation(horizon, 0.5, 3, 3, optimizer).attach(trainer)
    trainer.run(DATA)
    assert trainer.state.tbtt_step == 3
