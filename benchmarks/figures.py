"""Figures: what a benchmark tells the site, and the run of all benchmarks that collects it.

A script calls ``figure(name, value, unit)`` for each of its key figures, beside whatever else it prints. This script
runs the others one after the other and keeps their figures in ``docs/benchmarks.json``, with the machine and the day.
The page of benchmarks is made from that file, so that no figure is typed by hand. A new script needs no more than its
calls of ``figure``.

    python benchmarks/figures.py                     # all: `make bench`
    python benchmarks/figures.py steps executors     # these; the figures of others stay as they were measured
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEPT = HERE.parent / "docs" / "benchmarks.json"
SCRIPTS = sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)


def figure(name: str, value: float, unit: str = "") -> None:
    """Print a key figure for the table: a line ``figure: name | value | unit``.

    Args:
        name: what was measured, with its sizes; a peer's figure says its name.
        value: printed with three significant digits, whole from 1000 on.
        unit: as in "ms", "MiB", "evaluations"; "x" for a ratio.
    """
    print(f"figure: {name} | {value:{',.0f' if abs(value) >= 1000 else '.3g'}} | {unit}", flush=True)


def machine() -> str:
    """Return the processor, its cores and the versions that matter to figures."""
    import numpy
    import torch

    return (
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {numpy.__version__}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def measured(script: Path) -> dict[str, Any]:
    """Run a script, show what it prints, and return its figures and where they were measured."""
    print(f"== {script.relative_to(HERE.parent)}", flush=True)
    figures = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("figure: "):
                figures.append([part.strip() for part in line.removeprefix("figure: ").split("|")])
    if process.returncode:
        raise SystemExit(f"{script.name} ended with exit status {process.returncode}; {KEPT.name} is as it was")
    return {"machine": machine(), "day": datetime.date.today().isoformat(), "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run benchmarks and keep their figures for the site.")
    names = [script.stem for script in SCRIPTS]
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names)}; all without a name")
    given = parser.parse_args().names or names
    if unknown := sorted(set(given) - set(names)):
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(names)}")
    for script in SCRIPTS:
        if script.stem in given:
            new = measured(script)
            kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
            kept = {name: entry for name, entry in {**kept, script.stem: new}.items() if name in names}
            KEPT.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
