"""A model that an UM-Bridge server offers, as a function of arrays.

The protocol is requests in JSON: Info, ModelInfo, InputSizes, OutputSizes, Evaluate, Gradient. Pairs with `umbridge`,
which makes it differentiable.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["UmbridgeModel"]


@dataclass(frozen=True)
class UmbridgeModel:
    """What a server offers under a name.

    Attributes:
        inputs: the size of every input.
        outputs: the size of every output.
        has_gradient: whether it has one of its own.
    """

    url: str
    name: str
    config: dict[str, Any]
    timeout: float | None
    inputs: list[int]
    outputs: list[int]
    has_gradient: bool

    @classmethod
    def at(cls, url: str, name: str, config: dict[str, Any], timeout: float | None) -> UmbridgeModel:
        """Ask the server what it knows of a model."""
        offered = _asked(url, "Info", timeout, {})["models"]
        if name not in offered:
            raise ValueError(f"{url} offers no model {name!r}, only {', '.join(map(repr, offered))}")
        support = _asked(url, "ModelInfo", timeout, {"name": name})["support"]
        about = {"name": name, "config": config}
        inputs = _asked(url, "InputSizes", timeout, about)["inputSizes"]
        outputs = _asked(url, "OutputSizes", timeout, about)["outputSizes"]
        return cls(url, name, config, timeout, inputs, outputs, bool(support.get("Gradient", False)))

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *vectors: Any) -> Any:
        """The outputs, as arrays."""
        found = self.ask("Evaluate", self.checked(vectors))
        sizes = [len(vector) for vector in found]
        if sizes != self.outputs:
            raise RuntimeError(f"{self.name} gave outputs of sizes {sizes}, and its server told {self.outputs}")
        arrays = [np.array(vector, dtype=np.float64) for vector in found]
        return arrays[0] if len(arrays) == 1 else tuple(arrays)

    def checked(self, vectors: Any) -> list[list[float]]:
        """The inputs as lists."""
        shapes = [tuple(np.shape(vector)) for vector in vectors]
        if shapes != [(size,) for size in self.inputs]:
            raise ValueError(
                f"{self.name} takes vectors of sizes {self.inputs}, got shapes {shapes}: give one vector for each "
                "input, and use torch.vmap for a batch"
            )
        return [np.asarray(vector, dtype=np.float64).tolist() for vector in vectors]

    def ask(self, what: str, vectors: list[list[float]], **fields: Any) -> Any:
        """The output of the server for these inputs."""
        about = {"name": self.name, "config": self.config, "input": vectors, **fields}
        return _asked(self.url, what, self.timeout, about)["output"]


def _asked(url: str, what: str, timeout: float | None, fields: dict[str, Any]) -> Any:
    """What a server answers to a request, one without fields by GET."""
    data = json.dumps(fields).encode() if fields else None
    request = urllib.request.Request(f"{url}/{what}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            told = json.loads(text)["error"]
            text = f"{told['type']}: {told['message']}"
        except (ValueError, KeyError, TypeError):  # an answer of something else than an UM-Bridge server
            text = text[:500]
        raise RuntimeError(f"{url}/{what} answered with status {error.code}, {text}") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise TimeoutError(f"{url}/{what} took longer than {timeout:g} s") from error
        raise ConnectionError(
            f"no UM-Bridge server answers at {url} ({reason}): start it, or mend the address"
        ) from error
