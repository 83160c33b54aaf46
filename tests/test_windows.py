"""Where windows start and from which state: overlapping windows, states that handlers set, least lengths, layouts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt import (
    AnticipatedReweightedTruncation,
    FixedTruncation,
    FullBackpropagation,
    SlidingTruncation,
    Tbptt_Events,
    create_supervised_tbptt_evaluator,
    create_supervised_tbptt_trainer,
    reset_hidden,
    split_sequence,
)
from tests.helpers import Forecaster, batches, seeded, sgd, weights


def sliding_by_hand(
    model: Any, x: Tensor, y: Tensor, k1: int, k2: int, replace: dict[int, Tensor] | None = None
) -> list[float]:
    """Train as SlidingTruncation(k1, k2) is documented; `replace` has states that are set at time steps."""
    optimizer = sgd(model)
    states: dict[int, Any] = {0: None}
    boundary, losses = 0, []
    for start in range(0, len(x), k1):
        if replace is not None and start in replace:
            states[start], boundary = replace[start], start
        first, stop = max(boundary, start - (k2 - k1), 0), min(start + k1, len(x))
        optimizer.zero_grad()
        hidden = states[first]
        if first < start:
            _, hidden = model(x[first:start], hidden)
        outputs = []
        for t in range(start, stop):
            y_t, hidden = model(x[t : t + 1], hidden)
            outputs.append(y_t)
            states.setdefault(t + 1, hidden.detach().clone())
        loss = F.mse_loss(torch.cat(outputs), y[start:stop])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def outputs_of(trainer: Any) -> list[float]:
    outputs: list[float] = []
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, lambda: outputs.append(trainer.state.output))
    return outputs


def data(steps: int = 12) -> tuple[Tensor, Tensor]:
    x, y = batches(1, steps=steps)[0]
    return x.double(), y.double()


@pytest.mark.parametrize(("k1", "k2"), [(k1, k2) for k2 in range(1, 6) for k1 in range(1, k2 + 1)])
def test_a_sliding_window_starts_from_the_state_of_the_first_pass(k1: int, k2: int) -> None:
    x, y = data()
    ours, twin = seeded(Forecaster).double(), seeded(Forecaster).double()
    trainer = create_supervised_tbptt_trainer(ours, sgd(ours), F.mse_loss, SlidingTruncation(k1, k2))
    losses = outputs_of(trainer)
    trainer.run([(x, y)])
    assert losses == pytest.approx(sliding_by_hand(twin, x, y, k1, k2), rel=1e-12)
    for one, other in zip(weights(ours), weights(twin), strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("event", [Tbptt_Events.TIME_ITERATION_STARTED, Tbptt_Events.TIME_ITERATION_COMPLETED])
@pytest.mark.parametrize(("k1", "k2"), [(2, 4), (1, 4), (3, 5), (4, 4)])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_state_that_a_handler_sets_is_where_later_windows_start(event: Any, k1: int, k2: int, in_place: bool) -> None:
    x, y = data()
    ours, twin = seeded(Forecaster).double(), seeded(Forecaster).double()
    trainer = create_supervised_tbptt_trainer(ours, sgd(ours), F.mse_loss, SlidingTruncation(k1, k2))
    window = 3 if event == Tbptt_Events.TIME_ITERATION_STARTED else 2
    given = torch.full((1, 4, 5), 0.3, dtype=torch.float64)

    @trainer.on(event(once=window))
    def set_state(engine: Any) -> None:
        if in_place:
            with torch.no_grad():
                engine.state.hidden.copy_(given)
        else:
            engine.state.hidden = given

    losses = outputs_of(trainer)
    trainer.run([(x, y)])
    assert losses == pytest.approx(sliding_by_hand(twin, x, y, k1, k2, {2 * k1: given}), rel=1e-12)


class WritesIntoItsState(nn.Module):
    """A cell that updates its state in place, as embedded code likes to do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.shape[1], 5) if h is None else h
        outputs = []
        for x_t in x:
            h.mul_(0.9).add_(self.inner(x_t).detach())
            outputs.append(self.head(h.clone()))
        return torch.stack(outputs), h


def test_states_that_are_kept_are_copies() -> None:
    x, y = data()
    ours, twin = seeded(WritesIntoItsState).double(), seeded(WritesIntoItsState).double()
    trainer = create_supervised_tbptt_trainer(ours, sgd(ours), F.mse_loss, SlidingTruncation(2, 4))
    losses = outputs_of(trainer)
    with pytest.warns(UserWarning, match=r"left inner.weight, inner.bias without a gradient.*find_graph_cuts"):
        trainer.run([(x, y)])

    class Copies(WritesIntoItsState):
        def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
            y, h = super().forward(x, None if h is None else h.clone())
            return y, h.clone()

    twin.__class__ = Copies
    assert losses == pytest.approx(sliding_by_hand(twin, x, y, 2, 4), rel=1e-12)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (4, [(0, 4), (4, 8), (8, 10)]),
        (FullBackpropagation(4), [(0, 10)]),
        (SlidingTruncation(4, 6), [(0, 4), (2, 8), (6, 10)]),
    ],
)
def test_every_time_event_tells_which_steps_its_window_covers(policy: Any, expected: list[tuple[int, int]]) -> None:
    model = seeded(Forecaster)
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, policy)
    seen: dict[Any, list[tuple[int, int]]] = {}
    for event in Tbptt_Events:
        trainer.add_event_handler(
            event,
            lambda engine, event: seen.setdefault(event, []).append(
                (engine.state.window_start, engine.state.window_stop)
            ),
            event,
        )
    assert (trainer.state.window_start, trainer.state.window_stop) == (None, None)
    trainer.run(batches(1))
    assert list(seen.values()) == [expected] * 4


def test_rows_forget_where_their_documents_start_as_the_docstring_says() -> None:
    """Against a loop by hand; both ways: in a handler where chunks begin, and in model_fn at any step."""
    x, y = data(10)
    starts = torch.zeros(10, 4, dtype=torch.bool)
    starts[4, 1] = starts[8, 2] = True

    def by_hand(steps: int) -> list[float]:
        model = seeded(Forecaster).double()
        optimizer, losses, hidden = sgd(model), [], None
        for start in range(0, 10, steps):
            optimizer.zero_grad()
            outputs = []
            hidden = None if hidden is None else hidden.detach()
            for t in range(start, min(start + steps, 10)):
                if hidden is not None:
                    hidden = hidden * ~starts[t].view(1, -1, 1)
                y_t, hidden = model(x[t : t + 1], hidden)
                outputs.append(y_t)
            loss = F.mse_loss(torch.cat(outputs), y[start : start + steps])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model = seeded(Forecaster).double()
    trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4)

    @trainer.on(Tbptt_Events.TIME_ITERATION_STARTED)
    def forget(engine: Any) -> None:
        if engine.state.hidden is not None:
            engine.state.hidden = reset_hidden(engine.state.hidden, starts[engine.state.window_start])

    losses = outputs_of(trainer)
    trainer.run([(x, y)])
    assert losses == pytest.approx(by_hand(4), rel=1e-12)

    def model_fn(model: Any, x: Any, hidden: Any) -> Any:
        signal, starts = x
        outputs = []
        for x_t, starts_t in zip(signal.split(1), starts, strict=True):
            hidden = hidden if hidden is None else reset_hidden(hidden, starts_t)
            y_t, hidden = model(x_t, hidden)
            outputs.append(y_t)
        return torch.cat(outputs), hidden

    for checkpoint_segments in (False, True):
        model = seeded(Forecaster).double()
        trainer = create_supervised_tbptt_trainer(
            model,
            sgd(model),
            F.mse_loss,
            FullBackpropagation(3),
            model_fn=model_fn,
            checkpoint_segments=checkpoint_segments,
        )
        losses = outputs_of(trainer)
        trainer.run([((x, starts), y)] * 2)
        assert losses[0] == pytest.approx(by_hand(10)[0], rel=1e-12)


# Windows of a least length


def loss_of_differences(y_pred: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(y_pred.diff(dim=0), y.diff(dim=0))


def test_a_rest_below_the_minimum_is_joined_to_the_window_before() -> None:
    x, y = data(9)
    model, twin = seeded(Forecaster).double(), seeded(Forecaster).double()
    trainer = create_supervised_tbptt_trainer(model, sgd(model), loss_of_differences, FixedTruncation(4, minimum=2))
    losses = outputs_of(trainer)
    trainer.run([(x, y)])
    optimizer, hidden, expected = sgd(twin), None, []
    for window in (slice(0, 4), slice(4, 9)):
        optimizer.zero_grad()
        y_pred, hidden = twin(x[window], None if hidden is None else hidden.detach())
        loss = loss_of_differences(y_pred, y[window])
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == expected


@pytest.mark.parametrize(
    ("steps", "minimum", "length", "expected"),
    [
        (4, 1, 9, [4, 4, 1]),
        (4, 2, 9, [4, 5]),
        (4, 4, 11, [4, 7]),
        (4, 4, 12, [4, 4, 4]),
        (4, 3, 2, [2]),
        (1, 1, 3, [1, 1, 1]),
    ],
)
def test_the_lengths_of_windows_with_a_minimum(steps: int, minimum: int, length: int, expected: list[int]) -> None:
    policy = FixedTruncation(steps, minimum)
    windows = list(policy.windows(length, torch.Generator()))
    assert [window[0].stop - window[0].start for window in windows] == expected
    assert policy.outline(length).windows == len(expected)


def test_a_minimum_above_the_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="minimum must not be above steps, got minimum=5 and steps=4"):
        FixedTruncation(4, 5)
    assert repr(FixedTruncation(4)) == "FixedTruncation(steps=4)"
    assert repr(FixedTruncation(4, 2)) == "FixedTruncation(steps=4, minimum=2)"


# Layouts


class RowsFirst(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 2, batch_first=batch_first)

    def forward(self, x: Tensor, hidden: Any = None) -> Any:
        return self.rnn(x, hidden)


@pytest.mark.parametrize("make", [lambda: nn.GRU(3, 2, batch_first=True), RowsFirst])
def test_a_dim_that_the_model_takes_for_its_rows_is_refused(make: Any) -> None:
    """x of (T, B, 3) in chunks along its axis 0, which the model takes for rows; and the other way round."""
    for rows in (32, 100, 50, 7):
        model = seeded(make)
        before = weights(model)
        x, y = torch.randn(100, rows, 3), torch.randn(100, rows, 2)
        trainer = create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 50, dim=0)
        if rows == 50 and isinstance(model, RowsFirst):
            continue  # as many rows as steps: cannot be told from a model that transposes
        with pytest.raises(ValueError, match=r"dim=0 is the time axis .* GRU with batch_first=True .* dim=1"):
            trainer.run([(x, y)])
        assert all(torch.equal(one, other) for one, other in zip(before, weights(model), strict=True))
        with pytest.raises(ValueError, match="batch_first=True"):
            create_supervised_tbptt_evaluator(model, tbtt_step=50, dim=0).run([(x, y)])
    model = seeded(lambda: RowsFirst(False))
    with pytest.raises(ValueError, match=r"dim=1 is the time axis .* batch_first=False .* dim=0"):
        create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, dim=1).run(
            [(torch.randn(6, 10, 3), torch.randn(6, 10, 2))]
        )


def test_layouts_that_agree_or_are_transposed_inside_pass() -> None:
    class Transposes(RowsFirst):
        def forward(self, x: Tensor, hidden: Any = None) -> Any:
            y, hidden = super().forward(x.transpose(0, 1), hidden)
            return y.transpose(0, 1), hidden

    x, y = torch.randn(10, 6, 3), torch.randn(10, 6, 2)
    for model in (nn.GRU(3, 2), RowsFirst(False), Transposes()):
        create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4).run([(x, y)])
    for model in (nn.GRU(3, 2, batch_first=True), RowsFirst(), Transposes(False)):
        data = [(x.transpose(0, 1), y.transpose(0, 1))]
        create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4, dim=1).run(data)
    unbatched = nn.GRU(3, 2, batch_first=True)
    create_supervised_tbptt_trainer(unbatched, sgd(unbatched), F.mse_loss, 4).run([(x[:, 0], y[:, 0])])


def test_a_negative_dim_that_means_another_axis_of_the_target_is_refused_where_sizes_hide_it() -> None:
    split = partial(split_sequence, dim=-2)
    with pytest.raises(ValueError, match=r"dim=-2 is axis 1 of batch\[0\] and axis 0 of batch\[1\].*dim=1"):
        split((torch.zeros(6, 6, 3), torch.zeros(6, 6)))
    with pytest.raises(ValueError, match="disagree about the number of time steps"):
        split((torch.zeros(5, 6, 3), torch.zeros(5, 6)))
    length, cut = split_sequence((torch.zeros(6, 3, 6), torch.zeros(6, 6)), dim=-1)  # time last: the same for both
    assert length == 6
    assert [part.shape for part in cut(0, 2)] == [(6, 3, 2), (6, 2)]
    split((torch.zeros(6, 6, 3), torch.zeros(6, 6, 2)))


def test_rows_are_counted_where_time_is_cut_and_not_in_what_goes_whole() -> None:
    class WithSpeaker(Forecaster):
        def forward(self, x: Any, hidden: Any = None) -> Any:
            speaker, signal = x
            return super().forward(signal + speaker.mean(), hidden)

    model = seeded(WithSpeaker)
    trainer = create_supervised_tbptt_trainer(
        model, sgd(model), F.mse_loss, 4, stateful=True, split_batch=partial(split_sequence, static=[(0, 0)])
    )
    given = [((torch.ones(4, 2), x), y) for x, y in batches(3)]  # four entries of two, and chunks of four steps
    trainer.run(given)
    with pytest.raises(ValueError, match=r"the batch has 3 rows, but the hidden state carried .* has 4"):
        trainer.run([given[0], ((torch.ones(4, 2), torch.ones(10, 3, 3)), torch.ones(10, 3, 2))])


# States that cannot be carried


class Opaque:
    def __init__(self, h: Tensor | None) -> None:
        self.h = h


def test_an_object_that_hides_a_graph_is_named() -> None:
    class Hides(Forecaster):
        def forward(self, x: Tensor, hidden: Any = None) -> Any:
            y, h = super().forward(x, None if hidden is None else hidden[1].h)
            return y, (h, Opaque(h))

    model = seeded(Hides)
    with pytest.raises(TypeError, match=r"hidden\[1\] is a Opaque whose attribute 'h' .* dataclass"):
        create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4).run(batches(1))

    class Counts(Forecaster):
        def forward(self, x: Tensor, hidden: Any = None) -> Any:
            y, h = super().forward(x, None if hidden is None else hidden[0])
            return y, (h, Opaque(None))

    model = seeded(Counts)
    create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, 4).run(batches(1))


# Plans


def test_a_policy_that_lays_out_other_windows_the_second_time_is_refused() -> None:
    class Fickle:
        passes = 0

        def windows(self, length: int, generator: torch.Generator) -> Any:
            self.passes += 1
            return FixedTruncation(3 + self.passes).windows(length, generator)

    model = seeded(Forecaster)
    with pytest.raises(ValueError, match=r"laid out other windows .* than it did"):
        create_supervised_tbptt_trainer(model, sgd(model), F.mse_loss, Fickle()).run(batches(1, steps=9))


@pytest.mark.parametrize("policy", [FixedTruncation(1), SlidingTruncation(1, 8)])
def test_the_plan_of_a_million_windows_takes_no_memory(policy: Any) -> None:
    import tracemalloc

    from ignite_tbptt.truncation import plan_windows

    tracemalloc.start()
    try:
        plan = plan_windows(policy, 10**6, 1)
        first = next(iter(plan))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(plan) == 10**6
    assert first[0][:2] == (0, 1)
    assert peak < 2**20 / 10


def test_laying_out_random_windows_takes_no_memory_either() -> None:
    import tracemalloc

    from ignite_tbptt.truncation import plan_windows

    peaks = []
    for length in (1000, 10_000):
        tracemalloc.start()
        try:
            for _ in plan_windows(AnticipatedReweightedTruncation(1, 4, 4), length, 1):
                pass
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] + 10_000
