"""What a gradient by finite differences costs over the evaluations it is made of, beside other ways to get one.

Ratios are the time of a forward and a backward over the time of as many bare calls of the function, taken in turns in
the same run; each is the median of the pairs. Peers that are not installed say so: ``pip install scipy numdifftools
torchopt`` brings them all. Run with ``OMP_NUM_THREADS=1 python benchmarks/blackbox_cost.py``.
"""

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from figures import figure
from torch import Tensor

from ignite_tbptt.blackbox import CentralDifference, ForwardDifference, StackedEvaluation, blackbox

Thunk = Callable[[], object]


class Counted:
    """A function that counts its calls."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self.calls = fn, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.fn(*args)


class NaiveFunction(torch.autograd.Function):
    """What one writes first: a loop over elements, two evaluations each, everything cloned."""

    @staticmethod
    def forward(ctx: Any, fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.fn = fn
        ctx.save_for_backward(*inputs)
        return fn(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        gradients = []
        for k, x in enumerate(ctx.saved_tensors):
            gradient = torch.zeros_like(x)
            for index in np.ndindex(*x.shape):
                change = []
                for sign in (1, -1):
                    moved = [tensor.clone() for tensor in ctx.saved_tensors]
                    moved[k][index] += sign * 1e-3
                    change.append(ctx.fn(*moved))
                gradient[index] = ((change[0] - change[1]) / 2e-3 * cotangent).sum()
            gradients.append(gradient)
        return (None, *gradients)


def seconds(thunk: Thunk) -> float:
    """The time of one call."""
    start = time.perf_counter()
    thunk()
    return time.perf_counter() - start


def ratio(method: Thunk, bare: Thunk, calls: int, pairs: int) -> tuple[float, float]:
    """Median seconds of a method, and its median ratio to that many bare calls right before and after it."""
    times, ratios = [], []
    for _ in range(pairs):
        before = sum(seconds(bare) for _ in range(calls))
        times.append(seconds(method))
        after = sum(seconds(bare) for _ in range(calls))
        ratios.append(times[-1] * 2 / (before + after))
    return statistics.median(times), statistics.median(ratios)


def as_text(x: Tensor, w: Tensor) -> Tensor:
    """The function of the first example, as a string under eval."""
    w0, w1 = w.tolist()
    return torch.tensor([eval(f"2 * {a} * {w0} + ({a}) ** 2 * {w1}") for a in x.tolist()])


def one_millisecond(x: Tensor, w: Tensor) -> Tensor:
    """A function that keeps the processor busy for a millisecond."""
    stop = time.perf_counter() + 1e-3
    while time.perf_counter() < stop:
        pass
    return x * w[0] + x**2 * w[1]


def peers(f: Counted, x: Tensor, w: Tensor) -> dict[str, Thunk | str]:
    """Ways to a gradient of the sum of f with respect to x and w, by name; a text where one is missing."""

    def backward(function: Callable[..., Tensor]) -> Thunk:
        return lambda: function(x, w).sum().backward()

    def flat(z: Any) -> Any:
        z = torch.as_tensor(z, dtype=torch.float32)
        return f(z[: len(x)], z[len(x) :]).numpy()

    point = torch.cat([x, w]).detach().double().numpy()
    ways: dict[str, Thunk | str] = {
        "blackbox, forward": backward(blackbox(f, estimator=ForwardDifference())),
        "blackbox, central": backward(blackbox(f, estimator=CentralDifference())),
        "blackbox, central, in_dims": backward(blackbox(f, in_dims=(0, None))),
        "naive Function, central": backward(lambda *inputs: NaiveFunction.apply(f, *inputs)),
    }
    for method in ("2-point", "3-point"):
        ways[f"scipy approx_derivative, {method}"] = installed(
            "scipy.optimize._numdiff",
            lambda m, method=method: lambda: m.approx_derivative(flat, point, method=method, rel_step=1e-3),
        )
    ways["numdifftools Jacobian"] = installed("numdifftools", lambda m: lambda: m.Jacobian(flat)(point))
    ways["torchopt antithetic, n=12"] = installed("torchopt.diff.zero_order", lambda m: torchopt_way(m, f, x, w))
    return ways


def torchopt_way(module: Any, f: Counted, x: Tensor, w: Tensor) -> Thunk:
    """The way of torchopt, which differentiates scalars; both inputs are moved at once."""
    normal = torch.distributions.Normal(0, 1)
    decorated = module.zero_order(normal, method="antithetic", argnums=(0, 1), num_samples=12, sigma=1e-2)
    scalar = decorated(lambda x, w: f(x.detach(), w.detach()).sum())
    return lambda: scalar(x, w).backward()


def installed(name: str, make: Callable[[Any], Thunk]) -> Thunk | str:
    """What `make` makes of a module, or a text where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(importlib.import_module(name))
    except ImportError:
        return "not installed"


def overhead(title: str, fn: Callable[..., Tensor], pairs: int) -> None:
    """Table: evaluations, time and time over bare evaluations, for each way."""
    x, w = torch.linspace(-1, 1.5, 10).requires_grad_(), torch.tensor([1.2, -3.4], requires_grad=True)
    inputs = x.detach(), w.detach()
    bare = statistics.median(seconds(lambda: fn(*inputs)) for _ in range(200))
    print(f"\n{title}: 10 + 2 inputs, {bare * 1e6:.0f} us a call")
    print(f"  {'':33}{'evaluations':>12}{'ms':>9}{'over bare':>11}")
    f = Counted(fn)
    for name, way in peers(f, x, w).items():
        if isinstance(way, str):
            print(f"  {name:33}{way:>12}")
            continue
        way()
        way()  # verified at gradients 1, 2, 4, ...
        f.calls = 0
        way()
        calls = f.calls
        time_taken, over = ratio(way, lambda: fn(*inputs), calls, pairs if calls < 100 else 3)
        print(f"  {name:33}{calls:>12}{time_taken * 1e3:>9.2f}{over:>11.2f}")
        figure(f"{title}, 12 inputs, {name}: time over its {calls} evaluations", over, "x")


def three_evaluations() -> None:
    """A string function of 0.2 ms and one element: the fixed cost of a gradient, beside the naive Function's."""

    def slow_text(x: Tensor) -> Tensor:
        stop = time.perf_counter() + 2e-4
        while time.perf_counter() < stop:
            pass
        return torch.tensor([eval(f"2 * {a}") for a in x.tolist()])

    x = torch.tensor([0.5]).requires_grad_()
    mine = blackbox(slow_text)
    ways: list[Thunk] = [
        lambda: mine(x).sum().backward(),
        lambda: NaiveFunction.apply(slow_text, x).sum().backward(),
        lambda: [slow_text(x.detach()) for _ in range(3)],
    ]
    rounds = [[seconds(way) for way in ways] for _ in range(301)]
    over_naive = statistics.median(times[0] / times[1] for times in rounds)
    fixed = statistics.median(times[0] - times[2] for times in rounds)
    print("\nstring function of 0.2 ms, 1 input, 3 evaluations")
    print(f"  over the naive Function {over_naive:.2f}, fixed cost {fixed * 1e3:.2f} ms a gradient")
    figure("string function of 0.2 ms, 1 input: time over the naive Function", over_naive, "x")
    figure("fixed cost of a gradient", fixed * 1e3, "ms")


def rows_and_weights() -> None:
    """A numpy function of 256 independent rows of 64 and 64 shared weights."""

    def f(x: Any, w: Any) -> Any:
        return np.tanh(x * w).sum(1)

    counted = Counted(f)
    x, w = torch.randn(256, 64).requires_grad_(), torch.randn(64).requires_grad_()
    as_tensors = lambda x, w: torch.from_numpy(counted(x.numpy(), w.numpy()))  # noqa: E731
    naive = seconds(lambda: NaiveFunction.apply(as_tensors, x, w).sum().backward())
    print("\nx of 256 rows x 64 and w of 64, numpy")
    print(f"  naive Function, central, float32: {counted.calls} calls, {naive * 1e3:.0f} ms")
    for dtype in (torch.float32, torch.float64):
        wrapped = blackbox(counted, estimator=ForwardDifference(), numpy=True, in_dims=(0, None), dtype=dtype)
        step = lambda wrapped=wrapped: wrapped(x, w).sum().backward()  # noqa: E731
        calls = []
        for _ in range(2):
            counted.calls = 0
            step()
            calls.append(counted.calls)
        mine = statistics.median(seconds(step) for _ in range(21))
        print(
            f"  blackbox, forward, in_dims, {str(dtype)[6:]}: {calls[0]} calls the first time, {calls[1]} later, "
            f"{mine * 1e3:.1f} ms, 1/{naive / mine:.0f} of naive"
        )
        figure(f"256 rows x 64 and 64 weights, {str(dtype)[6:]}: naive Function over in_dims", naive / mine, "x")


def column_loop(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The serial loop by hand: each column moved in all rows at once, central differences."""
    gradient = torch.empty_like(x)
    with torch.no_grad():
        for column in range(x.shape[1]):
            ahead, behind = x.clone(), x.clone()
            ahead[:, column] += 2.0**-8
            behind[:, column] -= 2.0**-8
            gradient[:, column] = (net(ahead) - net(behind)).sum(1) / 2.0**-7
    return gradient


def stacking() -> None:
    """Points in one call along the batch axis, against one after the other."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8)).requires_grad_(False)
    print("\nstacked, D = 64, two layers: ms, and how many times as long others take")
    print(f"  {'B':>5}{'stacked':>10}{'serial evaluation':>20}{'loop by hand':>15}{'128 bare calls':>17}")
    for batch in (1, 10, 32, 128, 256, 1024):
        x = torch.randn(batch, 64, requires_grad=True)
        serial = blackbox(net, in_dims=0)
        stacked = blackbox(net, in_dims=0, executor=StackedEvaluation())
        bare = x.detach()
        ways: list[Thunk] = [
            lambda f=stacked, x=x: f(x).sum().backward(),  # type: ignore[misc]
            lambda f=serial, x=x: f(x).sum().backward(),  # type: ignore[misc]
            lambda x=x: column_loop(net, x),  # type: ignore[misc]
            lambda x=bare: [net(x) for _ in range(128)],  # type: ignore[misc]
        ]
        for way in ways:
            way()
        rounds = [[seconds(way) for way in ways] for _ in range(31)]
        taken = statistics.median(times[0] for times in rounds)
        slower = [statistics.median(times[k] / times[0] for times in rounds) for k in (1, 2, 3)]
        print(f"  {batch:5}{taken * 1e3:10.2f}{slower[0]:20.2f}{slower[1]:15.2f}{slower[2]:17.2f}")
        figure(f"{batch} rows of 64: a loop over columns by hand over stacked evaluation", slower[1], "x")


if __name__ == "__main__":
    torch.set_num_threads(1)
    three_evaluations()
    overhead("string function", as_text, pairs=41)
    overhead("1 ms function", one_millisecond, pairs=7)
    rows_and_weights()
    stacking()
