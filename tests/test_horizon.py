"""The horizon against recurrences whose decay is known, and the trace that it must not leave."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from ignite.handlers.tensorboard_logger import OutputHandler, TensorboardLogger
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt import (
    AdaptiveTruncation,
    FixedTruncation,
    GradientDecay,
    GradientHorizon,
    Tbptt_Events,
    create_supervised_tbptt_trainer,
    split_sequence,
)
from tests.helpers import Forecaster, batches, same, seeded, sgd, weights

GEOMETRIC = [0.9**k for k in range(1, 61)]


# The arithmetic


def test_the_papers_example() -> None:
    decay = GradientDecay(GEOMETRIC)
    assert decay.rate == pytest.approx(0.9, rel=1e-12)
    assert [decay.recommended(tolerance) for tolerance in (0.9, 0.5, 0.1)] == [2, 7, 22]


@given(rate=st.floats(0.05, 0.98), scale=st.floats(1e-6, 1e6), steps=st.integers(0, 100))
def test_the_relative_bias_of_a_geometric_decay_is_its_power(rate: float, scale: float, steps: int) -> None:
    """E(K) = rate^K times the whole; the lower bound on the whole is short of it by at most 2 rate^L, L lags."""
    lags = math.ceil(math.log(1e-6) / math.log(rate)) + 2
    decay = GradientDecay([scale * rate**k for k in range(1, lags + 1)])
    assert decay.rate == pytest.approx(rate, rel=1e-9)
    assert decay.relative_bias(steps) == pytest.approx(rate**steps, rel=3e-6 + 1e-9 * steps)


def test_the_fit_takes_the_tail_alone() -> None:
    """Fast decay at first and slow later: a fit to all lags would see neither."""
    phi = [0.5**k for k in range(1, 11)] + [0.5**10 * 0.95**k for k in range(1, 31)]
    assert GradientDecay(phi).rate == pytest.approx(0.95, rel=1e-9)
    assert GradientDecay(phi, fit_from=10).rate == pytest.approx(0.95, rel=1e-9)
    assert GradientDecay(phi[:10]).rate == pytest.approx(0.5, rel=1e-9)


def test_a_horizon_beyond_the_lags_is_extrapolated() -> None:
    # 300 lags and the answer 459 = first K with .99^K < .01; the bound is short of the truth by 2 x .99^300 = 10 %.
    decay = GradientDecay([0.99**k for k in range(1, 301)])
    recommended = decay.recommended(0.01)
    assert recommended is not None
    assert 458 < recommended < 459 + math.log(1 - 2 * 0.99**300) / math.log(0.99) + 1
    assert decay.relative_bias(recommended) < 0.01 <= decay.relative_bias(recommended - 1)


@given(rate=st.floats(0.05, 0.98), tolerance=st.floats(0.01, 2.0))
def test_the_recommended_chunk_is_the_first_whose_losses_are_within_the_tolerance_on_average(
    rate: float, tolerance: float
) -> None:
    """The mean of rate^j for j = 0, ..., steps - 1 is (1 - rate^steps) / (1 - rate) / steps."""
    lags = math.ceil(math.log(1e-6) / math.log(rate)) + 2
    decay = GradientDecay([rate**k for k in range(1, lags + 1)])

    def truth(steps: int) -> float:
        return (1 - rate**steps) / (1 - rate) / steps

    steps = decay.recommended_chunk(tolerance)
    assert steps is not None
    for length in (1, 2, steps, lags + 1, lags + 2, 10 * lags):
        assert decay.chunk_bias(length) == pytest.approx(truth(length), rel=4e-6)
    assert truth(steps) < tolerance * (1 + 4e-6)
    assert steps == 1 or truth(steps - 1) > tolerance * (1 - 4e-6)


@pytest.mark.parametrize("phi", [[1.0] * 20, [1.1**k for k in range(20)], [1.0, math.inf, math.inf, math.inf]])
def test_gradients_that_do_not_decay_have_no_horizon(phi: list[float]) -> None:
    decay = GradientDecay(phi)
    assert decay.rate >= 1 - 1e-12
    assert decay.recommended(0.5) is None
    assert decay.recommended_chunk(0.5) is None
    assert decay.relative_bias(10) == decay.chunk_bias(10) == math.inf


def test_gradients_that_vanish_altogether_need_no_more_than_what_is_there() -> None:
    decay = GradientDecay([1.0, 0.5, 0.0, 0.0, 0.0, 0.0])
    assert decay.rate == 0
    assert decay.relative_bias(2) == 0
    assert decay.recommended(0.1) == 2
    # E(0), E(1), E(2) are 1.5, 0.5, 0 of a whole of 1.5, and then 0.
    assert [decay.chunk_bias(steps) for steps in (1, 2, 3, 10)] == pytest.approx([1, 2 / 3, 4 / 9, 4 / 30])
    assert decay.recommended_chunk(0.1) == 14


# The measurement


class Linear(nn.Module):
    """h <- rate h + w x, and y_pred = h."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        h = torch.zeros_like(x[0]) if hidden is None else hidden["h"]
        states = []
        for x_t in x:
            h = self.rate * h + self.w * x_t
            states.append(h)
        return torch.stack(states), {"h": h, "none": None}


def measured(
    model: nn.Module, window: int = 40, event: Any = Events.ITERATION_STARTED, steps: int = 50, **kwargs: Any
) -> GradientHorizon:
    samples = kwargs.pop("samples", 4)
    loss_fn = kwargs.pop("loss_fn", F.mse_loss)
    trainer = create_supervised_tbptt_trainer(model, sgd(model, 0.0), loss_fn, 10, **kwargs)
    horizon = GradientHorizon(window, samples=samples)
    horizon.attach(trainer, event)
    trainer.run(batches(1, steps=steps))
    return horizon


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99])
def test_a_linear_recurrence_decays_at_its_rate(rate: float) -> None:
    # The mean of 4 x 3 numbers: its gradient for h is 1/12 everywhere, of norm 1/sqrt(12).
    horizon = measured(Linear(rate), loss_fn=lambda y_pred, y: y_pred.mean())
    assert len(horizon.decay.phi) == 36
    assert horizon.decay.rate == pytest.approx(rate, rel=1e-2)
    assert list(horizon.decay.phi) == pytest.approx([rate**k / math.sqrt(12) for k in range(1, 37)], rel=1e-5)
    assert horizon.decay.deviation == pytest.approx([0.0] * 36, abs=1e-7)


def test_the_norms_are_those_of_autograd_over_the_sequence() -> None:
    """The truth: the state at time s - k as a leaf, the GRU called once from there on."""
    model = seeded(Forecaster)
    horizon = measured(model, window=12, steps=15, samples=2)
    x, y = batches(1, steps=15)[0]
    for lag in (1, 2, 5, 10):
        norms = []
        for s in (10, 11):
            leaf = model(x[: s - lag + 1])[1].detach().requires_grad_()
            loss = F.mse_loss(model(x[s - lag + 1 : s + 1], leaf)[0][-1:], y[s : s + 1])
            norms.append(torch.autograd.grad(loss, leaf)[0].norm().item())
        assert horizon.decay.phi[lag - 1] == pytest.approx(sum(norms) / 2, rel=1e-4)
        assert horizon.decay.deviation is not None
        assert horizon.decay.deviation[lag - 1] == pytest.approx(abs(norms[0] - norms[1]) / 2, rel=1e-3)


class Noisy(Forecaster):
    """With dropout, running statistics and a power iteration: whatever a measurement could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        nn.utils.parametrizations.spectral_norm(self.head)

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        y, hidden = self.rnn(F.dropout(x, 0.3, self.training), hidden)
        return self.head(self.norm(y.flatten(0, 1)).view_as(y)), hidden


@pytest.mark.parametrize("event", [None, Events.ITERATION_STARTED, *Tbptt_Events])
def test_a_measurement_leaves_no_trace(event: Any) -> None:
    def trained(event: Any) -> tuple[nn.Module, list[Any]]:
        model: Any = seeded(Noisy)
        torch.manual_seed(3)
        trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, stateful=True)
        modes: list[Any] = []
        if event is not None:
            horizon = GradientHorizon(8, samples=2)
            trainer.add_event_handler(event, lambda: model.norm.eval() and None)
            trainer.add_event_handler(event, lambda: horizon.measure(trainer) and None)
            trainer.add_event_handler(event, lambda: modes.append((model.training, model.norm.training)))
        trainer.run(batches())
        return model, [*modes, torch.rand(3).tolist()]

    plain, before = trained(None)
    model, after = trained(event)
    assert same(weights(plain), weights(model))
    assert same(list(plain.buffers()), list(model.buffers()))
    assert after[-1] == before[-1]
    assert set(after[:-1]) <= {(True, False)}


def test_a_stateful_trainer_is_measured_from_the_state_that_it_carries() -> None:
    model = seeded(lambda: nn.GRU(3, 2))
    seen = SimpleQueue[Any]()  # a list would be put back
    trainer = create_supervised_tbptt_trainer(
        model,
        sgd(model, 0.0),
        F.mse_loss,
        4,
        stateful=True,
        model_fn=lambda model, x, hidden: seen.put(hidden) or model(x, hidden),  # type: ignore[func-returns-value]
    )
    horizon = GradientHorizon(8, samples=2)

    @trainer.on(Events.ITERATION_STARTED)
    def measure(engine: Engine) -> None:
        while not seen.empty():
            seen.get()
        carried = engine.state.hidden  # type: ignore[attr-defined]
        horizon.measure(engine)
        assert engine.state.hidden is carried  # type: ignore[attr-defined]
        first = seen.get()
        assert first is None if carried is None else torch.equal(first, carried)

    trainer.run(batches(2))


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("steps", [12, 30])
def test_one_target_for_the_sequence_is_measured_at_its_end(steps: int, stateful: bool) -> None:
    """Many-to-one. The truth: the state at time T - 1 - k as a leaf, the GRU called once from there on."""
    model = seeded(Forecaster).double()
    x, y = batches(1, steps=steps)[0]
    x, y = x.double(), y[-1].double()
    trainer: Any = create_supervised_tbptt_trainer(
        model,
        sgd(model, 0.0),
        lambda y_pred, y: F.mse_loss(y_pred[-1], y),
        5,
        split_batch=partial(split_sequence, final=[1]),
        stateful=stateful,
    )
    horizon = GradientHorizon(12, samples=2)
    horizon.attach(trainer)
    trainer.run([(x, y)])
    assert horizon.decay.deviation is None  # of one loss
    for lag in (1, 5, 10):
        leaf = model(x[: steps - lag])[1].detach().requires_grad_()
        loss = F.mse_loss(model(x[steps - lag :], leaf)[0][-1], y)
        expected = torch.autograd.grad(loss, leaf)[0].norm().item()
        assert horizon.decay.phi[lag - 1] == pytest.approx(expected, rel=1e-12)


def test_one_target_for_the_sequence_is_measured_from_the_carried_state() -> None:
    model = seeded(Forecaster).double()
    (x, y), _ = ([part.double() for part in batch] for batch in batches(2, steps=30))
    trainer: Any = create_supervised_tbptt_trainer(
        model,
        sgd(model, 0.0),
        lambda y_pred, y: F.mse_loss(y_pred[-1], y),
        5,
        split_batch=partial(split_sequence, final=[1]),
        stateful=True,
    )
    horizon = GradientHorizon(12, samples=2)
    horizon.attach(trainer, Events.ITERATION_STARTED(once=2))
    trainer.run([(x, y[-1]), (x, y[-1])])
    leaf = model(torch.cat([x, x])[:-3])[1].detach().requires_grad_()
    expected = torch.autograd.grad(F.mse_loss(model(x[-3:], leaf)[0][-1], y[-1]), leaf)[0].norm().item()
    assert horizon.decay.phi[2] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_the_chunk_bias_is_that_of_the_gradient_that_the_trainer_takes(rate: float) -> None:
    """Of h <- rate h + w x with a loss of h, x = 1, the gradient for w is the sum of rate^k, k = 0, 1, ...

    The bound knows the states before the loss, k = 1, 2, ..., so its whole is that without k = 0, rate times as large.
    """
    steps, model = 6, Linear(rate).double()
    x = torch.ones(300, 1, 1, dtype=torch.float64)
    trainer: Any = create_supervised_tbptt_trainer(model, sgd(model, 0.0), lambda y_pred, y: y_pred.mean(), steps)
    horizon = GradientHorizon(290, samples=2, tolerance=0.2)
    horizon.attach(trainer)
    last: list[float] = []
    trainer.add_event_handler(
        Tbptt_Events.BACKWARD_COMPLETED,
        lambda: last.append(model.w.grad.item()),  # type: ignore[union-attr]
    )
    trainer.run([(x, x)])
    whole = 1 / (1 - rate)
    assert (whole - last[-1]) / whole == pytest.approx(rate * horizon.decay.chunk_bias(steps), rel=1e-9)
    recommended = horizon.recommended_chunk
    assert recommended is not None
    assert horizon.decay.chunk_bias(recommended) < 0.2 <= horizon.decay.chunk_bias(recommended - 1)


def test_loggers_find_the_scalars_on_the_state(tmp_path: Path) -> None:
    model = Linear(0.5)
    trainer = create_supervised_tbptt_trainer(model, sgd(model, 0.0), lambda y_pred, y: y_pred.mean(), 4)
    GradientHorizon(30, samples=2, tolerance=0.1).attach(trainer, Events.ITERATION_STARTED(every=2))
    logged: dict[str, float] = {}
    logger: Any
    with TensorboardLogger(log_dir=tmp_path) as logger:
        logger.writer.add_scalar = lambda name, value, step: logged.update({name: value})
        handler = OutputHandler("horizon", state_attributes=["gradient_decay_rate", "gradient_horizon"])
        logger.attach(trainer, handler, Events.ITERATION_COMPLETED(every=2))
        trainer.run(batches(2, steps=40))
    # The least K with 0.5^K < 0.1 is 4.
    assert logged == {"horizon/gradient_decay_rate": pytest.approx(0.5, rel=1e-2), "horizon/gradient_horizon": 4}


def test_the_plot_draws_decay_fit_bias_and_recommendation() -> None:
    pytest.importorskip("matplotlib")
    horizon = measured(Linear(0.9), window=70, steps=70, loss_fn=lambda y_pred, y: y_pred.mean())
    left, right = horizon.plot().axes
    measured_line, fit = left.get_lines()
    assert list(measured_line.get_ydata()) == list(horizon.decay.phi)
    assert fit.get_ydata() == pytest.approx([0.9**k / math.sqrt(12) for k in fit.get_xdata()], rel=1e-4)
    bias, recommended, chunk_bias, chunk, tolerance = right.get_lines()
    assert bias.get_ydata()[4] == horizon.decay.relative_bias(5)
    assert chunk_bias.get_ydata()[4] == horizon.decay.chunk_bias(5)
    assert set(tolerance.get_ydata()) == {0.5}
    assert set(recommended.get_xdata()) == {horizon.recommended} == {7}
    assert set(chunk.get_xdata()) == {horizon.recommended_chunk} == {17}
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert labels == ["K steps back from each loss: 7", "chunks of K steps: 17", "tolerance 0.5"]


def test_the_plot_of_gradients_that_do_not_decay_recommends_nothing() -> None:
    pytest.importorskip("matplotlib")
    _, right = measured(Linear(1.0), loss_fn=lambda y_pred, y: y_pred.mean()).plot().axes
    assert [len(line.get_xdata()) for line in right.get_lines()] == [36, 36, 2]  # two curves and the tolerance
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert labels == ["K steps back from each loss: no bound", "chunks of K steps: no bound", "tolerance 0.5"]


# Adapting


def test_adaptive_truncation_sets_the_step_within_its_limits_and_scales_the_rate() -> None:
    def run(minimum: int, maximum: int, rate: float = 0.9, steps: int = 84) -> tuple[int, list[int], Any]:
        model = Linear(rate)
        optimizer = sgd(model, 0.01)
        trainer = create_supervised_tbptt_trainer(model, optimizer, lambda y_pred, y: y_pred.mean(), 28)
        horizon = GradientHorizon(60, samples=4)
        horizon.attach(trainer, Events.ITERATION_STARTED(once=2))
        AdaptiveTruncation(horizon, 0.5, minimum, maximum, optimizer).attach(trainer)
        windows: list[int] = []
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e: windows.append(e.state.time_iterations_per_sequence)
        )
        trainer.run(batches(2, steps=steps))
        return trainer.state.tbtt_step, windows, optimizer.param_groups[0]["lr"]

    # The least length with (1 - 0.9^K) / (1 - 0.9) / K < 0.5 is 17; of 84 steps it leaves 16.
    assert run(1, 50) == (17, [3, 5], pytest.approx(0.01 * math.sqrt(17 / 28)))
    assert run(21, 50)[:2] == (21, [3, 4])
    assert run(1, 4)[:2] == (4, [3, 21])
    assert run(1, 42, rate=1.0)[:2] == (42, [3, 2])  # no decay: the longest that is allowed
    # Of 88 steps 17 leaves 3, 16 and 18 leave 8 and 16: an optimizer step on 3 would be one on next to nothing.
    assert run(1, 50, steps=88)[:2] == (18, [4, 5])
    assert run(1, 17, steps=88)[:2] == (16, [4, 6])
    assert run(17, 17, steps=88)[:2] == (17, [4, 6])  # nothing else is allowed


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 9, "samples": 8}, r"window must be at least samples \+ 2, got window=9 and samples=8"),
        ({"window": 20, "tolerance": 0.0}, "tolerance must be positive and finite, .* got 0.0"),
        ({"window": 20, "tolerance": "half"}, "tolerance must be positive and finite, .* got 'half'"),
        ({"window": 20, "fit_from": 12}, r"fit_from must lie in \[1, 11\], so that two of the 12 lags .* got 12"),
        ({"window": 20, "fit_from": 2.5}, r"fit_from must lie in \[1, 11\], .* got 2.5"),
    ],
)
def test_a_horizon_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientHorizon(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phi": [1.0]}, "two lags at least"),
        ({"phi": [1.0, -0.5]}, "not negative, got -0.5"),
        ({"phi": [1.0, math.nan]}, "not negative, got nan"),
        ({"phi": [0.0, 0.0]}, "does not depend on the hidden state"),
        ({"phi": [1.0, 0.5], "fit_from": 2}, r"fit_from must lie in \[1, 1\]"),
    ],
)
def test_a_decay_that_shows_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientDecay(**arguments)


def test_adaptive_truncation_follows_a_horizon() -> None:
    with pytest.raises(TypeError, match=r"horizon must be a GradientHorizon, .* got 100: make one"):
        AdaptiveTruncation(100, 0.5, 2, 20)  # type: ignore[arg-type]


def test_the_last_lag_that_a_fit_may_start_from_is_measured() -> None:
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 10)
    horizon = GradientHorizon(window=20, fit_from=11)
    horizon.attach(trainer)
    trainer.run(batches(1, steps=20))
    assert horizon.decay.tail_start == 11


class Detached(Forecaster):
    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        y, hidden = super().forward(x, hidden)
        return y, hidden.detach()


class Stateless(Forecaster):
    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        return super().forward(x)[0], None


class Forgetful(Forecaster):
    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Stateless, {}, "carries no hidden state that a gradient goes through.* returned NoneType"),
        (Detached, {}, "carries no hidden state that a gradient goes through.* returned Tensor"),
        (Forgetful, {}, "the loss does not depend on the hidden state"),
        (Forecaster, {"window": 60}, "window of 60 steps is longer than the batch, which has 50"),
        (
            Forecaster,
            {"loss_weight": lambda x, y: int(len(y) > 1)},
            "none of the last 4 of the first 40 steps of the batch has a loss",
        ),
    ],
)
def test_what_cannot_be_measured_is_said(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measured(make(), **arguments)


def test_the_horizon_needs_a_trainer_of_its_own() -> None:
    horizon = GradientHorizon(20)
    with pytest.raises(RuntimeError, match="nothing has been measured yet"):
        _ = horizon.recommended
    with pytest.raises(ValueError, match="engine is no trainer of this package"):
        horizon.attach(Engine(lambda engine, batch: None))
    model = Forecaster()
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4)
    horizon.attach(trainer)
    with pytest.raises(ValueError, match="attached already"):
        horizon.attach(trainer)


def test_adaptive_truncation_refuses_what_it_cannot_set() -> None:
    model = Forecaster()
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, FixedTruncation(4))
    horizon = GradientHorizon(20)
    horizon.attach(trainer)
    with pytest.raises(ValueError, match=r"tbtt_step is a policy, FixedTruncation\(steps=4\)"):
        AdaptiveTruncation(horizon, 0.5, 1, 50).attach(trainer)
    with pytest.raises(ValueError, match="minimum must not be above maximum, got minimum=5 and maximum=4"):
        AdaptiveTruncation(horizon, 0.5, 5, 4)
    with pytest.raises(ValueError, match="minimum must be at least 1, got 0"):
        AdaptiveTruncation(horizon, 0.5, 0, 4)
    other = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4)
    with pytest.raises(ValueError, match="the horizon is not attached to this engine"):
        AdaptiveTruncation(horizon, 0.5, 1, 4).attach(other)
