"""Segments in one node of the graph: the gradient is that of the plain graph, or torch.utils.checkpoint takes over."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ignite_tbptt import FullBackpropagation, GradientHorizon, Tbptt_Events, create_supervised_tbptt_trainer
from ignite_tbptt.blackbox import CentralDifference, FiniteDifferenceGradients
from ignite_tbptt.recompute import Recompute
from tests.helpers import CustomCell, Forecaster, PairState, RecordState, batches, seeded, sgd

NODE = "_NodeBackward"


class Tied(nn.Module):
    """The same weights twice: as two names of one parameter, and at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 3)
        self.head = nn.Linear(3, 2)
        self.rnn.weight_hh_l0 = self.rnn.weight_ih_l0

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, h = self.rnn(x, h)
        return self.head(y), h


class LearnedState(Forecaster):
    """The first state is a parameter, met in the first segment alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, 5))

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        return super().forward(x, self.first.expand(-1, x.shape[1], -1).contiguous() if hidden is None else hidden)


class NormedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.utils.parametrizations.weight_norm(nn.GRU(3, 5), "weight_hh_l0")
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 2))

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        y, hidden = self.rnn(x, hidden)
        return self.head(y), hidden


class WritesIntoItsState(Forecaster):
    """Where a state has a history, the model writes into it; the first is its own."""

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        return super().forward(x, None if hidden is None else hidden.mul_(0.5))


class SameState(Forecaster):
    """The state is handed on as it came, beside a detached one."""

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        y, h = super().forward(x, None if hidden is None else hidden["h"])
        first = h if hidden is None else hidden["first"]
        return y + first.mean(), {"h": h, "first": first, "last": h.detach(), "steps": len(x), "none": None}


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Tied()
        self.run = torch.compile(self.inner, backend="aot_eager")

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        return self.run(x, x.new_zeros(1, x.shape[1], 3) if hidden is None else hidden)  # type: ignore[no-any-return]


class ReentrantCheckpoint(Forecaster):
    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        y, hidden = self.rnn(x, hidden)
        return checkpoint(self.head, y, use_reentrant=True), hidden


class HookedWeights(Forecaster):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight.register_hook(lambda gradient: gradient.clamp(-1e-2, 1e-2) * 2)


class WeightsOfElsewhere(nn.Module):
    """Its weights are made before the segments, of a parameter that only they know."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Forecaster()
        self.log_scale = nn.Parameter(torch.tensor(0.3))
        self.scale: Any = None

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        if hidden is None:
            self.scale = self.log_scale.exp()
        y, hidden = self.inner(x, hidden)
        return y * self.scale, hidden


class OwnKindOfParameter(Forecaster):
    def __init__(self) -> None:
        super().__init__()

        class Kind(nn.Parameter):
            pass

        self.head.bias = Kind(torch.zeros(2))


def weights_by_hand(wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> Callable[[], nn.Module]:
    return lambda: CustomCell(wrap, unwrap)


IN_ONE_NODE: dict[str, Callable[[], nn.Module]] = {
    "gru": Forecaster,
    "lstm": lambda: Forecaster(nn.LSTM),
    "tied": Tied,
    "learned state": LearnedState,
    "parametrized": NormedWeights,
    "writes into its state": WritesIntoItsState,
    "state as it came": SameState,
    "compiled": Compiled,
    "tuple with None": weights_by_hand(lambda h: (h, None), lambda state: state[0]),
    "named tuple": weights_by_hand(lambda h: PairState(h, None), lambda state: state.h),
    "dataclass": weights_by_hand(RecordState, lambda state: state.h),
    "dict": weights_by_hand(lambda h: {"h": [h]}, lambda state: state["h"][0]),
}

LEFT_TO_CHECKPOINT: dict[str, Callable[[], nn.Module]] = {
    "reentrant checkpoint": ReentrantCheckpoint,
    "hook on a weight": HookedWeights,
    "another kind of parameter": OwnKindOfParameter,
}


def train(
    model: nn.Module, checkpointed: bool, seen: list[str] | None = None, loss_fn: Any = F.mse_loss, **kwargs: Any
) -> list[Tensor]:
    """Run one batch in segments and return the gradients; `seen` gets the name of the last segment's node."""
    data = [tuple(part.double() for part in batch) for batch in batches(2, steps=12)]

    def note(x: Any, y: Any, y_pred: Any, loss: Any) -> float:
        if seen is not None:
            seen.append(y_pred.grad_fn.name())
        return float(loss.item())

    torch.manual_seed(1)
    trainer = create_supervised_tbptt_trainer(
        model,
        sgd(model),
        loss_fn,
        FullBackpropagation(3),
        checkpoint_segments=checkpointed,
        output_transform=note,
        **kwargs,
    )
    trainer.run(data)
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_same(ours: list[Tensor], truth: list[Tensor]) -> None:
    """The sums over segments are the same but for their order: some hundred terms, each right to 1e-16."""
    assert len(ours) == len(truth) > 0
    for one, other in zip(ours, truth, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", IN_ONE_NODE.values(), ids=IN_ONE_NODE.keys())
def test_the_gradient_of_a_segment_in_one_node_is_that_of_its_graph(make: Callable[[], nn.Module]) -> None:
    plain, model, seen = seeded(make).double(), seeded(make).double(), list[str]()
    truth = train(plain, False)
    assert_same(train(model, True, seen), truth)
    assert_same(list(model.state_dict().values()), list(plain.state_dict().values()))
    assert seen == [NODE, NODE]


@pytest.mark.parametrize("make", LEFT_TO_CHECKPOINT.values(), ids=LEFT_TO_CHECKPOINT.keys())
def test_what_does_not_fit_in_one_node_is_left_to_checkpoint(make: Callable[[], nn.Module]) -> None:
    seen: list[str] = []
    assert_same(train(seeded(make).double(), True, seen), train(seeded(make).double(), False))
    assert NODE not in seen


def test_weights_made_outside_of_the_segments_keep_their_gradient() -> None:
    def gradient(checkpointed: bool) -> list[Tensor]:
        model = seeded(WeightsOfElsewhere).double()
        return train(model, checkpointed)

    assert_same(gradient(True), gradient(False))


def test_a_parameter_that_the_loss_alone_knows_keeps_its_gradient() -> None:
    def gradient(checkpointed: bool) -> list[Tensor]:
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        train(seeded(Forecaster).double(), checkpointed, seen, lambda y_pred, y: F.mse_loss(scale * y_pred, y))
        assert scale.grad is not None
        return [scale.grad]

    seen: list[str] = []
    truth = gradient(False)
    seen.clear()
    assert_same(gradient(True), truth)
    assert NODE not in seen


def test_a_loss_module_has_parameters_too() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(self.scale * y_pred, y)

    def gradient(checkpointed: bool) -> list[Tensor]:
        loss = Weighted()
        train(seeded(Forecaster).double(), checkpointed, seen, loss)
        assert loss.scale.grad is not None
        return [loss.scale.grad]

    seen: list[str] = []
    truth = gradient(False)
    seen.clear()
    assert_same(gradient(True), truth)
    assert seen == [NODE, NODE]


@pytest.mark.parametrize("of_the_model", [False, True])
def test_an_initial_state_is_trained(of_the_model: bool) -> None:
    """Of the model: it is argument and parameter at once, and both parts of its gradient count."""

    class Uses(Forecaster):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(1, 4, 5)) if of_the_model else None

        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            y, hidden = super().forward(x, hidden)
            return (y if self.first is None else y + self.first.sum()), hidden

    def gradient(checkpointed: bool) -> list[Tensor]:
        model: Any = seeded(Uses).double()
        first: Any = (
            model.first if of_the_model else torch.full((1, 4, 5), 0.5, dtype=torch.float64, requires_grad=True)
        )
        train(model, checkpointed, seen, initial_hidden=lambda x: first)
        return [first.grad]

    seen: list[str] = []
    truth = gradient(False)
    seen.clear()
    assert_same(gradient(True), truth)
    assert seen == [NODE, NODE]


@pytest.mark.parametrize("late", [False, True])
def test_hooks_on_weights_fire_once_a_backward_pass(late: bool) -> None:
    """Late: put there after the first window, when segments have been in one node already."""
    model: Any = seeded(Forecaster).double()
    calls: list[str] = []

    def hook() -> None:
        model.head.weight.register_hook(lambda gradient: calls.append("tensor"))

    if not late:
        hook()
    model.head.weight.register_post_accumulate_grad_hook(lambda weight: calls.append("post"))
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model), F.mse_loss, FullBackpropagation(3), checkpoint_segments=True
    )
    if late:
        trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED(once=1), hook)
    trainer.run([tuple(part.double() for part in batch) for batch in batches(2, steps=12)])
    assert calls == (["post", "tensor", "post"] if late else ["tensor", "post"] * 2)


def test_gradients_are_scaled() -> None:
    def gradient(checkpointed: bool) -> list[Tensor]:
        model = seeded(Forecaster).double()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        # The model is in float64, which autocast leaves alone.
        return train(model, checkpointed, amp_mode="amp", scaler=scaler)

    assert_same(gradient(True), gradient(False))


def test_autocast_is_replayed() -> None:
    """A GRU: nn.LSTM in bfloat16 is not for every CPU."""

    class Watching(Forecaster):
        calls: Any = None

        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            y, hidden = super().forward(x, hidden)
            assert (torch.is_autocast_enabled("cpu"), y.dtype) == (True, torch.bfloat16)
            next(self.calls)
            return y, hidden

    results = []
    for checkpointed in (False, True):
        model: Any = seeded(Watching)
        model.calls = itertools.count()
        trainer = create_supervised_tbptt_trainer(
            model,
            sgd(model),
            lambda y_pred, y: F.mse_loss(y_pred.float(), y),
            FullBackpropagation(3),
            amp_mode="amp",
            checkpoint_segments=checkpointed,
        )
        trainer.run(batches(1, steps=12))
        assert next(model.calls) == (8 if checkpointed else 4)
        results.append([parameter.grad for parameter in model.parameters()])
    for ours, truth in zip(*results, strict=True):
        # Sums of four segments, the same terms to the bit: rounded to bfloat16 within a segment, to float32 over them.
        assert torch.allclose(ours, truth, rtol=2.0**-8, atol=2.0**-8 * truth.abs().max().item())


def segment_of(model: nn.Module) -> tuple[Tensor, Tensor, Recompute]:
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    hidden = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
    return x, hidden, Recompute(model)


def test_backward_may_be_repeated_and_restricted() -> None:
    model: Any = seeded(Forecaster).double()
    x, hidden, recompute = segment_of(model)
    y, _ = recompute(lambda x, _, h: model(x, h), x, None, hidden)
    assert y.grad_fn.name() == NODE
    truth = torch.autograd.grad(model(x, hidden)[0].sum(), [hidden, *model.parameters()])
    y.sum().backward(retain_graph=True)
    y.sum().backward(retain_graph=True)
    y.sum().backward(inputs=[hidden])
    factors = [3, *[2] * 6]
    ours = [hidden.grad, *(parameter.grad for parameter in model.parameters())]
    assert_same(ours, [factor * gradient for factor, gradient in zip(factors, truth, strict=True)])
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_a_step_between_forward_and_backward_is_refused() -> None:
    model: Any = seeded(Forecaster).double()
    x, hidden, recompute = segment_of(model)
    y, _ = recompute(lambda x, _, h: model(x, h), x, None, hidden)
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_gradient_of_the_gradient_is_refused() -> None:
    model: Any = seeded(Forecaster).double()
    x, hidden, recompute = segment_of(model)
    y, _ = recompute(lambda x, _, h: model(x, h), x, None, hidden)
    with pytest.raises(RuntimeError, match="create_graph=True needs a trainer without checkpoint_segments"):
        torch.autograd.grad(y.sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        (
            True,
            r"run again for its gradient gave other results .* keeps a state, or draws",
        ),
        (False, "a segment that is run again for its gradient has a graph of"),
    ],
)
def test_a_segment_that_does_something_else_the_second_time_is_refused(differs: bool, message: str) -> None:
    class Drops(Forecaster):
        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            y, hidden = super().forward(x, hidden)
            return (y if next(dice) < 0.5 else other(y)), hidden

    def other(y: Tensor) -> Tensor:
        return y.tanh() if differs else y * 1

    dice = iter([0.1, 0.9])  # out of reach
    model: Any = seeded(Drops).double()
    x, hidden, recompute = segment_of(model)
    y, _ = recompute(lambda x, _, h: model(x, h), x, None, hidden)
    with pytest.raises(RuntimeError, match=message):
        y.sum().backward()


def test_no_graph_is_made_where_none_is_wanted() -> None:
    model: Any = seeded(Forecaster).double()
    x, hidden, recompute = segment_of(model)
    with torch.no_grad():
        assert not recompute(lambda x, _, h: model(x, h), x, None, hidden)[0].requires_grad
    model.requires_grad_(False)
    y, _ = recompute(lambda x, _, h: model(x, h), x, None, hidden.detach())
    assert not y.requires_grad
    y, _ = recompute(lambda x, _, h: model(x, h), x, None, hidden)  # the state alone
    y.sum().backward()
    assert hidden.grad is not None
    assert model.head.weight.grad is None


def test_a_segment_that_no_loss_depends_on_is_not_run_again() -> None:
    class Resets(Forecaster):
        def __init__(self) -> None:
            super().__init__()
            self.calls = itertools.count()

        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            next(self.calls)
            return super().forward(x, None if hidden is None else torch.zeros_like(hidden))

    def gradient(checkpointed: bool) -> list[Tensor]:
        return train(model[checkpointed], checkpointed, loss_weight=lambda x, y: 3.0 * (y[0, 0, 0] in last))

    last = [y.double()[9, 0, 0] for _, y in batches(2, steps=12)]
    model: list[Any] = [seeded(Resets).double() for _ in range(2)]
    assert_same(gradient(True), gradient(False))
    assert [next(each.calls) for each in model] == [8, 10]


def test_a_sparse_gradient_stays_sparse() -> None:
    class Tokens(Forecaster):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3, sparse=True)

        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            return super().forward(self.embedding((x[..., 0].abs() * 2).long().clamp(max=4)), hidden)

    ours, truth = (train(seeded(Tokens).double(), checkpointed)[-1] for checkpointed in (True, False))
    assert ours.is_sparse
    assert_same([ours.to_dense()], [truth.to_dense()])


def test_a_blackbox_in_a_segment_gets_its_gradients() -> None:
    class Simulator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5, -1.5], dtype=torch.float64))

        def forward(self, y: Tensor) -> Tensor:
            return torch.from_numpy((self.weight * y).sin().detach().numpy())

    class Simulated(Forecaster):
        def __init__(self) -> None:
            super().__init__()
            self.simulator = Simulator()

        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            y, hidden = super().forward(x, hidden)
            return self.simulator(y), hidden

    def gradient(checkpointed: bool) -> list[Tensor]:
        model: Any = seeded(Simulated).double()
        trainer = create_supervised_tbptt_trainer(
            model, sgd(model), F.mse_loss, FullBackpropagation(3), checkpoint_segments=checkpointed
        )
        FiniteDifferenceGradients(model, modules=["simulator"], estimator=CentralDifference()).attach(trainer)
        trainer.run([tuple(part.double() for part in batch) for batch in batches(1, steps=12)])
        return [parameter.grad for parameter in model.parameters()]

    assert_same(gradient(True), gradient(False))


def test_the_horizon_is_measured_between_segments() -> None:
    def measured(checkpointed: bool) -> list[float]:
        model = seeded(Forecaster).double()
        trainer = create_supervised_tbptt_trainer(
            model, sgd(model), F.mse_loss, FullBackpropagation(3), checkpoint_segments=checkpointed
        )
        horizon = GradientHorizon(10, samples=4, tolerance=0.5)
        horizon.attach(trainer)
        trainer.run([tuple(part.double() for part in batch) for batch in batches(2, steps=12)])
        return list(horizon.decay.phi)

    assert measured(True) == pytest.approx(measured(False), rel=1e-10)


def test_a_segment_of_other_parameters_the_second_time_is_refused() -> None:
    layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    layers[1].load_state_dict(layers[0].state_dict())  # the same results
    turns = iter(range(2))

    def of_the_next(x: Tensor, *_: Any) -> Tensor:  # as many operations both times
        return torch.tanh(layers[next(turns)](x)).sum()

    loss = Recompute(layers)(of_the_next, torch.ones(2, 3), None, None)
    with pytest.raises(RuntimeError, match=r"not the same ones: the model and loss_fn must do the same both times"):
        loss.backward()


@pytest.mark.parametrize("fits", [True, False], ids=["one node", "checkpoint"])
def test_a_segment_that_writes_into_its_input_is_refused(fits: bool) -> None:
    layer = nn.Linear(3, 3)
    recompute = Recompute(layer)
    recompute._fits_one_node = fits
    with pytest.raises(ValueError, match=r"written into a tensor of shape \(2, 3\) that it was given"):
        recompute(lambda x, *_: layer(x.mul_(2)).sum(), torch.ones(2, 3), None, None)
