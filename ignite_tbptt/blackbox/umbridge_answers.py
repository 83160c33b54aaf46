"""What an UM-Bridge server answers for a function that can be differentiated.

A request is a path and its fields, an answer a status and a body; `umbridge_server` carries both over HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Answers", "error_of", "outputs_of"]


def outputs_of(value: Any) -> tuple[Tensor, ...]:
    """The outputs of a function that returns one of them, or several."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def error_of(kind: str, message: str, status: int) -> tuple[int, Any]:
    """Status and body of an answer that is an error."""
    return status, {"error": {"type": kind, "message": message}}


@dataclass(frozen=True)
class Answers:
    """For one function.

    Args:
        fn: of vectors, differentiable.
        name: of the model.
        inputs: the size of every input.
        outputs: the size of every output.
    """

    fn: Callable[..., Any]
    name: str
    inputs: list[int]
    outputs: list[int]

    def answer(self, path: str, fields: dict[str, Any]) -> tuple[int, Any]:
        """Status and body of the answer to a request."""
        what = path.strip("/")
        if what == "Info":
            return 200, {"protocolVersion": 1.0, "models": [self.name]}
        if not isinstance(fields, dict) or fields.get("name") != self.name:
            return error_of("ModelNotFound", f"there is no model of that name, only {self.name!r}", 400)
        if what == "ModelInfo":
            kinds = {"Evaluate": True, "Gradient": True, "ApplyJacobian": True, "ApplyHessian": False}
            return 200, {"support": kinds}
        if what in ("InputSizes", "OutputSizes"):
            return 200, {f"{what[0].lower()}{what[1:]}": self.inputs if what == "InputSizes" else self.outputs}
        if what not in ("Evaluate", "Gradient", "ApplyJacobian"):
            return error_of("UnsupportedFeature", f"{what} is not offered", 400)
        try:
            found = getattr(self, f"_{what.lower()}")(
                self._vectors(fields["input"]), fields, fields.get("config") or {}
            )
        except (KeyError, IndexError, ValueError) as error:
            return error_of("InvalidInput", f"{type(error).__name__}: {error}", 400)
        except Exception as error:  # whatever the function raises
            return error_of("InternalError", f"{type(error).__name__}: {error}", 500)
        return 200, {"output": found}

    def _vectors(self, given: Any) -> list[Tensor]:
        vectors = [torch.tensor(vector, dtype=torch.float64) for vector in given]
        if [tuple(v.shape) for v in vectors] != [(size,) for size in self.inputs]:
            raise ValueError(f"inputs are vectors of sizes {self.inputs}, got {[tuple(v.shape) for v in vectors]}")
        return vectors

    def _evaluate(self, vectors: list[Tensor], fields: Any, config: Any) -> Any:
        with torch.no_grad():
            return [output.tolist() for output in outputs_of(self.fn(*vectors, **config))]

    def _gradient(self, vectors: list[Tensor], fields: Any, config: Any) -> Any:
        out, into = self._which(fields)
        vectors[into].requires_grad_()
        output = outputs_of(self.fn(*vectors, **config))[out]
        sens = torch.tensor(fields["sens"], dtype=output.dtype)
        return torch.autograd.grad(output, vectors[into], sens)[0].tolist()

    def _applyjacobian(self, vectors: list[Tensor], fields: Any, config: Any) -> Any:
        out, into = self._which(fields)
        along = torch.tensor(fields["vec"], dtype=torch.float64)

        def of_one(vector: Tensor) -> Tensor:
            return outputs_of(self.fn(*vectors[:into], vector, *vectors[into + 1 :], **config))[out]

        return torch.func.jvp(of_one, (vectors[into],), (along,))[1].tolist()

    def _which(self, fields: Any) -> tuple[int, int]:
        """The output and the input that are asked for."""
        out, into = fields["outWrt"], fields["inWrt"]
        if not (0 <= out < len(self.outputs) and 0 <= into < len(self.inputs)):
            raise ValueError(f"there are {len(self.outputs)} outputs and {len(self.inputs)} inputs, counted from 0")
        return out, into
