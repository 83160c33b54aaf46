"""Any function as a model of an UM-Bridge server, with a gradient.

The idea: the server of a numpy function, a simulator or a program differentiates it by finite differences, so that
every client of the protocol, in whatever language, can ask for gradients and products with the Jacobian. The server is
that of the standard library. Pairs with `umbridge`, which is a client.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn

from ignite_tbptt.blackbox.function import BlackboxFunction, blackbox
from ignite_tbptt.blackbox.umbridge_answers import Answers, error_of, outputs_of

__all__ = ["UmbridgeServer", "serve_umbridge"]


def serve_umbridge(
    fn: Callable[..., Any], *example: Any, name: str = "forward", host: str = "127.0.0.1", port: int = 4242
) -> UmbridgeServer:
    """Serve a function over HTTP by the UM-Bridge protocol, with a gradient.

    Example:
        >>> import numpy as np
        >>> from ignite_tbptt.blackbox import blackbox_from_umbridge
        >>> with serve_umbridge(lambda x: np.sin(x) * x[0], np.ones(2), port=0) as server:
        ...     f = blackbox_from_umbridge(server.url, "forward")
        ...     x = torch.tensor([1.0, 0.5], requires_grad=True)
        ...     f(x).sum().backward()
        >>> torch.allclose(x.grad, torch.tensor([1.8612, 0.8776]), rtol=1e-4)
        True

    The server runs in threads of its own until it is closed; ``server.wait()`` waits for that. A request's ``config``
    is handed to the function as keyword arguments.

    Args:
        fn: a function of as many vectors as `example` has, which returns one vector or a tuple of them. A plain
            function gets numpy arrays in float64, and its gradient by central differences. One made by `blackbox`, with
            the estimator and the executor that suit it, or a `torch.nn.Module`, is differentiated as it is.
        example: a vector for each input, at which the function is called once to know its sizes.
        name: of the model.
        host: the address to listen at; the default takes requests of this machine alone.
        port: 0 takes a free one.

    Raises:
        TypeError: fn is not callable, or there is no example.
        ValueError: an input or an output of the example is no vector.
        OSError: the port is taken.
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {fn!r}; pass the function itself, not what it returns")
    if not example:
        raise TypeError(
            "serve_umbridge needs an example of each input of fn, to know their sizes: give a vector for each"
        )
    served: Any = fn if isinstance(fn, (BlackboxFunction, nn.Module)) else blackbox(fn, numpy=True)
    inputs = [torch.as_tensor(vector, dtype=torch.float64) for vector in example]
    with torch.no_grad():
        outputs = outputs_of(served(*inputs))
    for what, vectors in (("input", inputs), ("output", outputs)):
        for k, vector in enumerate(vectors):
            if vector.dim() != 1:
                raise ValueError(
                    f"{what} {k} of fn has shape {tuple(vector.shape)}, and the protocol knows vectors: flatten it"
                )
    answers = Answers(served, name, [len(v) for v in inputs], [len(v) for v in outputs])
    return UmbridgeServer(answers, host, port)


class UmbridgeServer:
    """What `serve_umbridge` returns, to be used as a context manager or closed.

    Attributes:
        url: where it listens.
    """

    def __init__(self, answers: Answers, host: str, port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(answers.answer(self.path, {}))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                try:
                    fields = json.loads(body)
                except ValueError as error:
                    self._answer(error_of("InvalidInput", f"the request is no JSON: {error}", 400))
                    return
                self._answer(answers.answer(self.path, fields))

            def _answer(self, answer: tuple[int, Any]) -> None:
                data = json.dumps(answer[1]).encode()
                self.send_response(answer[0])
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                """Say nothing for each request."""

        self._server = _Listening((host, port), Handler)
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the server is closed, or Ctrl-C is pressed."""
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self.close()

    def close(self) -> None:
        """Take no requests any more."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> UmbridgeServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Listening(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has gone, by a time-out of its own say."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
