"""What was evaluated once is not paid for again, whatever ended the run; and nothing else is taken for it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ignite_tbptt.blackbox import Blackbox, BlackboxError, CentralDifference, Journaled, blackbox

CALLS: list[int] = []


def counted(x: Any, power: int = 2) -> Any:
    CALLS.append(1)
    return np.sin(x) ** power


def gradient(executor: Any, fn: Any = counted, **kwargs: Any) -> torch.Tensor:
    CALLS.clear()
    torch.manual_seed(0)
    x = torch.linspace(0, 1, 5, dtype=torch.float64).requires_grad_()
    f: Any = blackbox(fn, numpy=True, executor=executor, estimator=CentralDifference())
    f(x, **kwargs).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("pooled", [False, True])
def test_a_second_run_evaluates_nothing_and_gives_the_same_bits(pooled: bool, tmp_path: Path) -> None:
    truth = gradient(None)
    spent = len(CALLS)
    with ThreadPoolExecutor(3) as pool:
        for expected in (spent, 1):  # the forward call is made by itself
            found = gradient(Journaled(tmp_path / "journal", pool if pooled else map))
            assert torch.equal(found, truth)
            assert len(CALLS) <= expected
            assert expected == 1 or len(CALLS) >= 11  # the points of the gradient; those of probes are among them


def test_other_arguments_are_other_evaluations(tmp_path: Path) -> None:
    for power in (2, 3):
        assert torch.equal(gradient(Journaled(tmp_path / "journal"), power=power), gradient(None, power=power))


def test_random_numbers_belong_to_the_key(tmp_path: Path) -> None:
    def noisy(x: Any) -> Any:
        return x * np.random.random(5)

    found = []
    for seed in (1, 2, 1):
        np.random.seed(seed)
        found.append(gradient(Journaled(tmp_path / "journal"), fn=noisy))
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1])


def test_a_torn_record_is_ignored_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    truth = gradient(Journaled(path))
    whole = path.read_bytes()
    for lost in (1, 40, 500):
        path.write_bytes(whole[:-lost])
        assert torch.equal(gradient(Journaled(path)), truth)
        assert 1 < len(CALLS) <= 8
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 255
    path.write_bytes(bytes(damaged))
    assert torch.equal(gradient(Journaled(path)), truth)
    assert gradient(Journaled(path)) is not None
    assert len(CALLS) == 1


def test_a_run_that_was_killed_does_not_pay_again(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys
            import numpy as np
            import torch
            from ignite_tbptt.blackbox import CentralDifference, Journaled, blackbox

            calls = [0]

            def simulate(x):
                calls[0] += 1
                if calls[0] == int(sys.argv[2]):
                    os.kill(os.getpid(), signal.SIGKILL)
                return np.exp(x)

            x = torch.linspace(0, 1, 8, dtype=torch.float64).requires_grad_()
            f = blackbox(simulate, numpy=True, executor=Journaled(sys.argv[1]), estimator=CentralDifference())
            f(x).sum().backward()
            print(calls[0], float(x.grad.sum()))
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def run(journal: str, killed_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(tmp_path / journal), str(killed_at)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    clean = run("clean", 10**9).stdout.split()
    assert run("journal", 12).returncode == -9
    again = run("journal", 10**9).stdout.split()
    assert again[1] == clean[1]
    # both made the forward call; of the others that were finished before the kill none is made twice
    assert int(again[0]) + 11 <= int(clean[0]) + 2


def test_what_is_no_journal_of_the_function(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journaled(path)
    gradient(journal)
    with pytest.raises(ValueError, match="is a journal of another function than <lambda>, or of an earlier version"):
        gradient(Journaled(path), fn=lambda x: np.cos(x))  # noqa: PLW0108
    with pytest.raises(ValueError, match="is in use for another function than <lambda>"):
        gradient(journal, fn=lambda x: np.cos(x))  # noqa: PLW0108
    (tmp_path / "text").write_text("evaluations")
    with pytest.raises(ValueError, match="is no journal of evaluations"):
        gradient(Journaled(tmp_path / "text"))
    module = Blackbox(nn.Linear(2, 2), executor=Journaled(tmp_path / "module"))
    with pytest.raises(ValueError, match="a journal is for functions"):
        module(torch.ones(1, 2, requires_grad=True)).sum().backward()


def test_what_raised_is_not_kept(tmp_path: Path) -> None:
    broken = [True]

    def solver(x: Any) -> Any:
        if broken[0] and x[0] != 0.0:
            raise ArithmeticError("diverged")
        return x * 2

    with pytest.raises(BlackboxError, match="diverged"):
        gradient(Journaled(tmp_path / "journal"), fn=solver)
    broken[0] = False
    assert torch.allclose(gradient(Journaled(tmp_path / "journal"), fn=solver), torch.full((5,), 2.0).double())


def test_what_a_function_closes_over_and_holds_is_part_of_it(tmp_path: Path) -> None:
    def scaled(factor: float) -> Any:
        return lambda x: x * factor

    makers: list[Any] = [scaled, lambda power: functools.partial(counted, power=int(power))]
    for number, make in enumerate(makers):
        path = tmp_path / str(number)
        for _ in range(2):
            gradient(Journaled(path), make(2.0))
        with pytest.raises(ValueError, match="is a journal of another function"):
            gradient(Journaled(path), make(3.0))
