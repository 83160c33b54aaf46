"""A model behind the UM-Bridge protocol as a function with a gradient.

The idea: UM-Bridge (Seelinger et al. 2023, JOSS 8(83), 4748) serves a model over HTTP as a function of vectors. One
that has a gradient of its own is asked for it; all others are differentiated by `blackbox`. Pairs with every executor:
threads ask for several evaluations at a time. `umbridge_server` is the other way round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ignite_tbptt.blackbox.function import blackbox
from ignite_tbptt.blackbox.node import refuse_second_derivatives
from ignite_tbptt.blackbox.umbridge_model import UmbridgeModel

__all__ = ["blackbox_from_umbridge"]


def blackbox_from_umbridge(
    url: str,
    name: str,
    config: dict[str, Any] | None = None,
    *,
    timeout: float | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """Make a model that an UM-Bridge server offers a differentiable function.

    Example::

        f = blackbox_from_umbridge("http://localhost:4242", "forward", timeout=60, executor=ThreadPoolExecutor(8))
        loss = f(theta).square().sum()  # theta of shape (size of the input,)
        loss.backward()

    The function takes a vector for each input of the model, in the sizes that the server tells, and gives a vector for
    its output, a tuple of them where it has several. Numbers travel in double precision, with all their digits. A
    batch is one call for each row, under `torch.vmap`.

    A model with a gradient of its own gives it: one request for each output and each input that requires grad.
    Where it has none, or an estimator is given, finite differences are taken.

    Args:
        url: where the server is, ``http://host:port``.
        name: of the model.
        config: handed to the model with every request.
        timeout: seconds that a request may take; None waits for ever.
        options: those of `blackbox`, for differences: estimator, executor, repeatable, progress, certify, count. With
            an estimator differences are taken of a model with a gradient of its own, too.

    Raises:
        ConnectionError: no server answers.
        TypeError: an option that `blackbox` has not.
        ValueError: the server does not offer the model, a time-out that is not positive, other options than an
            estimator for a model with a gradient of its own; when called: a vector of another size.
        RuntimeError: when called: the server answered with an error.
        TimeoutError: when called: a request took too long.
        BlackboxError: in backward, see `blackbox`.
    """
    if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
        raise ValueError(f"timeout must be above 0 seconds, got {timeout!r}: leave it out for none")
    model = UmbridgeModel.at(url.rstrip("/"), name, dict(config or {}), timeout)
    if options.get("estimator") is None and model.has_gradient:
        given = ", ".join(key for key, value in options.items() if value is not None)
        if given:
            raise ValueError(
                f"{given} is for differences, and {name} has a gradient of its own, which takes none: leave it out, or "
                "give an estimator"
            )
        return _Native(model)
    return blackbox(model, numpy=True, **options)


class _Native:
    """A model with a gradient of its own as a function of tensors."""

    def __init__(self, model: UmbridgeModel) -> None:
        self._model = model

    def __call__(self, *vectors: Any) -> Any:
        outputs = _Gradient.apply(self._model, *map(torch.as_tensor, vectors))  # type: ignore[no-untyped-call]
        return outputs[0] if len(outputs) == 1 else outputs

    def __repr__(self) -> str:
        return f"blackbox_from_umbridge({self._model.url!r}, {self._model.name!r}), with its own gradient"


class _Gradient(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(model: UmbridgeModel, *vectors: Tensor) -> tuple[Tensor, ...]:
        found = model(*[vector.detach().cpu().numpy() for vector in vectors])
        dtype = functools.reduce(torch.promote_types, [vector.dtype for vector in vectors])
        dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
        arrays = found if isinstance(found, tuple) else (found,)
        return tuple(torch.from_numpy(array).to(vectors[0].device, dtype) for array in arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.model, *vectors = inputs
        ctx.save_for_backward(*vectors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        model, vectors = ctx.model, ctx.saved_tensors
        given = model.checked([vector.detach().cpu().numpy() for vector in vectors])
        found: list[Tensor | None] = [None] * len(vectors)
        for k, vector in enumerate(vectors):
            for out, v in enumerate(cotangents):
                if v is None or not ctx.needs_input_grad[k + 1]:
                    continue
                answer = model.ask("Gradient", given, outWrt=out, inWrt=k, sens=v.double().tolist())
                part = torch.tensor(answer, dtype=torch.float64)
                if part.shape != vector.shape:
                    raise RuntimeError(
                        f"{model.name} gave a gradient of shape {tuple(part.shape)} for input {k} of shape "
                        f"{tuple(vector.shape)}"
                    )
                total = found[k]
                found[k] = part if total is None else total + part
        found = [None if g is None else g.to(v) for g, v in zip(found, vectors, strict=True)]
        if torch.is_grad_enabled():
            found = refuse_second_derivatives(model.name, found, [*vectors, *cotangents])
        return (None, *found)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], model: UmbridgeModel, *vectors: Tensor) -> tuple[Any, Any]:
        entries = [
            _Gradient.apply(  # type: ignore[no-untyped-call]
                model,
                *(v if dim is None else v.select(dim, row) for v, dim in zip(vectors, in_dims[1:], strict=True)),
            )
            for row in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(same) for same in zip(*entries, strict=True))
        return outputs, (0,) * len(outputs)
