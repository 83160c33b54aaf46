from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from ignite.metrics import Accuracy, Loss, MeanAbsoluteError, MeanSquaredError
from torch import nn
from torch.nn import functional as F

from ignite_tbptt import (
    ContiguousStreams,
    FixedTruncation,
    Tbptt_Events,
    create_supervised_tbptt_evaluator,
    split_sequence,
    time_steps_as_samples,
)
from tests.helpers import Forecaster, batches, seeded, weights

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("steps", [1, 4, 10, 100])
def test_metrics_are_those_of_the_whole_output(kind: Any, steps: int) -> None:
    model = seeded(lambda: Forecaster(kind))
    data = batches(3)
    metrics = {
        "loss": Loss(F.mse_loss, batch_size=torch.numel),
        "mae": MeanAbsoluteError(),
        "mse": MeanSquaredError(output_transform=lambda output: (output[0].flatten(), output[1].flatten())),
    }
    state = create_supervised_tbptt_evaluator(model, metrics, steps).run(data)
    with torch.no_grad():
        y_pred = torch.cat([model(x)[0] for x, _ in data])
    y = torch.cat([y for _, y in data])
    # Sums of 240 terms in another order.
    tolerance = 240 * EPS
    assert state.metrics["loss"] == pytest.approx(F.mse_loss(y_pred, y).item(), rel=tolerance)
    assert state.metrics["mse"] == pytest.approx(F.mse_loss(y_pred, y).item(), rel=tolerance)
    assert state.metrics["mae"] == pytest.approx((y_pred - y).abs().sum().item() / len(y), rel=tolerance)


def test_class_targets_with_rows_first() -> None:
    class Tagger(Forecaster):
        def forward(self, x: torch.Tensor, hidden: Any = None) -> Any:
            y, hidden = super().forward(x.transpose(0, 1), hidden)
            return y.transpose(0, 1), hidden

    model = seeded(Tagger)
    x, y = torch.randn(4, 9, 3), torch.randint(0, 2, (4, 9))
    metrics = {
        "accuracy": Accuracy(),
        "loss": Loss(F.cross_entropy, batch_size=torch.numel),
    }
    evaluator = create_supervised_tbptt_evaluator(
        model, metrics, 4, dim=1, model_transform=lambda y_pred: y_pred.transpose(1, 2)
    )
    state = evaluator.run([(x, y)])
    logits = model(x)[0].transpose(1, 2)
    assert state.metrics["accuracy"] == (logits.argmax(1) == y).double().mean().item()
    assert state.metrics["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=36 * EPS)


def test_metrics_that_would_count_rows_again_are_warned_about() -> None:
    class RowsFirst(Forecaster):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 5, batch_first=True)

    data = [(torch.randn(4, 9, 3), torch.randn(4, 9, 2))]
    model = seeded(RowsFirst)

    def run(steps: int, metric: Any = None, **kwargs: Any) -> float:
        metrics = {"l": metric or Loss(F.mse_loss)}
        state = create_supervised_tbptt_evaluator(model, metrics, steps, dim=1, **kwargs).run(data)
        return float(state.metrics["l"])

    for metric in (Loss(F.mse_loss), MeanAbsoluteError(), MeanSquaredError()):
        with pytest.warns(UserWarning, match="the metrics l divide by the rows.*time_steps_as_samples"):
            run(4, metric)
    run(9)
    x, y = data[0]
    error = model(x)[0].detach() - y
    assert run(4, Loss(F.mse_loss, batch_size=torch.numel)) == pytest.approx(error.square().mean().item(), rel=72 * EPS)
    for steps in (1, 4, 9):
        whole = error.abs().sum().item() / 36
        assert run(steps, MeanAbsoluteError(), output_transform=time_steps_as_samples) == pytest.approx(
            whole, rel=72 * EPS
        )


def test_time_steps_are_samples_only_where_the_axes_agree() -> None:
    with pytest.raises(ValueError, match=r"y_pred of shape \(4, 2, 9\) and y of shape \(4, 9\) must begin"):
        time_steps_as_samples(None, torch.zeros(4, 9), torch.zeros(4, 2, 9))


def test_many_to_one_is_measured_on_the_chunk_that_has_the_target() -> None:
    class Classifier(Forecaster):
        def forward(self, x: torch.Tensor, hidden: Any = None) -> Any:
            y, hidden = super().forward(x, hidden)
            return y[-1], hidden

    model = seeded(Classifier)
    x, y = batches(1)[0]
    evaluator = create_supervised_tbptt_evaluator(
        model, {"loss": Loss(F.mse_loss)}, 4, split_batch=partial(split_sequence, final=[1])
    )
    expected = F.mse_loss(model(x)[0], y[-1]).item()
    assert evaluator.run([(x, y[-1])]).metrics["loss"] == pytest.approx(expected, rel=8 * EPS)


def test_the_state_goes_across_batches_where_it_is_asked_to() -> None:
    model = seeded(Forecaster)
    x, y = batches(1, steps=12)[0]
    whole = F.mse_loss(model(x)[0], y).item()
    streams = [(x[:5], y[:5]), (x[5:], y[5:])]
    metrics = {"loss": Loss(F.mse_loss, batch_size=torch.numel)}
    stateful = create_supervised_tbptt_evaluator(model, metrics, 4, stateful=True)
    for _ in range(2):  # a second run begins anew
        assert stateful.run(streams).metrics["loss"] == pytest.approx(whole, rel=96 * EPS)
    assert create_supervised_tbptt_evaluator(model, metrics, 4).run(streams).metrics["loss"] != pytest.approx(whole)


def test_streams_are_evaluated_as_their_rows() -> None:
    model = seeded(Forecaster)
    x, y = torch.randn(30, 3), torch.randn(30, 2)
    metrics = {"loss": Loss(F.mse_loss, batch_size=torch.numel)}
    evaluator = create_supervised_tbptt_evaluator(model, metrics, 2, stateful=True)
    state = evaluator.run(ContiguousStreams((x, y), rows=3, steps=4))
    rows = model(x.view(3, 10, 3).transpose(0, 1))[0]
    assert state.metrics["loss"] == pytest.approx(
        F.mse_loss(rows, y.view(3, 10, 2).transpose(0, 1)).item(), rel=60 * EPS
    )


def test_nothing_is_trained_and_no_graph_is_kept() -> None:
    model = seeded(Forecaster).train()
    before = weights(model)
    evaluator = create_supervised_tbptt_evaluator(model, tbtt_step=4)
    seen: list[bool] = []
    evaluator.add_event_handler(
        Tbptt_Events.TIME_ITERATION_COMPLETED,
        lambda e: seen.append(model.training or e.state.hidden.requires_grad or e.state.output[0].requires_grad),
    )
    evaluator.run(batches(1))
    assert seen == [False] * 3
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_an_initial_state_and_an_output_of_ones_own() -> None:
    model = seeded(Forecaster)
    h0 = torch.full((1, 4, 5), 0.5)
    x, y = batches(1)[0]
    outputs: list[torch.Tensor] = []
    evaluator = create_supervised_tbptt_evaluator(
        model, tbtt_step=4, initial_hidden=lambda x: h0, output_transform=lambda x, y, y_pred: outputs.append(y_pred)
    )
    evaluator.run([(x, y)])
    assert torch.allclose(torch.cat(outputs), model(x, h0)[0], rtol=0, atol=4 * EPS)


def test_a_policy_has_no_place_here() -> None:
    policy: Any = FixedTruncation(4)
    with pytest.raises(TypeError, match="tbtt_step must be an int, the time steps of a chunk, got FixedTruncation"):
        create_supervised_tbptt_evaluator(Forecaster(), tbtt_step=policy)
