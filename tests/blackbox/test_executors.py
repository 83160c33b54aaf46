"""Gradients do not depend on where evaluations run; what fails there is named, or tried again."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ignite_tbptt.blackbox import (
    Blackbox,
    BlackboxError,
    CentralDifference,
    Result,
    SerialEvaluation,
    StackedEvaluation,
    Task,
    Workers,
    blackbox,
)
from tests.blackbox.slow_programs import (
    Once,
    Simulator,
    changes_its_input,
    decorated,
    noisy_away_from_one,
    noisy_wave,
    of_many,
    raises_what_cannot_be_pickled,
    wave,
)


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def gradient(executor: Any, fn: Any = wave, numpy: bool = True, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    x = torch.linspace(0.2, 2, 12, dtype=torch.float64).view(4, 3).requires_grad_()
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    inputs = (x, w) if fn is wave else (x,)
    f: Any = blackbox(fn, executor=executor, numpy=numpy, estimator=CentralDifference(), **options)
    found = [torch.autograd.grad(f(*inputs).sum(), inputs) for _ in range(3)]
    return tuple(part for each in found for part in each)


def backwards(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterable[Result]:
    """An executor of one's own: whatever the order it evaluates in, results come in that of the tasks."""
    given = list(tasks)
    return [function(task) for task in reversed(given)][::-1]


def pools(processes: Any) -> dict[str, Any]:
    threads = ThreadPoolExecutor(4)
    return {
        "threads": threads,
        "the map of threads": threads.map,
        "threads with a time-out": Workers(threads, timeout=30, retries=1),
        "processes": processes,
        "of one's own": backwards,
    }


@pytest.mark.parametrize(
    "kind", ["threads", "the map of threads", "threads with a time-out", "processes", "of one's own"]
)
def test_gradients_are_bit_for_bit_those_of_the_callers_thread(kind: str, processes: Any) -> None:
    executor = pools(processes)[kind]
    for case in ({}, {"in_dims": (0, None)}, {"fn": noisy_wave, "numpy": False}):
        truth = gradient(None, **case)
        assert all(torch.equal(a, b) for a, b in zip(gradient(executor, **case), truth, strict=True)), case
    assert executor is processes or threading.active_count() < 50


def test_the_calls_of_a_window_go_out_together() -> None:
    """Eight calls of 2 numbers: more evaluations run at the same time than the 4 of one call, bit for bit the same."""
    running, most, lock = [0], [0], threading.Lock()

    def simulator(x: Any, h: Any) -> Any:
        return np.tanh(x + 0.5 * h)

    def slow(x: Any, h: Any) -> Any:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return simulator(x, h)

    inputs = torch.linspace(-1, 1, 8, dtype=torch.float64).view(8, 1)

    def window(f: Any) -> Any:
        gain, h = torch.ones(1, dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64)
        for x in inputs:
            h = f(x * gain, h * gain)
        h.sum().backward()
        return gain.grad

    with ThreadPoolExecutor(32) as pool:
        found = window(blackbox(slow, numpy=True, executor=pool, estimator=CentralDifference()))
    assert torch.equal(found, window(blackbox(simulator, numpy=True, estimator=CentralDifference())))
    assert most[0] > 8


def run_once(folder: Path, how: str, executor: Any) -> Any:
    x = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    f = blackbox(Once(folder, how), numpy=True, executor=executor, estimator=CentralDifference())
    f(x).sum().backward()
    return x.grad


@pytest.mark.parametrize("how", ["raise", "hang"])
def test_what_fails_is_tried_again_where_that_was_asked_for(how: str, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    clean.mkdir()
    (clean / how).touch()
    truth = run_once(clean, how, None)
    with ThreadPoolExecutor(3) as pool:
        assert torch.equal(run_once(tmp_path, how, Workers(pool, timeout=1.0, retries=1)), truth)


def test_what_fails_is_named() -> None:
    def fails(x: Any) -> Any:
        if x[2] != 1.5:
            raise OSError("the licence server is busy")
        return np.exp(x)

    def hangs(x: Any) -> Any:
        time.sleep(0.5 if x[2] != 1.5 else 0)
        return np.exp(x)

    x = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    with ThreadPoolExecutor(8) as pool:
        f = blackbox(fails, numpy=True, executor=Workers(pool, retries=1))
        with pytest.raises(
            BlackboxError, match=r"fails raised OSError: the licence server is busy\s+in evaluation \d+, x"
        ):
            f(x).sum().backward()
        g = blackbox(hangs, numpy=True, executor=Workers(pool, timeout=0.1))
        with pytest.raises(
            BlackboxError, match=r"hangs raised TimeoutError: it was not done after 0\.1 s; give a longer"
        ):
            g(x).sum().backward()


def test_a_pool_whose_workers_all_hang_ends() -> None:
    release = threading.Event()

    def stuck(x: Any) -> Any:
        if x[0] != 1.0:
            release.wait(3)
        return x * 2

    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        f = blackbox(stuck, numpy=True, executor=Workers(pool, timeout=0.05, retries=1))
        with pytest.raises(BlackboxError, match="raised TimeoutError: it was not"):
            f(x).sum().backward()
        release.set()
    assert time.monotonic() - start < 8


def test_a_worker_that_dies(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(BlackboxError, match=r"a worker of the pool died .* killed, or ran out of memory"):
            run_once(tmp_path, "die", Workers(pool, retries=2))
        with pytest.raises(BlackboxError, match="make a new one"):  # and the next call does not hang either
            run_once(tmp_path, "die", pool)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert run_once(tmp_path, "die", pool) is not None


def test_what_cannot_be_sent_and_a_pool_that_is_gone(processes: Any) -> None:
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(
        BlackboxError, match=r"raised TypeError: it cannot be sent to another process .* or use threads"
    ):
        blackbox(lambda x: np.sin(x), numpy=True, executor=processes)(x).sum().backward()  # noqa: PLW0108
    with ThreadPoolExecutor(1) as pool:
        pass
    with pytest.raises(BlackboxError, match="the pool was shut down; keep it open as long as gradients are taken"):
        blackbox(np.sin, numpy=True, executor=pool)(x).sum().backward()  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="executor must be a pool with a method submit"):
        Workers(map)  # type: ignore[arg-type]
    pool = ThreadPoolExecutor(1)
    for timeout in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout must be a positive number of seconds"):
            Workers(pool, timeout=timeout)
    for retries in (-1, 1.5, True):
        with pytest.raises(ValueError, match="retries must be a whole number, 0 or more"):
            Workers(pool, retries=retries)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="executor must be called as map"):
        blackbox(np.sin, executor=ThreadPoolExecutor)  # type: ignore[call-overload]


def test_a_module_in_other_processes_has_the_parameters_that_were_moved(processes: Any) -> None:
    def gradients(executor: Any) -> list[torch.Tensor]:
        module = Simulator()
        f = Blackbox(module, executor=executor, estimator=CentralDifference())
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3).requires_grad_()
        total = f(x).sum() + f(x * 2).sum()  # the buffer has counted in between
        return list(torch.autograd.grad(total, [x, *module.layer.parameters()]))

    truth = gradients(SerialEvaluation())
    assert all(bool(each.any()) for each in truth)
    assert all(map(torch.equal, gradients(processes), truth))


def test_random_numbers_that_are_drawn_away_from_x_alone_are_common_in_other_processes(processes: Any) -> None:
    def found(executor: Any) -> Any:
        torch.manual_seed(0)
        x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        f = blackbox(noisy_away_from_one, executor=executor, estimator=CentralDifference())
        return torch.autograd.grad(f(x).sum(), [x])[0], torch.rand(3)

    truth = found(SerialEvaluation())
    assert torch.allclose(truth[0], torch.full((3,), 2.0, dtype=torch.float64), atol=1e-8)
    assert all(map(torch.equal, found(processes), truth))


def test_a_decorated_function_can_be_sent(processes: Any) -> None:
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    here: Any = decorated
    elsewhere = blackbox(here.__wrapped__, executor=processes)
    assert torch.equal(torch.autograd.grad(elsewhere(x).sum(), x)[0], torch.autograd.grad(here(x).sum(), x)[0])


def test_more_tensors_than_a_process_may_open_files(processes: Any) -> None:
    inputs = [torch.full((4,), 1.01, dtype=torch.float64, requires_grad=True) for _ in range(60)]
    f = blackbox(of_many, executor=processes, estimator=CentralDifference())
    found = torch.autograd.grad(f(inputs).sum(), inputs)
    assert all(torch.allclose(each, torch.full((4,), 1.01**59, dtype=torch.float64), rtol=1e-7) for each in found)


def test_a_point_that_a_failed_try_has_changed_is_whole_at_the_next(processes: Any) -> None:
    tries: list[float] = []

    def fails_once_after_a_change(x: torch.Tensor) -> torch.Tensor:
        y = changes_its_input(x)
        tries.append(0)
        if len(tries) == 5:
            raise OSError("once")
        return y

    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with ThreadPoolExecutor(1) as pool:
        f = blackbox(fails_once_after_a_change, executor=Workers(pool, retries=1), estimator=CentralDifference())
        found = torch.autograd.grad(f(x).sum(), x)[0]
    serial = blackbox(changes_its_input, executor=SerialEvaluation(), estimator=CentralDifference())
    assert torch.equal(found, torch.autograd.grad(serial(x).sum(), x)[0])


def test_errors_that_cannot_be_pickled_leave_the_pool_whole(processes: Any) -> None:
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(BlackboxError, match="RuntimeError: UnsendableError: 7 8"):
        blackbox(raises_what_cannot_be_pickled, executor=processes)(x).sum().backward()
    assert bool(blackbox(changes_its_input, executor=processes)(x).sum().isfinite())


def test_packing_takes_a_pool_as_it_is() -> None:
    truth = gradient(SerialEvaluation())
    with ThreadPoolExecutor(2) as pool:
        assert all(map(torch.equal, gradient(SerialEvaluation(executor=pool)), truth))
        stacked = gradient(StackedEvaluation(executor=pool), in_dims=(0, None))
    assert all(map(torch.equal, stacked, gradient(StackedEvaluation(), in_dims=(0, None))))
