"""What fails where evaluations run is named, tried again or given up, as was asked for; and nothing hangs."""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import pickle
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ignite_tbptt.blackbox import (
    BlackboxError,
    CentralDifference,
    SerialEvaluation,
    StackedEvaluation,
    UntrustedGradientWarning,
    Workers,
    blackbox,
    travel,
)
from tests.blackbox.slow_programs import (
    Busy,
    Once,
    Table,
    changes_its_input,
    looked_up,
    raises_what_cannot_be_pickled,
    squared,
    squared_beside_a_thread,
)


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


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


def test_what_verifies_goes_out_together_too() -> None:
    """Two elements, each at three widths to both sides: one round for each, not twelve."""
    x = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    sizes: list[int] = []

    def counted(function: Any, tasks: Any) -> Any:
        given = list(tasks)
        sizes.append(len(given))
        return map(function, given)

    f: Any = blackbox(lambda x: np.sin(x).sum(), numpy=True, executor=counted, estimator=CentralDifference())
    f(x).backward()
    assert sizes == [1, 6, 6, 4]  # at x once more, the two elements, the gradient


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


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="executor must be a pool with a method submit"):
        Workers(map)  # type: ignore[arg-type]
    pool = ThreadPoolExecutor(1)
    for timeout in (0, -1.0, float("nan"), "60"):
        with pytest.raises(ValueError, match="timeout must be a positive number of seconds"):
            Workers(pool, timeout=timeout)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"failed must be 'raise', which ends the gradient, or 'nan'.* got 'skip'"):
        Workers(pool, failed="skip")  # type: ignore[arg-type]
    for retries in (-1, 1.5, True):
        with pytest.raises(ValueError, match="retries must be a whole number, 0 or more"):
            Workers(pool, retries=retries)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="executor must be called as map"):
        blackbox(np.sin, executor=ThreadPoolExecutor)  # type: ignore[call-overload]


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


def test_what_cannot_be_sent_and_a_pool_that_is_gone(processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    lock = threading.Lock()
    told = r"raised TypeError: it cannot be sent to another process .* or use threads\s+in evaluation"
    for fn in (lambda x: (x.sin(), lock)[0], lambda x: x.sin()):
        with pytest.raises(BlackboxError, match=told):
            blackbox(fn, executor=processes)(x).sum().backward()
        monkeypatch.setitem(sys.modules, "cloudpickle", None)
    monkeypatch.undo()  # which sends what is at the top level of no module
    assert torch.autograd.grad(blackbox(lambda x: x * 2, executor=processes)(x).sum(), x)[0] == pytest.approx(2)
    with ThreadPoolExecutor(1) as pool:
        pass
    for workers in (Workers(pool), Workers(pool, failed="nan")):
        with pytest.raises(BlackboxError, match="the pool was shut down; keep it open as long as gradients are taken"):
            blackbox(np.sin, numpy=True, executor=workers)(x).sum().backward()  # type: ignore[arg-type]


def test_pools_of_another_kind() -> None:
    class Promising:
        def submit(self, *args: Any) -> str:
            return "later"

    class Cancelling(Executor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            future: Future[Any] = Future()
            future.cancel()
            return future

    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for pool, told in (
        (Promising(), r"submit of Promising returned no concurrent\.futures\.Future"),
        (Cancelling(), "Canc"),
    ):
        with pytest.raises(BlackboxError, match=told):
            blackbox(torch.sin, executor=Workers(pool, retries=1))(x).sum().backward()  # type: ignore[arg-type]


def test_random_numbers_of_the_client_of_a_cluster_are_not_those_of_the_function(processes: Any) -> None:
    """Dask's draws some for every result that it fetches, and its workers do while they evaluate."""
    pool = Workers(processes)

    def restless(function: Any, tasks: Any) -> Iterator[Any]:
        for result in pool(function, tasks):
            random.random()
            yield result

    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2).requires_grad_()
    whole = blackbox(squared, executor=restless, estimator=CentralDifference())
    rows = blackbox(squared, executor=restless, in_dims=0, vectorized=False, estimator=CentralDifference())
    for f in (whole, rows):
        for _ in range(2):
            assert torch.allclose(torch.autograd.grad(f(x).sum(), x)[0], 2 * x, rtol=1e-9)
    assert whole.count.nfev == 2 * 12
    disturbed = blackbox(squared_beside_a_thread, executor=pool, estimator=CentralDifference())
    for _ in range(2):
        assert torch.allclose(torch.autograd.grad(disturbed(x).sum(), x)[0], 2 * x, rtol=1e-9)
    assert disturbed.count.nfev == 2 * 12


def test_a_blackbox_inside_of_an_evaluation_does_not_wait_for_its_own_round() -> None:
    def cubed(z: torch.Tensor) -> torch.Tensor:
        return (z**3).detach()

    with ThreadPoolExecutor(2) as pool, ThreadPoolExecutor(2) as other:
        inner = blackbox(cubed, executor=other, estimator=CentralDifference(order=4))

        def slope(x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                z = (x * torch.rand(2, dtype=x.dtype)).requires_grad_()
                return torch.autograd.grad(inner(z).sum(), z)[0]

        found = []
        for executor in (map, pool):
            torch.manual_seed(0)
            x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
            f = blackbox(slope, executor=executor, estimator=CentralDifference(order=4))
            found.append(torch.autograd.grad(f(x).sum(), x)[0])
    torch.manual_seed(0)
    assert torch.allclose(found[0], 6 * x * torch.rand(2, dtype=x.dtype) ** 2, rtol=1e-6)
    assert torch.equal(*found)


class Recorded(Executor):
    """Threads, asked as if they were processes."""

    _max_workers = 2

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.threads = threads
        self.sizes: list[int] = []
        self.sent = 0

    def submit(self, fn: Any, data: Any, /) -> Any:  # type: ignore[override]
        self.sizes.append(len(pickle.loads(data)[-1]))
        self.sent += len(data)
        return self.threads.submit(fn, data)


@pytest.mark.parametrize("milliseconds", [0.05, 15])
def test_short_evaluations_are_sent_several_at_a_time(milliseconds: float) -> None:
    x = torch.linspace(0, 1, 100 if milliseconds < 1 else 8, dtype=torch.float64).requires_grad_()
    with ThreadPoolExecutor(2) as threads:
        pool = Recorded(threads)
        f = blackbox(Busy(milliseconds), executor=pool, estimator=CentralDifference(), repeatable=False)
        found = torch.autograd.grad(f(x).sum(), x)[0]
    assert torch.equal(found, torch.autograd.grad(blackbox(squared, estimator=CentralDifference())(x).sum(), x)[0])
    assert (max(pool.sizes) > 1) == (milliseconds < 10)


@pytest.mark.parametrize("count", [16, 2])
def test_a_cluster_is_sent_more_at_a_time_where_there_is_enough_for_all_workers(count: int) -> None:
    x = torch.linspace(0, 1, count, dtype=torch.float64).requires_grad_()
    with ThreadPoolExecutor(2) as threads:
        pool = Recorded(threads)
        f = blackbox(Busy(15), executor=pool, estimator=CentralDifference(), repeatable=False)
        for _ in range(3):
            pool.sizes.clear()
            found = torch.autograd.grad(f(x).sum(), x)[0]
    assert (2 < max(pool.sizes) <= 4) if count > 8 else max(pool.sizes) == 1
    assert torch.equal(found, torch.autograd.grad(blackbox(squared, estimator=CentralDifference())(x).sum(), x)[0])


def test_points_of_many_bytes_are_not_all_made_ahead() -> None:
    """80 points of 8 MiB on two slow workers: about 256 MiB of them wait."""
    made, done, waiting = [0], [0], [0]

    class Watched(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            made[0] += len(args[1])  # the tasks of a group
            waiting[0] = max(waiting[0], made[0] - done[0])
            return super().submit(fn, *args, **kwargs)

    def slow(x: Any, field: Any) -> Any:
        time.sleep(0.03)
        done[0] += 1
        return x * field[:40]

    x = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    with Watched(2) as pool:
        f = blackbox(slow, numpy=True, executor=pool, estimator=CentralDifference())
        f(x, torch.ones(2**20, dtype=torch.float64)).sum().backward()
    assert made[0] >= 80
    assert waiting[0] < 40


def test_a_large_program_is_sent_to_each_worker_once() -> None:
    x = torch.linspace(0, 1, 10, dtype=torch.float64).requires_grad_()
    table = torch.rand(10_000, dtype=torch.float64)
    with ThreadPoolExecutor(2) as threads:
        pool = Recorded(threads)
        f: Any = blackbox(looked_up, executor=pool, estimator=CentralDifference())
        for _ in range(3):
            found = torch.autograd.grad(f(x, Table(table)).sum(), x)[0]
    assert torch.equal(
        found, torch.autograd.grad(blackbox(looked_up, estimator=CentralDifference())(x, Table(table)).sum(), x)[0]
    )
    assert pool.sent < 2.5 * table.nbytes
    travel._READ.clear()  # new workers, which have not got it
    with ThreadPoolExecutor(2) as pool.threads:
        again = torch.autograd.grad(f(x, Table(table)).sum(), x)[0]
    assert torch.equal(again, found)


def test_lost_evaluations_count_as_nan() -> None:
    def fails_ahead_of_two(x: Any) -> Any:
        if (x > 2).any():
            raise OSError("the licence server is busy")
        return x**2

    x = torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64, requires_grad=True)
    with ThreadPoolExecutor(2) as pool:
        for executor in (
            Workers(pool, failed="nan"),
            StackedEvaluation(executor=Workers(pool, failed="nan"), required=False),
        ):
            f = blackbox(fails_ahead_of_two, numpy=True, executor=executor, estimator=CentralDifference())
            with pytest.warns(
                UntrustedGradientWarning, match="evaluations were lost .* the last by OSError: the lic"
            ) as warned:
                f(x).sum().backward()
            told = [str(each.message).split(" evaluations")[0] for each in warned]
            assert told == ["3 of 6", "1 of 6"]  # of those that compare steps, and of the gradient itself
            # one-sided where the point ahead was lost: its error is h
            assert x.grad is not None
            assert torch.allclose(x.grad, 2 * x.detach(), rtol=1e-5)
            x.grad = None
        g = blackbox(fails_ahead_of_two, numpy=True, executor=Workers(pool), estimator=CentralDifference())
        with pytest.raises(BlackboxError, match="the licence server is busy"):
            g(x).sum().backward()


def test_what_is_lost_while_it_is_verified_is_verified_later() -> None:
    lost = [True]

    def moody(x: Any) -> Any:
        if lost[0] and threading.current_thread() is not threading.main_thread():
            raise OSError("not now")
        return x * np.random.default_rng().random()

    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with ThreadPoolExecutor(2) as pool:
        f = blackbox(moody, numpy=True, executor=Workers(pool, failed="nan"))
        with (
            pytest.warns(UntrustedGradientWarning, match="lost and count as NaN, the last by OSError: not now"),
            pytest.raises(BlackboxError, match="NaN or infinite on both sides"),
        ):
            f(x).sum().backward()
        lost[0] = False
        with pytest.raises(BlackboxError, match="gives other outputs for the same inputs"):
            f(x).sum().backward()


def test_failing_and_hanging_evaluations_do_not_show_in_the_weights() -> None:
    """Of all points one in ten fails and one in twenty hangs, the first time that it is asked for."""
    known: set[bytes] = set()
    happened = {"raised": 0, "hung": 0}

    def simulator(x: Any, w: Any) -> Any:
        return np.sqrt(1 + (x * w).sum(1)) * w[0]

    def flaky(x: Any, w: Any) -> Any:
        key = hashlib.sha256(x.tobytes() + w.tobytes()).digest()
        if key not in known and threading.current_thread() is not threading.main_thread():
            known.add(key)
            if key[0] % 20 < 2:
                happened["raised"] += 1
                raise OSError("the licence server is busy")
            if key[0] % 20 == 2:
                happened["hung"] += 1
                time.sleep(0.5)
        return simulator(x, w)

    def trained(fn: Any, executor: Any) -> torch.Tensor:
        torch.manual_seed(0)
        w = torch.ones(3, dtype=torch.float64, requires_grad=True)
        f = blackbox(fn, numpy=True, executor=executor, estimator=CentralDifference())
        optimizer = torch.optim.Adam([w], lr=0.1)
        for _ in range(12):
            optimizer.zero_grad()
            ((f(torch.rand(4, 3, dtype=torch.float64), w) - 2) ** 2).sum().backward()
            optimizer.step()
        return w.detach()

    with ThreadPoolExecutor(16) as pool:
        found = trained(flaky, Workers(pool, timeout=0.2, retries=5))
    assert min(happened.values()) > 0
    assert torch.equal(found, trained(simulator, None))


@pytest.mark.slow
def test_a_pool_that_heals_gives_the_gradient_although_a_worker_was_killed(tmp_path: Path) -> None:
    distributed = importlib.import_module("distributed")
    clean = tmp_path / "clean"
    clean.mkdir()
    (clean / "die").touch()
    with (
        distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = run_once(tmp_path, "die", client.get_executor())
        assert torch.equal(found, run_once(clean, "die", None))
        assert torch.equal(run_once(tmp_path, "die", client.get_executor()), found)
