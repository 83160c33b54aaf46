"""What torch.compile is to leave alone: hooks, and whatever evaluates a blackbox."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["outside_compiled_code"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def outside_compiled_code(method: _Method) -> _Method:
    """Let torch.compile break its graph at this method and leave everything below it to Python.

    `torch.compiler.disable` would do, but imports the compiler, half a second, for those who never compile.
    """

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return cast("_Method", called)
