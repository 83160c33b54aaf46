"""What the trainer does beyond contrib's, each against a loop written by hand or the gradient of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt import (
    EpochTimeWise,
    FixedTruncation,
    FullBackpropagation,
    RunningTimeWise,
    SequenceWise,
    SlidingTruncation,
    Tbptt_Events,
    create_supervised_tbptt_trainer,
    reset_hidden,
    split_sequence,
    supervised_tbptt_training_step,
)
from tests.helpers import (
    CustomCell,
    Forecaster,
    PairState,
    RecordState,
    WholeInSegments,
    batches,
    hand_written_loop,
    same,
    seeded,
    sgd,
    weights,
)

EPS = torch.finfo(torch.float32).eps


def trained(make: Callable[[], nn.Module], data: Any, steps: Any = 4, **kwargs: Any) -> list[Tensor]:
    model = seeded(make)
    create_supervised_tbptt_trainer(model, sgd(model), kwargs.pop("loss_fn", F.mse_loss), steps, **kwargs).run(data)
    return weights(model)


def by_hand(make: Callable[[], nn.Module], data: Any, steps: int = 4, **kwargs: Any) -> list[Tensor]:
    model = seeded(make)
    hand_written_loop(model, sgd(model), data, steps, **kwargs)
    return weights(model)


# Batches


class NestedInput(Forecaster):
    def forward(self, x: Any, hidden: Any = None) -> tuple[Any, Any]:
        y, hidden = super().forward(x["parts"][0] + x["parts"][1], hidden)
        return {"y": y}, hidden


def test_nested_batches_train_as_their_tensors_do() -> None:
    data = batches()
    nested = [({"parts": [x / 2, x / 2]}, {"y": y}) for x, y in data]
    loss_fn = lambda y_pred, y: F.mse_loss(y_pred["y"], y["y"])  # noqa: E731
    assert same(trained(NestedInput, nested, loss_fn=loss_fn), by_hand(Forecaster, data))


def test_a_batch_that_is_no_pair_trains_when_prepare_batch_makes_it_one() -> None:
    data = batches()
    records = [{"input": x, "target": y, "name": "record"} for x, y in data]

    def prepare_batch(batch: Any, device: Any, non_blocking: bool) -> Any:
        return batch["input"], batch["target"]

    assert same(trained(Forecaster, records, prepare_batch=prepare_batch), by_hand(Forecaster, data))


def test_static_covariates_go_with_every_chunk() -> None:
    class WithShift(Forecaster):
        def forward(self, x: Any, hidden: Any = None) -> tuple[Any, Any]:
            return super().forward(x["series"] + x["shift"], hidden)

    data = batches()
    shift = torch.randn(4, 3)
    given = [({"series": x, "shift": shift}, y) for x, y in data]
    split_batch = partial(split_sequence, static=[(0, "shift")])
    expected = by_hand(Forecaster, [(x + shift, y) for x, y in data])
    assert same(trained(WithShift, given, split_batch=split_batch), expected)


def test_chunks_are_prepared_one_by_one() -> None:
    shapes: list[tuple[int, ...]] = []

    def prepare_batch(batch: Any, device: Any, non_blocking: bool) -> Any:
        shapes.append(tuple(batch[0].shape))
        return batch

    trained(Forecaster, batches(1), prepare_batch=prepare_batch)
    assert shapes == [(4, 4, 3), (4, 4, 3), (2, 4, 3)]


# Hidden states

STATES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple with None": (lambda h: (h, None), lambda state: state[0]),
    "list": (lambda h: [h], lambda state: state[0]),
    "dict": (lambda h: {"h": h, "none": None}, lambda state: state["h"]),
    "named tuple": (lambda h: PairState(h, None), lambda state: state.h),
    "dataclass": (RecordState, lambda state: state.h),
}


@pytest.mark.parametrize("form", STATES)
def test_every_form_of_state_trains_alike(form: str) -> None:
    plain = by_hand(lambda: CustomCell(lambda h: h, lambda h: h), batches())
    assert same(trained(lambda: CustomCell(*STATES[form]), batches()), plain)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_lstm_with_projection() -> None:
    def make() -> nn.Module:
        return nn.LSTM(3, 6, proj_size=2)

    assert same(trained(make, batches()), by_hand(make, batches()))


def test_a_learned_initial_state_gets_a_gradient() -> None:
    class Learned(Forecaster):
        def __init__(self) -> None:
            super().__init__()
            self.h0 = nn.Parameter(torch.zeros(1, 1, 5))

    model = Learned()
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model), F.mse_loss, 4, initial_hidden=lambda x: model.h0.expand(-1, x.shape[1], -1).contiguous()
    )
    gradients: list[bool] = []
    trainer.add_event_handler(Tbptt_Events.BACKWARD_COMPLETED, lambda: gradients.append(model.h0.grad is not None))
    trainer.run(batches(1))
    assert gradients == [True, False, False]
    assert model.h0.abs().max() > 0


def test_a_stateful_trainer_carries_the_state_across_batches_and_resets_it_at_the_epoch() -> None:
    data = batches()
    model, twin = seeded(Forecaster), seeded(Forecaster)
    create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, stateful=True).run(data, max_epochs=2)
    optimizer = sgd(twin)
    for _ in range(2):
        hand_written_loop(twin, optimizer, data, 4, stateful=True)
    assert same(weights(model), weights(twin))
    assert not same(weights(model), by_hand(Forecaster, data))


def test_handlers_read_and_reset_the_state() -> None:
    """Resetting row 0 at every chunk is training on chunks whose row 0 begins anew."""
    model, twin = seeded(Forecaster), seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4)
    mask = torch.tensor([True, False, False, False])

    @trainer.on(Tbptt_Events.TIME_ITERATION_STARTED)
    def reset(engine: Any) -> None:
        if engine.state.hidden is not None:
            engine.state.hidden = reset_hidden(engine.state.hidden, mask)

    trainer.run(batches(1))
    optimizer = sgd(twin)
    hidden = torch.zeros(1, 4, 5)
    for x, y in zip(*(t.split(4) for t in batches(1)[0]), strict=True):
        keep = hidden.detach().clone()
        keep[:, 0] = 0
        optimizer.zero_grad()
        y_pred, hidden = twin(x, keep)
        F.mse_loss(y_pred, y).backward()
        optimizer.step()
    assert same(weights(model), weights(twin))


# Targets


def test_many_to_one_trains_on_the_last_chunk() -> None:
    class Classifier(Forecaster):
        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            y, hidden = super().forward(x, hidden)
            return y[-1], hidden

    data = [(x, y[-1]) for x, y in batches()]
    model = seeded(Classifier)
    optimizer = sgd(model)
    for x, y in data:
        with torch.no_grad():
            _, hidden = model(x[:8])
        optimizer.zero_grad()
        F.mse_loss(model(x[8:], hidden)[0], y).backward()
        optimizer.step()
    split_batch = partial(split_sequence, final=[1])
    for accumulate in (1, 3, "sequence"):
        given = trained(Classifier, data, split_batch=split_batch, gradient_accumulation_steps=accumulate)
        for ours, expected in zip(given, weights(model), strict=True):
            # Only the division of the loss by the length, undone on the gradient, rounds.
            assert torch.allclose(ours, expected, rtol=16 * EPS, atol=16 * EPS)


def masked_mse(y_pred: Tensor, y: Tensor) -> Tensor:
    valid = ~y.isnan()
    return ((y_pred - y)[valid] ** 2).mean()


def count_valid(x: Tensor, y: Tensor) -> Tensor:
    return (~y.isnan()).sum()


def padded(lengths: tuple[int, ...], steps: int = 10) -> tuple[Tensor, Tensor]:
    x, y = batches(1, steps=steps, rows=len(lengths))[0]
    for row, length in enumerate(lengths):
        y[length:, row] = float("nan")
    return x, y


def test_a_window_of_padding_advances_the_state_and_takes_no_step() -> None:
    x, y = padded((10, 10))
    y[4:8] = float("nan")  # the middle chunk has no target at all
    model, twin = seeded(Forecaster), seeded(Forecaster)
    steps: list[int] = []
    trainer = create_supervised_tbptt_trainer(model, sgd(model), masked_mse, 4, loss_weight=count_valid)
    trainer.add_event_handler(
        Tbptt_Events.OPTIMIZER_STEP_COMPLETED, lambda engine: steps.append(engine.state.time_iteration)
    )
    outputs: list[float] = []
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, lambda e: outputs.append(e.state.output))
    trainer.run([(x, y)])
    assert steps == [1, 3]
    assert trainer.state.optimizer_step == 2
    optimizer, hidden = sgd(twin), None
    losses = []
    for index, (x_t, y_t) in enumerate(zip(x.split(4), y.split(4), strict=True)):
        optimizer.zero_grad()
        y_pred, hidden = twin(x_t, None if hidden is None else hidden.detach())
        if index != 1:
            loss = masked_mse(y_pred, y_t)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert same(weights(model), weights(twin))
    assert outputs == [losses[0], None, losses[1]]
    assert trainer.state.output == pytest.approx((16 * losses[0] + 8 * losses[1]) / 24, rel=EPS)


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e3])
def test_padding_in_whole_sequence_mode_gives_the_mean_over_valid_steps(unit: float) -> None:
    """Chunks as long as the sequence leave nothing truncated: the gradient is that of the masked mean, in any unit."""
    x, y = padded((10, 7, 2))
    model, twin = seeded(Forecaster).double(), seeded(Forecaster).double()
    x, y = x.double(), y.double()
    masked_mse(twin(x)[0], y).backward()
    expected = [parameter.grad for parameter in twin.parameters()]
    gradients: list[Any] = []
    trainer = create_supervised_tbptt_trainer(
        model,
        sgd(model),
        masked_mse,
        FullBackpropagation(4),
        gradient_accumulation_steps="sequence",
        loss_weight=lambda x, y: unit * int(count_valid(x, y)),
    )
    trainer.add_event_handler(
        Tbptt_Events.BACKWARD_COMPLETED,
        lambda: gradients.extend(p.grad.clone() for p in model.parameters()),  # type: ignore[union-attr]
    )
    trainer.run([(x, y)])
    for ours, truth in zip(gradients, expected, strict=True):
        assert truth is not None
        assert torch.allclose(ours, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [-1.0, float("nan"), float("inf")])
def test_a_loss_weight_that_is_no_count_is_refused(count: float) -> None:
    with pytest.raises(ValueError, match="loss_weight must return a finite number that is not negative"):
        trained(Forecaster, batches(1), loss_weight=lambda x, y: count)


# Windows of several segments


@pytest.mark.parametrize("accumulate", [1, "sequence"])
def test_one_window_of_all_segments_is_full_back_propagation(accumulate: Any) -> None:
    x, y = (t.double() for t in batches(1)[0])
    model, twin = seeded(Forecaster).double(), seeded(Forecaster).double()
    F.mse_loss(twin(x)[0], y).backward()
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model, 0.0), F.mse_loss, FullBackpropagation(4), gradient_accumulation_steps=accumulate
    )
    trainer.run([(x, y)])
    for ours, truth in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None
        assert truth.grad is not None
        assert torch.allclose(ours.grad, truth.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_carry_scale_multiplies_the_gradient_that_crosses_into_a_segment(scale: float) -> None:
    """s <- w s with loss s_3 in three segments of one step: d/dw = s2 + c w (s1 + c w s0)."""
    w, s0 = 0.2, 0.9

    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

        def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            s = self.w * s
            return s, s

    model = Scalar()
    trainer = create_supervised_tbptt_trainer(
        model,
        sgd(model, 0.0),
        lambda y_pred, y: (y_pred * y).sum() * 3,  # the policy weighs each of the three segments by 1/3
        WholeInSegments(1, carry_scale=scale),
        initial_hidden=lambda x: torch.tensor([s0], dtype=torch.float64),
    )
    trainer.run([(torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))])
    s1, s2 = w * s0, w * w * s0
    assert model.w.grad is not None
    assert model.w.grad.item() == pytest.approx(s2 + scale * w * (s1 + scale * w * s0), rel=1e-14)


@pytest.mark.parametrize("stateful", [False, True])
def test_overlapping_windows_rerun_from_the_state_at_their_start(stateful: bool) -> None:
    """With frozen parameters the gradient at each step is that of the loss through exactly three earlier steps."""
    x, y = (t.double() for t in batches(1, steps=7)[0])
    model, twin = seeded(Forecaster).double(), seeded(Forecaster).double()
    gradients: list[list[Tensor]] = []
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model, 0.0), F.mse_loss, SlidingTruncation(1, 4), stateful=stateful
    )

    @trainer.on(Tbptt_Events.BACKWARD_COMPLETED)
    def keep() -> None:
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    trainer.run([(x, y)])
    states = [None, *(twin(x[: step + 1])[1].detach() for step in range(7))]
    for step in range(7):
        start = max(0, step - 3)
        twin.zero_grad()
        F.mse_loss(twin(x[start : step + 1], states[start])[0][-1:], y[step : step + 1]).backward()
        for ours, parameter in zip(gradients[step], twin.parameters(), strict=True):
            assert parameter.grad is not None
            assert torch.allclose(ours, parameter.grad, rtol=1e-10, atol=1e-12)


# Gradient accumulation


def accumulated(steps: Any, length: int, loss_fn: Any = F.mse_loss) -> tuple[list[list[Tensor]], Any]:
    model = seeded(Forecaster).double()
    trainer = create_supervised_tbptt_trainer(model, sgd(model, 0.0), loss_fn, 4, gradient_accumulation_steps=steps)
    gradients: list[list[Tensor]] = []

    @trainer.on(Tbptt_Events.BACKWARD_COMPLETED)
    def keep() -> None:
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    trainer.run([tuple(t.double() for t in batch) for batch in batches(1, steps=length)])
    return gradients, trainer


def chunk_gradients(length: int) -> list[list[Tensor]]:
    return accumulated(1, length)[0]


def test_accumulation_steps_on_the_mean_of_the_windows_and_the_last_part_is_not_lost() -> None:
    single = chunk_gradients(18)  # chunks of 4, 4, 4, 4 and 2 steps
    groups, trainer = accumulated(2, 18)
    assert trainer.state.optimizer_step == 3
    assert trainer.state.time_iteration == 5
    expected = [[0, 1], [2, 3], [4]]
    for group, members in zip(groups, expected, strict=True):
        for index, gradient in enumerate(group):
            mean = sum(single[member][index] for member in members) / len(members)
            assert torch.allclose(gradient, torch.as_tensor(mean), rtol=1e-12, atol=1e-15)


def test_sequence_accumulation_is_the_mean_over_the_sequence() -> None:
    single = chunk_gradients(18)
    (gradients,), trainer = accumulated("sequence", 18)
    assert trainer.state.optimizer_step == 1
    for index, gradient in enumerate(gradients):
        mean = sum(steps * single[chunk][index] for chunk, steps in enumerate((4, 4, 4, 4, 2))) / 18
        assert torch.allclose(gradient, torch.as_tensor(mean), rtol=1e-12, atol=1e-15)


# Hooks


def test_output_transform_sees_the_window() -> None:
    seen: list[tuple[Any, ...]] = []

    def output_transform(x: Tensor, y: Tensor, y_pred: Tensor, loss: Tensor) -> dict[str, Any]:
        seen.append((x.shape, y.shape, y_pred.shape))
        return {"loss": loss.detach(), "y_pred": y_pred}

    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, output_transform=output_transform)
    outputs: list[Any] = []
    trainer.add_event_handler(Tbptt_Events.BACKWARD_COMPLETED, lambda e: outputs.append(e.state.output["loss"].item()))
    state: Any = trainer.run(batches(1))
    twin = seeded(Forecaster)
    losses = hand_written_loop(twin, sgd(twin), batches(1), 4)
    assert outputs == losses
    assert seen[0] == ((4, 4, 3), (4, 4, 2), (4, 4, 2))
    mean = (4 * losses[0] + 4 * losses[1] + 2 * losses[2]) / 10
    assert state.output["loss"].item() == pytest.approx(mean, rel=4 * torch.finfo(torch.float32).eps)
    with pytest.raises(TypeError, match=r"of the batch is not there.*TIME_ITERATION_COMPLETED"):
        state.output["y_pred"].mean()


def test_model_fn_and_model_transform_adapt_a_model() -> None:
    class Reversed(Forecaster):
        def forward(self, hidden: Any, x: Tensor) -> tuple[Any, Tensor]:  # type: ignore[override]
            y, hidden = super().forward(x, hidden)
            return hidden, 2 * y

    given = trained(
        Reversed,
        batches(),
        model_fn=lambda model, x, hidden: tuple(reversed(model(hidden, x))),
        model_transform=lambda y_pred: y_pred / 2,
    )
    assert same(given, by_hand(Forecaster, batches()))


def test_the_step_on_an_engine_of_ones_own() -> None:
    model = seeded(Forecaster)
    step = supervised_tbptt_training_step(model, sgd(model), F.mse_loss, 4)
    calls: list[int] = []

    def update(engine: Engine, batch: Any) -> Any:
        calls.append(engine.state.iteration)
        return step(engine, batch)

    trainer = Engine(update)
    step.attach(trainer)
    trainer.run(batches())
    assert calls == [1, 2, 3]
    assert same(weights(model), by_hand(Forecaster, batches()))


def test_tbtt_step_is_read_at_every_batch() -> None:
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 5)
    assert trainer.state.tbtt_step == 5
    counts: list[int] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: counts.append(e.state.time_iterations_per_sequence))

    @trainer.on(Events.ITERATION_STARTED)
    def schedule(engine: Any) -> None:
        engine.state.tbtt_step = [5, 1.6, FixedTruncation(10)][engine.state.iteration - 1]

    trainer.run(batches())
    assert counts == [2, 5, 1]


def test_a_handler_may_evaluate_the_model_in_between() -> None:
    class Dropped(Forecaster):
        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            assert self.training
            return super().forward(x, hidden)

    model = seeded(Dropped)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4)
    for event in Tbptt_Events:
        trainer.add_event_handler(event, lambda: model.eval() and None)
    model.eval()
    trainer.run(batches())


def test_gradients_stay_readable_until_the_next_window() -> None:
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4)
    seen: list[bool] = []
    for event in (Tbptt_Events.TIME_ITERATION_COMPLETED, Events.ITERATION_COMPLETED):
        trainer.add_event_handler(event, lambda: seen.append(all(p.grad is not None for p in model.parameters())))
    trainer.run(batches(1))
    assert seen == [True] * 4


def test_a_callable_of_the_users_may_change_the_mode() -> None:
    modes: list[bool] = []

    class Watched(Forecaster):
        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            modes.append(self.training)
            return super().forward(x, hidden)

    model = seeded(Watched)

    def prepare_batch(batch: Any, device: Any, non_blocking: bool) -> Any:
        model.eval()
        return batch

    create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, prepare_batch=prepare_batch).run(batches(1))
    assert modes == [True] * 3


@pytest.mark.parametrize("policy", [FixedTruncation(4), WholeInSegments(4), SlidingTruncation(1, 3)])
def test_the_reported_loss_is_the_mean_over_the_steps_whatever_their_weights(policy: Any) -> None:
    model = seeded(Forecaster)
    constant = lambda y_pred, y: y_pred.mean() * 0 + 1.5  # noqa: E731
    trainer = create_supervised_tbptt_trainer(model, sgd(model), constant, policy)
    outputs: list[float] = []
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, lambda: outputs.append(trainer.state.output))
    assert trainer.run(batches(2)).output == pytest.approx(1.5, rel=8 * EPS)
    assert outputs == pytest.approx([1.5] * len(outputs), rel=8 * EPS)


def test_metrics_pass_over_windows_without_a_target() -> None:
    class Classifier(Forecaster):
        def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
            y, hidden = super().forward(x, hidden)
            return y[-1], hidden

    model = seeded(Classifier)
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model), F.mse_loss, 4, split_batch=partial(split_sequence, final=[1])
    )
    for name, usage in (("epoch", EpochTimeWise()), ("sequence", SequenceWise()), ("running", RunningTimeWise())):
        Average().attach(trainer, name, usage=usage)
    x, y = batches(1)[0]
    state = trainer.run([(x, y[-1])])
    output: Any = state.output
    assert set(state.metrics.values()) == {output}
    assert output > 0


@pytest.mark.parametrize("fails", [False, True])
def test_no_graph_outlives_the_batch(fails: bool) -> None:
    def loss_fn(y_pred: Tensor, y: Tensor) -> Tensor:
        if fails:
            raise RuntimeError("out of memory")
        return F.mse_loss(y_pred, y)

    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), loss_fn, 4)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.run(batches(1))
    else:
        trainer.run(batches(1))
        assert not trainer.state.hidden.requires_grad


def test_the_step_needs_its_events_and_a_scaler_that_is_one() -> None:
    model = seeded(Forecaster)
    step = supervised_tbptt_training_step(model, sgd(model), F.mse_loss, 4)
    with pytest.raises(RuntimeError, match=r"call attach\(engine\) on the training step"):
        Engine(step).run(batches(1))
    with pytest.raises(TypeError, match=r"scaler must be a torch.amp.GradScaler or None, got True"):
        supervised_tbptt_training_step(model, sgd(model), F.mse_loss, 4, amp_mode="amp", scaler=True)
    stateful = supervised_tbptt_training_step(model, sgd(model), F.mse_loss, 4, stateful=True)
    with pytest.warns(UserWarning, match="checkpoints of a plain Engine do not hold the carried hidden state"):
        stateful.attach(Engine(stateful))
