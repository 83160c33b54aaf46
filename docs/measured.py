"""The page of benchmarks, made from the figures that ``make bench`` keeps in ``docs/benchmarks.json``."""

from __future__ import annotations

import ast
import json
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = HERE.parent / "benchmarks"


def page_of_benchmarks() -> str:
    """Return the page: for every script its question, the command that prints its figures, the machine, the figures."""
    lines = [
        "# Benchmarks",
        "",
        "`make bench` runs the scripts in `benchmarks/` and keeps their figures, of which this page is made. Peers run "
        "in the same process or take turns with ours; ratios are medians of the turns. Less is better where a time "
        "stands over a peer's.",
        "",
    ]
    for name, entry in json.loads((HERE / "benchmarks.json").read_text()).items():
        question = (ast.get_docstring(ast.parse((SCRIPTS / f"{name}.py").read_text())) or "").split("\n\n")[0]
        lines += [
            f"## {name}",
            "",
            " ".join(question.split()),
            "",
            f"`OMP_NUM_THREADS=1 python benchmarks/{name}.py`, {entry['day']}: {entry['machine']}.",
            "",
            "| Figure | Value |",
            "| --- | --- |",
            *(f"| {what} | {f'{value} {unit}'.strip()} |" for what, value, unit in entry["figures"]),
            "",
            *(f"![{name}](../images/{path.name})\n" for path in sorted((HERE / "images").glob(f"{name}.png"))),
        ]
    return "\n".join(lines)
