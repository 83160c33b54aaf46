"""An external program as a function with a gradient.

The idea: a call starts the program, hands it numbers as text that loses none of their digits, and reads numbers from
what it prints. Everything else is `blackbox`. Pairs with every executor: threads run several programs at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ignite_tbptt.blackbox.function import BlackboxFunction, blackbox

__all__ = ["blackbox_from_command"]


def blackbox_from_command(
    command: Sequence[str],
    *,
    stdin: Literal["arguments", "json"] = "arguments",
    timeout: float | None = None,
    in_dims: Any = None,
    **options: Any,
) -> BlackboxFunction[..., Any]:
    """Make an external program a differentiable function.

    Example:
        >>> import sys, torch
        >>> program = "import sys; a, b = map(float, sys.argv[1:]); print(a * b, a + b)"
        >>> f = blackbox_from_command([sys.executable, "-c", program])
        >>> x = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> f(x)[0].backward()
        >>> x.grad.round(decimals=3)
        tensor([3., 2.])

    The function takes tensors and numbers, one after the other. The program is started once for each evaluation,
    without a shell. It prints numbers, separated by white space or commas, or one JSON array; they come out as one
    tensor, which has one axis unless the array has more. Print all digits (``%.17g``): differences need them. Where too
    few are printed for the step, the first gradient warns and measures wider steps.

    Args:
        command: the program and its first arguments.
        stdin: ``"arguments"`` appends all numbers to the command; ``"json"`` writes the list of arguments, tensors as
            nested lists, to the standard input.
        timeout: seconds after which the program, and what it has started, is killed.
        in_dims: the batch axis of each argument, as in `blackbox`; the program is started once for each row then, with
            the numbers of that row.
        options: `blackbox` takes the others: estimator, repeatable, progress, certify, count, and executor, of which
            ``ThreadPoolExecutor(8)`` runs eight programs at a time.

    Raises:
        TypeError: command is not a sequence of strings; an option that `blackbox` has not.
        ValueError: the program is not there, timeout is not above 0, or stdin is another word; when called: it printed
            something else than numbers.
        BlackboxError: in backward: the program failed, with its exit status and the end of its standard error.
    """
    if isinstance(command, str) or not command or not all(isinstance(part, str) for part in command):
        raise TypeError(
            f"command must be a list of strings, the program first, got {command!r}: split it, as shlex does"
        )
    if shutil.which(command[0]) is None:
        raise ValueError(f"command starts {command[0]!r}, which is no program on the path; give its full path")
    if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
        raise ValueError(f"timeout must be above 0 seconds, got {timeout!r}: leave it out for none")
    if stdin not in ("arguments", "json"):
        raise ValueError(f"stdin must be 'arguments' or 'json', got {stdin!r}")
    program = _Program(tuple(command), stdin, timeout)
    return blackbox(program, numpy=True, in_dims=in_dims, vectorized=in_dims is None, **options)


@dataclass(frozen=True)
class _Program:
    command: tuple[str, ...]
    stdin: str
    timeout: float | None

    @property
    def __name__(self) -> str:
        return os.path.basename(self.command[0])

    def __call__(self, *args: Any) -> Any:
        arrays = [np.asarray(arg) for arg in args]
        if self.stdin == "json":
            text = self._printed(self.command, json.dumps([array.tolist() for array in arrays]))
        else:
            numbers = [repr(number) for array in arrays for number in array.ravel().tolist()]
            text = self._printed((*self.command, *numbers), None)
        return _numbers(text, self.__name__)

    def _printed(self, command: Sequence[str], given: str | None) -> str:
        pipe = subprocess.PIPE
        given_by = subprocess.DEVNULL if given is None else pipe
        with subprocess.Popen(
            command, stdin=given_by, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        ) as process:
            try:
                out, err = process.communicate(given, self.timeout)
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(f"the program took longer than {self.timeout:g} s and was killed") from error
            finally:
                if process.poll() is None:
                    _end(process)
        if process.returncode:
            raise RuntimeError(f"exit status {process.returncode}; standard error ends with {err.strip()[-500:]!r}")
        return out


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a program and what it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _numbers(text: str, name: str) -> Any:
    try:
        found = (
            json.loads(text) if text.lstrip().startswith("[") else [float(p) for p in re.split(r"[\s,]+", text) if p]
        )
        array = np.array(found, dtype=np.float64)
        if "null" in text:
            raise ValueError("null among them")
        if array.size:
            return array
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} printed {text.strip()[:200]!r}, which is not only numbers: {error}") from error
    raise ValueError(f"{name} printed no numbers")
