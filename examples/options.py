"""The options that all examples share, and a word where something that they need is not installed."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path


def parser_of(description: str, *needed: str) -> argparse.ArgumentParser:
    """Return a parser with ``--output`` and ``--quick``.

    Args:
        description: what the example does, for ``--help``.
        needed: modules beyond those that the package itself needs.
    """
    parser = Parser(description=description)
    parser.needed = needed
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for pictures and checkpoints")
    parser.add_argument("--quick", action="store_true", help="a few seconds, which show nothing but that it runs")
    return parser


class Parser(argparse.ArgumentParser):
    """Looks for the modules that are needed after ``--help`` has been answered, and makes the output folder."""

    needed: tuple[str, ...] = ()

    def parse_args(self, *args, **kwargs):  # type: ignore[no-untyped-def, override]
        """Return the options; ends the program with a word where a module is missing."""
        given = super().parse_args(*args, **kwargs)
        extras = {"matplotlib": "plot", "tqdm": "progress"}
        for module in self.needed:
            if importlib.util.find_spec(module) is None:
                install = f"'ignite-tbptt[{extras[module]}]'" if module in extras else module
                self.exit(2, f"this example needs {module}: pip install {install}\n")
        given.output.mkdir(parents=True, exist_ok=True)
        return given
