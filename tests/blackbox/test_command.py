"""External programs: the truth is the closed form of what they compute."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ignite_tbptt.blackbox import BlackboxError, EvaluationCount, UntrustedGradientWarning, blackbox_from_command


def program(text: str, **options: Any) -> Any:
    return blackbox_from_command([sys.executable, "-S", "-c", text], **options)


def gradient(f: Any, *values: float) -> list[float]:
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    f(x).sum().backward()
    found: list[float] = x.grad.tolist()  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize(
    ("text", "stdin"),
    [
        ("import sys; a, b = map(float, sys.argv[1:]); print(a * b, b ** 2)", "arguments"),
        ("import json; a, b = json.loads(input())[0]; print(json.dumps([[a * b], [b ** 2]]))", "json"),
    ],
)
def test_gradients_are_those_of_the_closed_form(text: str, stdin: Any) -> None:
    assert gradient(program(text, stdin=stdin), 2.0, 3.0) == pytest.approx([3.0, 8.0], abs=1e-8)
    with ThreadPoolExecutor(2) as pool:
        parallel = gradient(program(text, stdin=stdin, executor=pool), 2.0, 3.0)
    assert parallel == gradient(program(text, stdin=stdin), 2.0, 3.0)


def test_the_options_of_a_blackbox() -> None:
    count = EvaluationCount()
    f = program("import sys; print(float(sys.argv[1]) ** 3)", certify=1, count=count)
    assert gradient(f, 2.0) == pytest.approx([12.0], abs=1e-8)
    assert f.certificate is not None
    assert f.certificate.relative < 1e-6
    assert count.nfev == 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'estimators'"):
        program("", estimators=None)


def test_json_keeps_shapes_both_ways_and_numbers_all_their_digits() -> None:
    f = program("print(input())", stdin="json")
    x = torch.tensor([[0.1, 1 / 3], [1e-300, -2e300]], dtype=torch.float64)
    assert torch.equal(f(x, 2.5 * x), torch.stack([x, 2.5 * x]))
    echo = program("import sys; print(*sys.argv[1:])")
    assert torch.equal(echo(x), x.flatten())


def test_too_few_printed_digits_are_told_and_borne() -> None:
    f = program("import sys; print('%.6g' % (float(sys.argv[1]) ** 2 * 75))")
    with pytest.warns(UntrustedGradientWarning, match="rounds its inputs or outputs"):
        (found,) = gradient(f, 1.3)
    assert found == pytest.approx(195, rel=1e-2)


def test_a_program_that_fails_away_from_x() -> None:
    f = program("import sys; x = float(sys.argv[1]); print(x) if x == 1 else sys.exit('licence expired')")
    with pytest.raises(BlackboxError, match=r"exit status 1; standard error ends with 'licence expired'\s+in eval"):
        gradient(f, 1.0)


def test_the_time_out_ends_what_the_program_has_started(tmp_path: Path) -> None:
    child = f"import time; time.sleep(1.5); open({str(tmp_path / 'alive')!r}, 'w')"
    text = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took longer than 0\.3 s and was killed"):
        program(text, timeout=0.3)(torch.ones(1))
    assert time.monotonic() - start < 1.2
    time.sleep(1.6 - (time.monotonic() - start))
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("print('converged: 3.5')", r"printed 'converged: 3\.5', which is not only numbers: could not convert"),
        ("print('[1, null]')", r"which is not only numbers"),
        ("pass", "printed no numbers"),
    ],
)
def test_what_is_not_numbers(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        program(text)(torch.ones(1))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"command must be a list of strings, .* got 'ls -l'"):
        blackbox_from_command("ls -l")
    with pytest.raises(ValueError, match=r"command starts 'no-such-program', which is no program on the path"):
        blackbox_from_command(["no-such-program"])
    for timeout in (0, -1.0, float("nan"), "60"):
        with pytest.raises(ValueError, match="timeout must be above 0 seconds"):
            program("", timeout=timeout)
    with pytest.raises(ValueError, match="stdin must be 'arguments' or 'json', got 'yaml'"):
        program("", stdin="yaml")
