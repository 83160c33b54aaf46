"""Every private name of torch, numpy and Ignite that the package relies on, each checked to be there and to work.

A release that renames one of them fails here by name, and not somewhere else as a number that is silently wrong.
"""

from __future__ import annotations

import ast
import inspect
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import DeterministicEngine, Engine, Events
from ignite.metrics import Loss, MeanSquaredError
from torch import nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

import ignite_tbptt

PACKAGE = Path(ignite_tbptt.__file__).parent


def product() -> torch.Tensor:
    return torch.ones(2, requires_grad=True) * 2


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return cotangents[0] * 2


def double() -> torch.Tensor:
    y: torch.Tensor = Double.apply(torch.ones(2, requires_grad=True))  # type: ignore[no-untyped-call]
    return y


def below_the_transform(x: torch.Tensor) -> torch.Tensor:
    """Tensors of torch.func.jvp hold numbers that numpy can read where they are unwrapped and its stack is cleared."""
    plain = torch._C._functorch.get_unwrapped(x)
    assert torch._C._functorch.is_functorch_wrapped_tensor(x)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(plain)
    with temporarily_clear_interpreter_stack():
        assert (plain + 1).numpy().tolist() == [2.0, 2.0]
    return x * 2


def batched() -> bool:
    """What torch.autograd.grad(..., is_grads_batched=True) hands to a backward, taken apart and put together."""
    seen: list[torch.Tensor] = []

    class Seeing(Double):
        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            level = torch._C._vmapmode_decrement_nesting() + 1
            seen.append(torch._remove_batch_dim(cotangents[0], level, 1, 0))
            torch._C._vmapmode_increment_nesting()
            return torch._add_batch_dim(seen[0] * 3, 0, level)

    x = torch.ones(2, requires_grad=True)
    many = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    (found,) = torch.autograd.grad(Seeing.apply(x), x, many, is_grads_batched=True)  # type: ignore[no-untyped-call]
    return torch.equal(seen[0], many) and torch.equal(found, 3 * many)


def compiled() -> Any:
    return torch.compile(nn.Linear(1, 1), backend="eager")


def ran() -> Engine:
    engine = Engine(lambda engine, batch: batch)
    engine.run([1, 2])
    return engine


def wrapped() -> Any:
    engine = Engine(lambda engine, batch: batch)
    engine.add_event_handler(Events.STARTED(once=1), print)
    return engine._event_handlers[Events.STARTED][0][0]


CANARIES: dict[str, Callable[[], Any]] = {
    # torch
    "_C": lambda: torch._C._are_functorch_transforms_active() is False and torch._C.DisableTorchFunction,
    "_are_functorch_transforms_active": lambda: torch._C._are_functorch_transforms_active() is False,
    "_backward_hooks": lambda: (
        torch.ones(1, requires_grad=True)._backward_hooks is None and not nn.ReLU()._backward_hooks
    ),
    "_backward_pre_hooks": lambda: nn.ReLU()._backward_pre_hooks == {},
    "_buffers": lambda: list(nn.BatchNorm1d(2)._buffers) == ["running_mean", "running_var", "num_batches_tracked"],
    "_compiled_call_impl": lambda: nn.Linear(1, 1)._compiled_call_impl is None,
    "_forward_cls": lambda: double().grad_fn._forward_cls is Double,  # type: ignore[union-attr]
    "_forward_hooks": lambda: nn.ReLU()._forward_hooks == {},
    "_forward_pre_hooks": lambda: nn.ReLU()._forward_pre_hooks == {},
    "_input_metadata": lambda: [list(each.shape) for each in double().grad_fn._input_metadata] == [[2]],  # type: ignore[union-attr]
    "_is_replica": lambda: not hasattr(nn.Linear(1, 1), "_is_replica"),  # set by DataParallel on its copies
    "_is_view": lambda: torch.ones(2)[0]._is_view() is True,
    "_modules": lambda: list(nn.Sequential(nn.ReLU())._modules) == ["0"],
    "_parent": lambda: wrapped()._parent() is print,
    "_orig_mod": lambda: isinstance(compiled()._orig_mod, nn.Linear),
    "_saved_rounding_mode": lambda: (
        torch.div(product(), 2, rounding_mode="floor").grad_fn._saved_rounding_mode == "floor"  # type: ignore[union-attr]
    ),
    "_sequence_nr": lambda: product().grad_fn._sequence_nr() < product().grad_fn._sequence_nr(),  # type: ignore[union-attr]
    "_version": lambda: torch.zeros(1).add_(1)._version == 1,
    "_functorch": lambda: (
        torch._C._functorch.is_legacy_batchedtensor(torch.ones(1)) is False
        and torch.func.jvp(below_the_transform, (torch.ones(2),), (torch.ones(2),))[1].tolist() == [2.0, 2.0]
    ),
    "_vmapmode_increment_nesting": batched,
    "_vmapmode_decrement_nesting": batched,
    "_add_batch_dim": batched,
    "_remove_batch_dim": batched,
    "_is_any_autocast_enabled": lambda: torch._C._is_any_autocast_enabled() is False,
    "_max_workers": lambda: ThreadPoolExecutor(3)._max_workers == 3,
    "_cdata": lambda: isinstance(torch.default_generator._cdata, int),  # type: ignore[attr-defined]
    "_will_engine_execute_node": lambda: callable(torch._C._will_engine_execute_node),
    # Ignite
    "_allowed_events": lambda: Events.STARTED in ran()._allowed_events,
    "_batch_size": lambda: Loss(nn.functional.mse_loss)._batch_size is len,
    "_dataloader_iter": lambda: ran()._dataloader_iter is None,
    "_event_handlers": lambda: not ran()._event_handlers.get(Events.STARTED.name),
    "_fire_event": lambda: callable(ran()._fire_event),
    "_from_iteration": lambda: (
        "self._from_iteration(iteration)" in inspect.getsource(DeterministicEngine._setup_engine)
    ),
    "_get_data_length": lambda: ran()._get_data_length([1, 2]) == 2,
    "_init_iter": lambda: ran()._init_iter is None,
    "_internal_run": lambda: "self._internal_run()" in inspect.getsource(Engine.run),
    "_internal_run_generator": lambda: ran()._internal_run_generator is None,
    "_name_": lambda: Events.STARTED._name_ == "STARTED",
    "_setup_engine": lambda: "self._setup_engine()" in inspect.getsource(Engine._internal_run_as_gen),
    "_output_transform": lambda: MeanSquaredError()._output_transform.__module__.startswith("ignite."),
    # Python
    "_fields": lambda: True,  # of named tuples; documented
    "_make": lambda: True,  # of named tuples; documented
    "_replace": lambda: True,  # of named tuples; documented
    "_inst": lambda: random._inst.gauss_next is random.getstate()[2],  # type: ignore[attr-defined]
    "_getframe": lambda: sys._getframe(0).f_code.co_name == "<lambda>",
    "_current_frames": lambda: sys._current_frames()[threading.get_ident()].f_code.co_name == "<lambda>",
    "_pytree": lambda: torch.utils._pytree.tree_flatten((1, [2]))[0] == [1, 2],
}


@pytest.mark.parametrize("name", CANARIES)
def test_the_private_name_is_there(name: str) -> None:
    assert CANARIES[name]()


def test_numpy_keeps_its_generator_where_it_is_read() -> None:
    """`random_streams` reads the 624 words of the legacy generator and its position from memory."""
    import ctypes

    np.random.seed(3)
    np.random.random(5)
    state: Any = np.random.get_state()
    generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
    memory = (ctypes.c_uint32 * 625).from_address(generator.ctypes.state_address)
    assert list(memory[:624]) == state[1].tolist()
    assert memory[624] == state[2]


def test_draws_are_seen_in_memory() -> None:
    from ignite_tbptt.random_streams import _TORCH, RandomStreams, _marks_in_memory, random_streams_kept

    assert _TORCH is not None
    draws: list[Callable[[], object]] = [
        lambda: torch.rand(1),
        lambda: torch.randn(1),  # the second normal number of the pair is kept outside of the words
        lambda: torch.randn(1),
        lambda: torch.randn(1, dtype=torch.float64),
        lambda: torch.randn(1, dtype=torch.float64),
        lambda: torch.randn(32),
        lambda: torch.rand(624),
        lambda: torch.randperm(5),
        lambda: torch.nn.functional.dropout(torch.ones(3)),
        lambda: torch.manual_seed(4),
        np.random.normal,
        np.random.normal,
        lambda: np.random.random(624),
        lambda: np.random.seed(4),
        lambda: np.random.set_state(np.random.RandomState(5).get_state()),
        random.random,
        lambda: random.gauss(0, 1),
        lambda: random.gauss(0, 1),
        lambda: random.seed(4),
    ]
    with random_streams_kept():
        torch.manual_seed(3)
        for draw in draws:
            before = RandomStreams.now()
            assert None not in _marks_in_memory()
            assert None not in before._marks  # memory tells, and the states need not be asked for in full
            assert not before.have_moved()
            draw()
            assert before.have_moved()
            before.restore()
            assert not before.have_moved()


def test_pythons_generator_is_where_it_is_read() -> None:
    from ignite_tbptt import random_streams

    memory = random_streams._PYTHON
    assert memory is not None
    for draw in (random.random, lambda: random.seed(4), lambda: random.gauss(0, 1), random.random):
        draw()
        state = random.getstate()[1]
        assert list(memory) == [state[-1], *state[:-1]]


def test_the_list_is_complete() -> None:
    """Whatever private attribute the package reads that it does not define itself is in the list above."""
    used: dict[str, str] = {}
    own: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                used[node.attr] = path.name
                if isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self":
                    own.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and "_pytree" in str(node.module):
                used["_pytree"] = path.name
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
                name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
                if isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
                    used[name] = path.name
    # set on self, a subclass of Engine, or overridden there
    ignite_own = {"_dataloader_iter", "_init_iter", "_internal_run_generator", "_setup_engine", "_from_iteration"}
    ignite_own.add("_internal_run")
    missing = {name: where for name, where in used.items() if name not in (own - ignite_own) | CANARIES.keys()}
    assert sorted(missing.items()) == []
