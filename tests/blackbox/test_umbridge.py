"""UM-Bridge both ways round: the truth is autograd in float64 of the function that is served."""

from __future__ import annotations

import json
import pickle
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ignite_tbptt.blackbox import (
    BlackboxError,
    CentralDifference,
    UmbridgeServer,
    blackbox,
    blackbox_from_umbridge,
    serve_umbridge,
)

THETA = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
FORCE = torch.tensor([1.5, -0.2], dtype=torch.float64)

# Central differences in float64 at numbers of size one: a third derivative of size one times h^2 / 6 with h = 6e-6.
CLOSE: Any = {"rtol": 1e-8, "atol": 1e-8}


def simulated(theta: Any, force: Any, gain: float = 1.0) -> Any:
    """Two outputs of two inputs, in numpy."""
    if theta[0] > 50:
        raise ArithmeticError("no convergence")
    return gain * np.sin(theta) * force[0], np.array([np.sum(theta**2) * force[1]])


def truth(theta: Tensor, force: Tensor, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    return gain * torch.sin(theta) * force[0], (theta.square().sum() * force[1]).reshape(1)


@pytest.fixture(scope="module")
def server() -> Iterator[UmbridgeServer]:
    with serve_umbridge(simulated, np.ones(3), np.ones(2), port=0) as running:
        yield running


def gradients(f: Callable[..., Any], theta: Tensor = THETA, force: Tensor = FORCE) -> list[Tensor]:
    theta, force = theta.clone().requires_grad_(), force.clone().requires_grad_()
    one, other = f(theta, force)
    return list(torch.autograd.grad((one * one).sum() + 3 * other.sum(), [theta, force]))


WAYS: dict[str, dict[str, Any]] = {"its own gradient": {}, "differences": {"estimator": CentralDifference()}}


@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_the_function(way: str, server: UmbridgeServer) -> None:
    f = blackbox_from_umbridge(server.url, "forward", timeout=30, **WAYS[way])
    for found, right in zip(f(THETA, FORCE), truth(THETA, FORCE), strict=True):
        assert torch.equal(found, right) or torch.allclose(found, right, rtol=1e-15, atol=0)
    for found, right in zip(gradients(f), gradients(truth), strict=True):
        assert torch.allclose(found, right, **CLOSE)


@pytest.mark.parametrize("way", WAYS)
def test_rows_under_vmap_float32_and_config(way: str, server: UmbridgeServer) -> None:
    f = blackbox_from_umbridge(server.url, "forward", {"gain": 2.0}, **WAYS[way])
    theta, force = torch.stack([THETA, 2 * THETA]).float().requires_grad_(), FORCE.float()
    one, other = torch.vmap(f, (0, None))(theta, force)
    assert one.dtype == torch.float32
    (found,) = torch.autograd.grad(one.sum() + other.sum(), theta)
    x = theta.detach().double().requires_grad_()
    one, other = torch.vmap(lambda row: truth(row, FORCE, 2.0))(x)
    (right,) = torch.autograd.grad(one.sum() + other.sum(), x)
    assert torch.allclose(found.double(), right, rtol=1e-6, atol=1e-6)


def test_evaluations_on_threads_are_those_in_turn(server: UmbridgeServer) -> None:
    serial = gradients(blackbox_from_umbridge(server.url, "forward", estimator=CentralDifference()))
    with ThreadPoolExecutor(4) as pool:
        f = blackbox_from_umbridge(server.url, "forward", estimator=CentralDifference(), executor=pool)
        assert all(map(torch.equal, gradients(f), serial))


def test_what_cuts_an_input_off_costs_no_request(server: UmbridgeServer) -> None:
    f = blackbox_from_umbridge(server.url, "forward")
    theta = THETA.clone().requires_grad_()
    _, other = f(theta, FORCE)  # force needs none, and the first output is not used
    (found,) = torch.autograd.grad(other.sum(), theta)
    assert torch.allclose(found, 2 * THETA * FORCE[1], **CLOSE)
    (gradient,) = torch.autograd.grad(f(theta, FORCE)[0].sum(), theta, create_graph=True)
    with pytest.raises(BlackboxError, match=r"second derivative of forward: .* or comes from elsewhere"):
        (gradient.sum() + theta.square().sum()).backward()


def test_models_travel_to_other_processes(server: UmbridgeServer) -> None:
    for options in WAYS.values():
        f = pickle.loads(pickle.dumps(blackbox_from_umbridge(server.url, "forward", **options)))
        assert torch.equal(f(THETA, FORCE)[1], truth(THETA, FORCE)[1])


def asked(server: UmbridgeServer, what: str, **fields: Any) -> Any:
    request = urllib.request.Request(f"{server.url}/{what}", json.dumps(fields).encode())
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def test_the_answers_of_the_protocol(server: UmbridgeServer) -> None:
    about = {"name": "forward", "config": {}}
    given = {**about, "input": [THETA.tolist(), FORCE.tolist()]}
    assert asked(server, "InputSizes", **about) == {"inputSizes": [3, 2]}
    assert asked(server, "OutputSizes", **about) == {"outputSizes": [3, 1]}
    assert asked(server, "ModelInfo", **about)["support"]["Gradient"] is True
    along = [0.5, 1.0, -2.0]
    found = asked(server, "ApplyJacobian", **given, outWrt=1, inWrt=0, vec=along)["output"]
    right = torch.func.jvp(lambda t: truth(t, FORCE)[1], (THETA,), (torch.tensor(along, dtype=torch.float64),))[1]
    assert torch.allclose(torch.tensor(found, dtype=torch.float64), right, **CLOSE)
    for wrong, kind, message in (
        ({**given, "input": [[1.0]]}, "InvalidInput", "vectors of sizes [3, 2], got [(1,)]"),
        ({**given, "name": "other"}, "ModelNotFound", "only 'forward'"),
        ({**given, "input": [[99.0, 0, 0], [1, 1]]}, "InternalError", "ArithmeticError: no convergence"),
    ):
        error = asked(server, "Evaluate", **wrong)["error"]
        assert error["type"] == kind
        assert message in error["message"]
    assert asked(server, "ApplyHessian", **given)["error"]["type"] == "UnsupportedFeature"
    assert "counted from 0" in asked(server, "Gradient", **given, outWrt=2, inWrt=0, sens=[1])["error"]["message"]


def test_modules_and_blackboxes_are_served_as_they_are() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    counted = blackbox(np.cos, numpy=True, estimator=CentralDifference(4))
    for fn in (layer, counted):
        with serve_umbridge(fn, np.zeros(3), name="it", port=0) as running:
            x = THETA.clone().requires_grad_()
            (found,) = torch.autograd.grad(blackbox_from_umbridge(running.url, "it")(x).sum(), x)
        right = layer.weight.sum(0) if fn is layer else -THETA.sin()
        assert torch.allclose(found, right, rtol=1e-10, atol=1e-10)
    assert counted.nfev == 12


def test_the_official_client_understands() -> None:
    umbridge = pytest.importorskip("umbridge", reason="the package umbridge is not installed")
    with serve_umbridge(simulated, np.ones(3), np.ones(2), port=0) as running:
        model = umbridge.HTTPModel(running.url, "forward")
        given = [THETA.tolist(), FORCE.tolist()]
        assert model.get_input_sizes() == [3, 2]
        assert model(given, {"gain": 2.0})[0] == pytest.approx(truth(THETA, FORCE, 2.0)[0].tolist(), rel=1e-14)
        gradient = model.gradient(1, 0, given, [2.0])
        assert gradient == pytest.approx((4 * THETA * FORCE[1]).tolist(), rel=1e-8)


def test_errors_of_the_client(server: UmbridgeServer) -> None:
    with pytest.raises(ValueError, match=r"offers no model 'backward', only 'forward'"):
        blackbox_from_umbridge(server.url, "backward")
    with pytest.raises(ValueError, match="timeout must be above 0 seconds, got 0"):
        blackbox_from_umbridge(server.url, "forward", timeout=0)
    with pytest.raises(ValueError, match="executor, certify is for differences, and forward has a gradient of its own"):
        blackbox_from_umbridge(server.url, "forward", executor=map, certify=10)
    for options in WAYS.values():
        f = blackbox_from_umbridge(server.url, "forward", **options)
        with pytest.raises(ValueError, match=r"forward takes vectors of sizes \[3, 2\], got shapes \[\(2,\), \(3,\)\]"):
            f(FORCE, THETA)
        with pytest.raises(RuntimeError, match="status 500, InternalError: ArithmeticError: no convergence"):
            f(THETA + 100, FORCE)


def test_a_server_that_goes_down(server: UmbridgeServer) -> None:
    with serve_umbridge(np.sin, np.ones(3), port=0) as running:
        url = running.url
        f = blackbox_from_umbridge(url, "forward", estimator=CentralDifference())
        y = f(THETA.clone().requires_grad_())
    with pytest.raises(BlackboxError, match=rf"ConnectionError: no UM-Bridge server answers at {url} \(.*refused"):
        y.sum().backward()
    with pytest.raises(ConnectionError, match=r"start it, or mend the address"):
        blackbox_from_umbridge(url, "forward")


def test_a_request_that_takes_too_long(capfd: pytest.CaptureFixture[str]) -> None:
    done = threading.Event()

    def slow(x: Any) -> Any:
        if x[0] != 1:
            time.sleep(1.0)
            done.set()
        return np.repeat(x, 10**6)  # more than a socket takes when nobody reads

    with serve_umbridge(slow, np.ones(1), port=0) as running:
        f = blackbox_from_umbridge(running.url, "forward", timeout=0.3)
        with pytest.raises(TimeoutError, match=r"Evaluate took longer than 0\.3 s"):
            f(torch.zeros(1))
        assert done.wait(10)
        # the server finds that its client has gone
        deadline = time.monotonic() + 10
        while any("process_request" in thread.name for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not capfd.readouterr().err


def test_what_cannot_be_served() -> None:
    with pytest.raises(TypeError, match="fn must be callable, got 3"):
        serve_umbridge(3, np.ones(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs an example of each input"):
        serve_umbridge(np.sin)
    with pytest.raises(ValueError, match=r"output 0 of fn has shape \(2, 2\), and the protocol knows vectors"):
        serve_umbridge(lambda x: np.outer(x, x), np.ones(2))
