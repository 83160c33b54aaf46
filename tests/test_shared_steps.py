"""Windows that share an optimizer step: how their losses are weighted, and what handlers see of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import TerminateOnNan
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt import (
    AnticipatedReweightedTruncation,
    FullBackpropagation,
    RandomTruncation,
    Segment,
    Tbptt_Events,
    Window,
    create_supervised_tbptt_trainer,
    split_sequence,
)
from tests.helpers import Forecaster, batches, same, seeded, sgd, weights


def doubles(*args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y.double()) for x, y in batches(*args, **kwargs)]


def step_gradients(trainer: Any, model: nn.Module) -> list[list[Tensor]]:
    steps: list[list[Tensor]] = []
    trainer.add_event_handler(
        Tbptt_Events.BACKWARD_COMPLETED,
        lambda: steps.append([p.grad.clone() for p in model.parameters() if p.grad is not None]),
    )
    return steps


def gradient(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


def assert_close(ours: list[Tensor], truth: list[Tensor]) -> None:
    """The same sums in another order: some hundred terms, each right to 1e-16."""
    for one, other in zip(ours, truth, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-13)


def chunk_losses(model: Any, x: Tensor, y: Tensor, steps: int, loss_fn: Any = F.mse_loss) -> list[Tensor]:
    losses, hidden = [], None
    for x_t, y_t in zip(x.split(steps), y.split(steps), strict=True):
        y_pred, hidden = model(x_t, None if hidden is None else hidden.detach())
        losses.append(loss_fn(y_pred, y_t))
    return losses


# Over batches


class OutputAlone(Forecaster):
    def forward(self, x: Tensor, hidden: Any = None) -> Any:
        return super().forward(x, hidden)[0]


def test_windows_share_a_step_over_batches_as_ignites_argument_has_it() -> None:
    data = batches(8, steps=4)
    ours, theirs = seeded(Forecaster), seeded(OutputAlone)
    trainer = create_supervised_tbptt_trainer(ours, sgd(ours), F.mse_loss, 4, gradient_accumulation_steps=4)
    trainer.run(data)
    create_supervised_trainer(theirs, sgd(theirs), F.mse_loss, gradient_accumulation_steps=4).run(data)
    assert trainer.state.optimizer_step == 2
    assert same(weights(ours), weights(theirs))


def test_windows_left_at_the_end_of_an_epoch_are_stepped_on() -> None:
    data = doubles(5, steps=4)
    model = seeded(Forecaster).double()
    trainer = create_supervised_tbptt_trainer(model, sgd(model, 0.0), F.mse_loss, 4, gradient_accumulation_steps=3)
    steps = step_gradients(trainer, model)
    trainer.run(data, max_epochs=2)
    assert trainer.state.optimizer_step == 4
    losses = [F.mse_loss(model(x)[0], y) for x, y in data]
    for index, members in enumerate([losses[:3], losses[3:]] * 2):
        assert_close(steps[index], gradient(sum(members) / len(members), model))  # type: ignore[arg-type]


def test_where_the_end_of_an_epoch_is_not_known_windows_wait_for_the_next_and_are_told_of() -> None:
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, gradient_accumulation_steps=2)
    with pytest.warns(UserWarning, match=r"ended while 1 windows waited .* epoch_length"):
        trainer.run(iter(batches(3, steps=4)))
    assert trainer.state.optimizer_step == 1


@pytest.mark.parametrize("how", ["terminate", "terminate_epoch"])
def test_windows_before_a_termination_do_not_leak_into_the_next_step(how: str) -> None:
    data = doubles(4, steps=4)
    model = seeded(Forecaster).double()
    trainer = create_supervised_tbptt_trainer(model, sgd(model, 0.0), F.mse_loss, 4, gradient_accumulation_steps=2)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda engine: getattr(engine, how)())
    steps = step_gradients(trainer, model)
    trainer.run(data, max_epochs=2)
    if how == "terminate":
        trainer.run(data, max_epochs=2)
    losses = [F.mse_loss(model(x)[0], y) for x, y in data]
    pairs = [losses[:2], losses[:2], losses[2:]]
    for step, pair in zip(steps, pairs, strict=False):
        assert_close(step, gradient(sum(pair) / 2, model))  # type: ignore[arg-type]
    assert len(steps) >= 3


# What counts


def masked_mse(y_pred: Tensor, y: Tensor) -> Tensor:
    valid = ~y.isnan()
    return ((y_pred - y)[valid] ** 2).mean()


def valid_entries(x: Tensor, y: Tensor) -> Tensor:
    return (~y.isnan()).sum()


@pytest.mark.parametrize("accumulate", [1, 2, 3, "sequence"])
@pytest.mark.parametrize("truncation", [4, FullBackpropagation(4)])
def test_padded_windows_of_a_step_are_the_mean_over_all_that_counts(accumulate: Any, truncation: Any) -> None:
    (x, y), *_ = doubles(1, steps=12)
    for row, length in enumerate((12, 7, 2, 5)):
        y[length:, row] = float("nan")
    model = seeded(Forecaster).double()
    trainer = create_supervised_tbptt_trainer(
        model,
        sgd(model, 0.0),
        masked_mse,
        truncation,
        loss_weight=valid_entries,
        gradient_accumulation_steps=accumulate,
    )
    steps = step_gradients(trainer, model)
    trainer.run([(x, y)])
    sums = chunk_losses(model, x, y, 4, lambda y_pred, y: masked_mse(y_pred, y) * valid_entries(x, y))
    counts = [int(valid_entries(x, part)) for part in y.split(4)]
    if truncation != 4:
        assert_close(steps[0], gradient(masked_mse(model(x)[0], y), model))
        return
    size = 3 if accumulate == "sequence" else accumulate
    for index, step in enumerate(steps):
        members = slice(index * size, (index + 1) * size)
        assert_close(step, gradient(sum(sums[members]) / sum(counts[members]), model))  # type: ignore[arg-type]


def test_parameters_outside_the_optimizer_get_the_same_correction() -> None:
    (x, y), *_ = doubles(1, steps=12)
    y[4:] = float("nan")
    model: Any = seeded(Forecaster).double()
    scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
            return masked_mse(self.scale * y_pred, y)

    trainer = create_supervised_tbptt_trainer(
        model,
        torch.optim.SGD(model.rnn.parameters(), lr=0.0),
        Scaled(),
        4,
        loss_weight=valid_entries,
        gradient_accumulation_steps="sequence",
    )
    seen: list[Tensor] = []
    everything = [*model.parameters(), scale]
    trainer.add_event_handler(Tbptt_Events.BACKWARD_COMPLETED, lambda: seen.extend(p.grad.clone() for p in everything))
    trainer.run([(x, y)])
    truth = torch.autograd.grad(masked_mse(scale * model(x[:4])[0], y[:4]), everything)
    assert_close(seen, list(truth))


SUM = nn.MSELoss(reduction="sum")


@pytest.mark.parametrize("loss_fn", [SUM, partial(F.mse_loss, reduction="sum")])
@pytest.mark.parametrize("accumulate", [1, 2, "sequence"])
@pytest.mark.parametrize(
    "truncation", [4, FullBackpropagation(4), RandomTruncation(4, std=1.0, halve_probability=0, minimum=2)]
)
def test_a_loss_that_is_a_sum_is_summed(loss_fn: Any, accumulate: Any, truncation: Any) -> None:
    (x, y), *_ = doubles(1, steps=10)
    model = seeded(Forecaster).double()
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model, 0.0), loss_fn, truncation, gradient_accumulation_steps=accumulate
    )
    steps = step_gradients(trainer, model)
    trainer.run([(x, y)])
    if truncation == 4:
        losses = chunk_losses(model, x, y, 4, SUM)
        size = 3 if accumulate == "sequence" else accumulate
        for index, step in enumerate(steps):
            assert_close(step, gradient(sum(losses[index * size : (index + 1) * size]), model))  # type: ignore[arg-type]
    elif isinstance(truncation, FullBackpropagation):
        assert_close(steps[0], gradient(SUM(model(x)[0], y), model))
    else:
        # Of the linear layer nothing is truncated: its gradients over all steps add up to that of the whole sum.
        total = [sum(parts) for parts in zip(*steps, strict=True)]
        hidden_free = gradient(SUM(model(x)[0], y), model)
        assert_close(total[-2:], hidden_free[-2:])


# One target for a sequence


class Classifier(Forecaster):
    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        y, hidden = super().forward(x, hidden)
        return y[-1], hidden


@dataclass(frozen=True)
class GivenCuts:
    """The windows of AnticipatedReweightedTruncation for one pattern of cuts."""

    policy: AnticipatedReweightedTruncation
    cuts: tuple[bool, ...]

    sums_losses = True

    def windows(self, length: int, generator: torch.Generator) -> Iterator[Window]:
        window = [Segment(0, 1, 1.0, 1 / self.policy.mean)]
        for start, cut in enumerate(self.cuts, 1):
            scale = 1 / (1 - self.policy.cut_probability(len(window)))
            if cut:
                yield tuple(window)
                window, scale = [], 1.0
            window.append(Segment(start, start + 1, scale, 1 / self.policy.mean))
        yield tuple(window)

    def probability(self) -> float:
        product, since = 1.0, 1
        for cut in self.cuts:
            probability = self.policy.cut_probability(since)
            product *= probability if cut else 1 - probability
            since = 1 if cut else since + 1
        return product


@pytest.mark.parametrize("accumulate", [1, 3, "sequence"])
def test_the_one_loss_of_a_sequence_keeps_its_weight_and_is_unbiased_by_exact_enumeration(accumulate: Any) -> None:
    (x, y), *_ = doubles(1, steps=6)
    policy = AnticipatedReweightedTruncation(1, alpha=6, mean=4)
    expected: list[Tensor] = []
    total = 0.0
    for cuts in product([False, True], repeat=5):
        given = GivenCuts(policy, cuts)
        model = seeded(Classifier).double()
        trainer = create_supervised_tbptt_trainer(
            model,
            sgd(model, 0.0),
            F.mse_loss,
            given,
            gradient_accumulation_steps=accumulate,
            split_batch=partial(split_sequence, final=[1]),
        )
        steps = step_gradients(trainer, model)
        trainer.run([(x, y[-1])])
        probability = given.probability()
        total += probability
        terms = [probability * part for part in steps[-1]]
        expected = [a + b for a, b in zip(expected, terms, strict=True)] if expected else terms
    assert total == pytest.approx(1.0, rel=1e-14)
    model = seeded(Classifier).double()
    assert_close(expected, gradient(F.mse_loss(model(x)[0], y[-1]), model))


def test_windows_without_a_loss_have_no_output() -> None:
    (x, y), *_ = batches(1)
    model = seeded(Classifier)
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model, 0.0), F.mse_loss, 4, split_batch=partial(split_sequence, final=[1])
    )
    outputs: list[Any] = []
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, lambda e: outputs.append(e.state.output))
    state = trainer.run([(x, y[-1])])
    assert outputs[:2] == [None, None]
    assert state.output == outputs[2] == pytest.approx(F.mse_loss(model(x)[0], y[-1]).item(), rel=1e-6)


def test_a_batch_without_a_counting_step_has_no_output() -> None:
    (x, y), *_ = batches(1)
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), masked_mse, 4, loss_weight=valid_entries)
    seen: list[Any] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
    trainer.run([(x, torch.full_like(y, float("nan"))), (x, y)])
    assert seen[0] is None
    assert seen[1] > 0
    assert trainer.state.optimizer_step == 3


# Handlers that look at the gradients


@pytest.mark.parametrize("accumulate", [2, 3, "sequence"])
@pytest.mark.parametrize("bad_step", [1, 5, 9])
def test_a_nan_in_any_window_of_a_step_withholds_it(accumulate: Any, bad_step: int) -> None:
    (x, y), *_ = batches(1, steps=12)
    y[bad_step] = float("nan")
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, gradient_accumulation_steps=accumulate)
    trainer.add_event_handler(Tbptt_Events.BACKWARD_COMPLETED, TerminateOnNan())
    trainer.run([(x, y)])
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert trainer.should_terminate


def test_the_output_is_the_steps_at_events_of_the_step_and_the_windows_own_otherwise() -> None:
    (x, y), *_ = batches(1, steps=10)
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model, 0.0), F.mse_loss, 4, gradient_accumulation_steps=3)
    log: list[tuple[str, float]] = []
    for event in Tbptt_Events:
        if event is not Tbptt_Events.TIME_ITERATION_STARTED:
            trainer.add_event_handler(event, lambda e, name: log.append((name, e.state.output)), event.name)
    state = trainer.run([(x, y)])
    losses = [loss.item() for loss in chunk_losses(model, x, y, 4)]
    mean = pytest.approx((4 * losses[0] + 4 * losses[1] + 2 * losses[2]) / 10, rel=1e-6)
    assert log == [
        ("TIME_ITERATION_COMPLETED", losses[0]),
        ("TIME_ITERATION_COMPLETED", losses[1]),
        ("BACKWARD_COMPLETED", mean),
        ("OPTIMIZER_STEP_COMPLETED", mean),
        ("TIME_ITERATION_COMPLETED", losses[2]),
    ]
    assert state.output == mean
