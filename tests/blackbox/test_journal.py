"""A journal: the gradients are those without one, and nothing that is in the file is paid for again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ignite_tbptt.blackbox import Blackbox, Journaled, StackedEvaluation, blackbox

CALLS: list[Tensor] = []


def smooth(x: Tensor) -> Tensor:
    CALLS.append(x)
    return (x.detach() * 3).sin()


def noisy(x: Tensor) -> Tensor:
    CALLS.append(x)
    return x.detach() * torch.rand(x.shape).to(x)


def of_gradient(fn: Any, executor: Any, seed: int = 0, **options: Any) -> tuple[Tensor, int]:
    """The gradient, and the calls that it has cost beside the forward."""
    torch.manual_seed(seed)
    x = torch.linspace(-1, 1, 12).double().reshape(4, 3).requires_grad_()
    y = blackbox(fn, executor=executor, **options)(x)
    CALLS.clear()
    return torch.autograd.grad(y.sum(), [x])[0], len(CALLS)


@pytest.mark.parametrize("fn", [smooth, noisy])
@pytest.mark.parametrize("where", ["map", "threads", "stacks"])
def test_a_second_run_pays_nothing_and_gives_the_same_bits(fn: Any, where: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"in_dims": 0} if where == "stacks" else {}
    with ThreadPoolExecutor(2) as pool:
        inner: Any = map if where == "map" else pool

        def journal() -> Any:
            journaled = Journaled(inner, tmp_path / "journal")
            return StackedEvaluation(executor=journaled) if where == "stacks" else journaled

        plain: Any = StackedEvaluation() if where == "stacks" else map
        wanted, cost = of_gradient(fn, plain, **options)
        first, paid = of_gradient(fn, journal(), **options)
        again, nothing = of_gradient(fn, journal(), **options)
    assert torch.equal(first, wanted)
    assert torch.equal(again, wanted)
    assert 0 < paid <= cost
    assert nothing == 0


def test_other_points_and_other_random_numbers_are_evaluated(tmp_path: Path) -> None:
    one, paid = of_gradient(noisy, Journaled(map, tmp_path / "journal"))
    other, as_much = of_gradient(noisy, Journaled(map, tmp_path / "journal"), seed=1)
    assert as_much == paid
    assert not torch.equal(one, other)


def test_a_torn_record_is_ignored_and_what_follows_it_is_found(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    wanted, _ = of_gradient(smooth, Journaled(map, path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    found, repeated = of_gradient(smooth, Journaled(map, path))
    assert (repeated, torch.equal(found, wanted)) == (1, True)
    assert of_gradient(smooth, Journaled(map, path))[1] == 0
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + b"\xff" + whole[middle + 1 :])
    found, repeated = of_gradient(smooth, Journaled(map, path))
    assert (repeated, torch.equal(found, wanted)) == (1, True)


SCRIPT = """
import os, signal, sys, torch
from ignite_tbptt.blackbox import Journaled, blackbox
folder, deadly = sys.argv[1:]
def simulator(x):
    with open(folder + "/paid", "a") as file:
        print(x.tolist(), file=file)
    if deadly == "yes" and len(open(folder + "/paid").readlines()) == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return x.detach() ** 3
x = torch.arange(1.0, 13).double().requires_grad_()
y = blackbox(simulator, executor=Journaled(map, folder + "/journal"))(x)
open(folder + "/paid", "w").close()
y.sum().backward()
print(x.grad.tolist())
"""


def test_a_run_that_was_killed_does_not_pay_twice(tmp_path: Path) -> None:
    def run(deadly: str) -> Any:
        arguments = [sys.executable, "-c", SCRIPT, str(tmp_path), deadly]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(arguments, check=False, capture_output=True, text=True, env=environment)

    assert run("yes").returncode == -signal.SIGKILL
    before = (tmp_path / "paid").read_text().splitlines()[:14]
    result = run("no")
    after = (tmp_path / "paid").read_text().splitlines()
    assert not set(before) & set(after)
    assert eval(result.stdout) == pytest.approx([3.0 * k**2 for k in range(1, 13)], rel=1e-8)


def test_the_journal_of_another_function_is_refused(tmp_path: Path) -> None:
    def scaled(factor: float) -> Any:
        return lambda x: x.detach() * factor

    path = tmp_path / "journal"
    of_gradient(scaled(2.0), Journaled(map, path))
    of_gradient(scaled(2.0), Journaled(map, path))
    for other in (scaled(3.0), smooth):
        with pytest.raises(
            ValueError, match=r"is the journal of another function, <lambda>, or of .*a file of its own"
        ):
            of_gradient(other, Journaled(map, path))
    (tmp_path / "text").write_text("something else")
    with pytest.raises(ValueError, match="is no journal of evaluations"):
        of_gradient(smooth, Journaled(map, tmp_path / "text"))
    lock = __import__("threading").Lock()
    with pytest.raises(TypeError, match="holds what a journal cannot know it by"):
        of_gradient(lambda x: x.detach() * (lock is not None), Journaled(map, tmp_path / "lock"))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3).double())
        self.offset: Tensor
        self.register_buffer("offset", torch.zeros(3).double())

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(x)
        return (x * self.weight + self.offset).detach() ** 2


def test_modules_are_known_by_their_state_and_parameters_are_points(tmp_path: Path) -> None:
    module = Scale()

    def cost() -> int:
        wrapped = Blackbox(module, executor=Journaled(map, tmp_path / "journal"))
        y = wrapped(torch.ones(2, 3).double())
        CALLS.clear()
        y.sum().backward()
        return len(CALLS)

    paid = cost()
    assert cost() == 0
    module.offset += 1
    assert cost() == paid
    with torch.no_grad():
        module.weight.add_(1)
    assert cost() == paid
