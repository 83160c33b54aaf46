"""Gradients do not depend on where evaluations run: every executor, on the same cases, bit for bit."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ignite_tbptt.blackbox import Journaled, Result, SerialEvaluation, StackedEvaluation, Task, Workers
from tests.blackbox.executor_contract import CASES, gradients


class Pools(NamedTuple):
    threads: Any
    processes: Any
    dask: Any


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    distributed = importlib.import_module("distributed")
    spawn = multiprocessing.get_context("spawn")
    with (
        ThreadPoolExecutor(4) as threads,
        ProcessPoolExecutor(2, mp_context=spawn) as processes,
        distributed.LocalCluster(2, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        distributed.Client(cluster) as client,
    ):
        yield Pools(threads, processes, client.get_executor())


def backwards(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterable[Result]:
    """An executor of one's own: whatever the order it evaluates in, results come in that of the tasks."""
    given = list(tasks)
    return [function(task) for task in reversed(given)][::-1]


EXECUTORS: dict[str, Callable[[Pools, Path], Any]] = {
    "serial": lambda pools, path: SerialEvaluation(),
    "stacked": lambda pools, path: StackedEvaluation(required=False),
    "threads": lambda pools, path: pools.threads,
    "threads, with a time-out": lambda pools, path: Workers(pools.threads, timeout=30, retries=1),
    "threads, ahead": lambda pools, path: Workers(pools.threads, ahead=True),
    "the map of threads": lambda pools, path: pools.threads.map,
    "processes": lambda pools, path: pools.processes,
    "processes, lost ones as NaN": lambda pools, path: Workers(pools.processes, failed="nan"),
    "processes, ahead": lambda pools, path: Workers(pools.processes, ahead=True),
    "the map of processes": lambda pools, path: pools.processes.map,
    "Dask, ahead": lambda pools, path: Workers(pools.dask, ahead=True),
    "Dask": lambda pools, path: pools.dask,
    "serial on processes": lambda pools, path: SerialEvaluation(executor=pools.processes),
    "stacked on threads": lambda pools, path: StackedEvaluation(executor=pools.threads, required=False),
    "stacked on threads, ahead": lambda pools, path: StackedEvaluation(
        executor=Workers(pools.threads, ahead=True), required=False
    ),
    "journal": lambda pools, path: Journaled(path),
    "journal of processes": lambda pools, path: Journaled(path, pools.processes),
    "journal of threads, ahead": lambda pools, path: Journaled(path, Workers(pools.threads, ahead=True)),
    "of one's own": lambda pools, path: backwards,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_are_those_of_the_callers_thread(executor: str, case: str, pools: Pools, tmp_path: Path) -> None:
    if "journal" in executor and case == "a module":
        pytest.skip("a journal is for functions")
    truth = gradients(case, map)
    assert all(bool(part.any()) for part in truth)
    for _ in range(2):  # a journal has all evaluations the second time
        found = gradients(case, EXECUTORS[executor](pools, tmp_path / "journal"))
        assert all(map(torch.equal, found, truth))
