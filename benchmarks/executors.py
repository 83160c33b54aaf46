"""What do threads, processes and Dask gain for evaluations that take 10 ms, and what does each cost by itself?

64 evaluations for the gradient of 32 numbers by central differences: of a function that sleeps, as one that waits for
another machine does, and of one that computes; beside it the 64 calls by hand, given to the pool's own map one by one,
which shows what the machine has to give. Then a function that does nothing, for the cost of an evaluation alone. Last a
recurrent model whose 20 steps each call a simulator of 10 ms: forward and backward, where the evaluations of the
whole window go out together, and with ``ahead=True``, where they begin during the forward. Serial and parallel take
turns; figures are medians.

    OMP_NUM_THREADS=1 python benchmarks/executors.py
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from distributed import Client, LocalCluster
from figures import figure

from ignite_tbptt.blackbox import CentralDifference, Workers, blackbox

MILLISECONDS = 10


def sleeping(x: Any) -> Any:
    time.sleep(MILLISECONDS / 1000)
    return np.sin(x)


def computing(x: Any) -> Any:
    end, value = time.thread_time() + MILLISECONDS / 1000, 0.0
    while time.thread_time() < end:
        value += math.sin(value)
    return np.sin(x)


def nothing(x: Any) -> Any:
    return x * 2


def gradient(f: Any, x: torch.Tensor) -> Callable[[], Any]:
    def run() -> None:
        x.grad = None
        f(x).sum().backward()

    return run


def compare(title: str, fn: Any, executors: dict[str, Any], rounds: int, bare: dict[str, Any] | None = None) -> None:
    x = torch.linspace(0, 1, 32, dtype=torch.float64).requires_grad_()
    runs = {
        name: gradient(blackbox(fn, numpy=True, executor=executor, estimator=CentralDifference()), x)
        for name, executor in executors.items()
    }
    points = [x.detach().numpy() + k for k in range(64)]  # Dask evaluates equal ones once
    for name, run_all in (bare or {}).items():
        runs[name] = functools.partial(run_all, fn, points)
    for run in runs.values():  # verified at gradients 1, 2, 4
        for _ in range(4):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    serial = statistics.median(times["serial"])
    for name, taken in times.items():
        middle = statistics.median(taken)
        each = f"{middle / 64 * 1e6:>8.0f} us each"
        print(f"{title:34}{name:24}{middle * 1e3:>10.1f} ms{serial / middle:>8.2f}x{each}", flush=True)
        if name != "serial":
            figure(f"{title}, {name}: speed over one after the other", serial / middle, "x")


def window(threads: ThreadPoolExecutor, rounds: int) -> None:
    steps = 20
    inputs = torch.randn(steps, 2, dtype=torch.float64)
    gain = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def simulator(x: Any, h: Any) -> Any:
        time.sleep(MILLISECONDS / 1000)
        return np.tanh(x + 0.5 * h)

    def run(f: Any) -> tuple[float, float]:
        gain.grad, h = None, torch.zeros(2, dtype=torch.float64)
        start = time.perf_counter()
        for x in inputs:
            h = f(x * gain, h * gain)
        middle = time.perf_counter()
        h.sum().backward()
        return middle - start, time.perf_counter() - middle

    ways = {
        which: blackbox(simulator, numpy=True, executor=executor, estimator=CentralDifference())
        for which, executor in (("", threads), (", ahead", Workers(threads, ahead=True)))
    }
    times: dict[str, list[tuple[float, float]]] = {which: [] for which in ways}
    for _ in range(2 * rounds):
        for which, f in ways.items():
            times[which].append(run(f))
    ideal = 8 * steps / 16 * MILLISECONDS / 1000
    for which, taken in times.items():
        forward, backward = (statistics.median(part) for part in zip(*taken[2:], strict=True))
        print(
            f"window of {steps} steps, 4 numbers each, on 16 threads{which}: forward {forward * 1e3:.0f} ms, backward "
            f"{backward * 1e3:.0f} ms; its {8 * steps} evaluations take {ideal * 1e3:.0f} ms at best"
        )
        figure(f"window of {steps} calls on 16 threads{which}: backward over the best possible", backward / ideal, "x")


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradients on threads and processes, beside one after the other.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    with (
        ThreadPoolExecutor(16) as threads,
        ProcessPoolExecutor(2) as processes,
        LocalCluster(2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        dask = client.get_executor()
        compare("64 evaluations that sleep", sleeping, {"serial": None, "16 threads": threads}, rounds)
        pools = {"serial": None, "2 processes": processes, "2 workers of Dask": dask}
        bare = {
            "2 processes by hand": lambda fn, points: list(processes.map(fn, points)),
            "Dask by hand": lambda fn, points: client.gather(client.map(fn, points, pure=False)),
        }
        compare("64 evaluations that compute", computing, pools, rounds, bare)
        pools = {"serial": None, "16 threads": threads, "with a time-out": Workers(threads, 60), **pools}
        compare("64 evaluations of nothing", nothing, pools, 10 * rounds)
        window(threads, rounds)


if __name__ == "__main__":
    main()
