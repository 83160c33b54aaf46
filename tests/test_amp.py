"""Autocast and gradient scaling: bf16 on the CPU, fp16 and bf16 on CUDA where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ignite_tbptt import Tbptt_Events, create_supervised_tbptt_evaluator, create_supervised_tbptt_trainer, nest
from tests.helpers import Forecaster, batches, same, seeded, sgd, weights

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


def cpu_has_lstm_in_bf16() -> bool:
    """Say whether oneDNN has an LSTM in bfloat16 that can be trained, which takes AVX-512."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(3, 5)(torch.zeros(2, 1, 3))
    except RuntimeError:
        return False
    return True


needs_lstm_in_bf16 = pytest.mark.skipif(not cpu_has_lstm_in_bf16(), reason="needs a CPU with an LSTM in bfloat16")
KINDS_ON_CPU = [nn.GRU, pytest.param(nn.LSTM, marks=needs_lstm_in_bf16)]


@pytest.mark.parametrize("kind", KINDS_ON_CPU)
def test_bf16_on_cpu_is_the_loop_under_autocast(kind: Any) -> None:
    model, twin = seeded(lambda: Forecaster(kind)), seeded(lambda: Forecaster(kind))
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, amp_mode="amp")
    trainer.run(batches(2))
    optimizer = sgd(twin)
    for x, y in batches(2):
        hidden: Any = None
        for x_t, y_t in zip(x.split(4), y.split(4), strict=True):
            optimizer.zero_grad()
            if hidden is not None:
                hidden = tuple(h.detach() for h in hidden) if isinstance(hidden, tuple) else hidden.detach()
            with torch.autocast("cpu", torch.bfloat16):
                y_pred, hidden = twin(x_t, hidden)
                loss = F.mse_loss(y_pred, y_t)
            loss.backward()
            optimizer.step()
    assert same(weights(model), weights(twin))


def test_an_autocast_around_the_run_computes_with_the_weights_of_the_step_before() -> None:
    """Autocast keeps its casts of the weights until it ends; by hand it ends in every iteration."""
    losses: list[Any] = []
    model, twin = seeded(Forecaster), seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4)
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, lambda e: losses.append(e.state.output))
    with torch.autocast("cpu", torch.bfloat16):
        trainer.run(batches(2))
    optimizer = sgd(twin)
    by_hand: list[float] = []
    for x, y in batches(2):
        hidden: Any = None
        for x_t, y_t in zip(x.split(4), y.split(4), strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y_pred, hidden = twin(x_t, None if hidden is None else hidden.detach())
                loss = F.mse_loss(y_pred, y_t)
            loss.backward()
            optimizer.step()
            by_hand.append(loss.item())
    assert losses == by_hand
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("cpu", nn.GRU),
        pytest.param("cpu", nn.LSTM, marks=needs_lstm_in_bf16),
        pytest.param("cuda", nn.LSTM, marks=needs_cuda),
    ],
)
def test_a_carried_state_serves_outside_autocast(device: str, kind: Any) -> None:
    model = seeded(lambda: Forecaster(kind)).to(device)
    trainer = create_supervised_tbptt_trainer(
        model,
        sgd(model),
        F.mse_loss,
        4,
        device=device,
        amp_mode="amp",
        scaler=device == "cuda",
        stateful=True,
    )
    trainer.run(batches(1))
    assert {h.dtype for h in nest.tensors(trainer.state.hidden)} == {torch.float32}
    with torch.no_grad():
        model(batches(1)[0][0].to(device), trainer.state.hidden)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_unscaled_when_they_are_clipped(device: str) -> None:
    """The same run with another scale clips at the same norm and ends with the same weights."""

    def run(scale: float) -> list[torch.Tensor]:
        model = seeded(Forecaster).to(device)
        scaler = torch.amp.GradScaler(device, init_scale=scale)
        trainer = create_supervised_tbptt_trainer(
            model, sgd(model), F.mse_loss, 4, device=device, amp_mode="amp", scaler=scaler
        )
        trainer.add_event_handler(
            Tbptt_Events.BACKWARD_COMPLETED, lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.01) and None
        )
        trainer.run(batches())
        assert trainer.state.optimizer_step == 9
        return weights(model)

    # Powers of two scale without rounding, so the runs differ only if the clipping saw the scale.
    for first, second in zip(run(1.0), run(2.0**10), strict=True):
        assert torch.allclose(first, second, rtol=1e-3, atol=1e-6)


def test_a_step_that_the_scaler_skips_is_no_optimizer_step() -> None:
    model = seeded(Forecaster)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, amp_mode="amp", scaler=scaler)
    x, y = batches(1)[0]
    y[5] = float("inf")
    completed: list[int] = []
    trainer.add_event_handler(
        Tbptt_Events.OPTIMIZER_STEP_COMPLETED, lambda engine: completed.append(engine.state.time_iteration)
    )
    trainer.run([(x, y)])
    assert completed == [1, 3]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_scaler_is_made_on_demand_and_lies_on_the_state() -> None:
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model), F.mse_loss, 4, device="cpu", amp_mode="amp", scaler=True
    )
    assert isinstance(trainer.state.scaler, torch.amp.GradScaler)
    trainer.run(batches(1))
    assert trainer.state.optimizer_step == 3


def test_float16_without_a_scaler_is_warned_about() -> None:
    model = seeded(Forecaster)
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        with pytest.warns(UserWarning, match="float16 on cpu, where gradients below 6e-8 vanish"):
            create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, device="cpu", amp_mode="amp")
    finally:
        torch.set_autocast_dtype("cpu", before)


def test_the_evaluator_under_autocast() -> None:
    seen: list[torch.dtype] = []
    evaluator = create_supervised_tbptt_evaluator(
        seeded(Forecaster), tbtt_step=4, amp_mode="amp", output_transform=lambda x, y, y_pred: seen.append(y_pred.dtype)
    )
    evaluator.run(batches(1))
    assert seen == [torch.bfloat16] * 3


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_autocast_in_both_precisions(dtype: torch.dtype) -> None:
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", dtype)
    try:
        model = seeded(Forecaster).cuda()
        seen: set[torch.dtype] = set()

        def output_transform(x: Any, y: Any, y_pred: Any, loss: Any) -> float:
            seen.add(y_pred.dtype)
            return float(loss)

        trainer = create_supervised_tbptt_trainer(
            model,
            sgd(model),
            F.mse_loss,
            4,
            device="cuda",
            amp_mode="amp",
            scaler=dtype == torch.float16,
            output_transform=output_transform,
        )
        trainer.run(batches())
        assert seen == {dtype}
    finally:
        torch.set_autocast_dtype("cuda", before)


@needs_cuda
def test_one_device_synchronisation_a_window_at_most() -> None:
    model = seeded(Forecaster).cuda()
    data = [tuple(tensor.cuda() for tensor in batch) for batch in batches(1)]
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model), F.mse_loss, 4, output_transform=lambda x, y, y_pred, loss: loss.detach()
    )
    trainer.run(data)
    syncs: list[int] = []
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_STARTED, lambda: torch.cuda.set_sync_debug_mode("error"))
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, lambda: syncs.append(1))
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):  # the mean loss at the end of the batch, and only that
            trainer.run(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(syncs) == 3
