"""The reference, made from the packages: a page for every room that defines public names, and a table of them all."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
HALVES = {
    "ignite_tbptt": ("time", "Time"),
    "ignite_tbptt.blackbox": ("blackboxes", "Blackboxes"),
}


def pages() -> dict[str, str]:
    """Return the pages by their path under the folder of generated pages, with a table of names for each half."""
    made = {}
    for half, (folder, title) in HALVES.items():
        table, paths = [f"# {title}", "", f"All that `{half}` exports, by the module that defines it.", ""], []
        for room, names in rooms(half).items():
            paths.append(room.rpartition(".")[2].strip("_"))
            about = _first(inspect.getdoc(importlib.import_module(room)) or "")
            table += [f"## [{_topic(room)}]({paths[-1]}.md)", "", about, "", "| Name | |", "| --- | --- |"]
            table += [f"| {{py:obj}}`{name} <{half}.{name}>` | {_about(half, name)} |" for name in names]
            table += [""]
            made[f"reference/{folder}/{paths[-1]}.md"] = _page(half, room, about, names)
        table += ["```{toctree}", ":hidden:", "", *paths, "```", ""]
        made[f"reference/{folder}/index.md"] = "\n".join(table)
    return made


def rooms(half: str) -> dict[str, list[str]]:
    """Return the public names of a package by the module that defines them, in the order in which it does."""
    public = set(importlib.import_module(half).__all__) - {"__version__"}
    if half == "ignite_tbptt":
        public -= set(importlib.import_module("ignite_tbptt.blackbox").__all__)
    found: dict[str, list[str]] = {}
    for path in sorted(ROOT.joinpath(*half.split(".")).glob("*.py")):
        names = [name for name in dict.fromkeys(_defined(path)) if name in public]  # once, where it is overloaded
        if names:
            found[f"{half}.{path.stem}"] = names
            public -= set(names)
    assert not public, f"no module of {half} defines {sorted(public)}"
    return found


def _defined(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _page(half: str, room: str, about: str, names: list[str]) -> str:
    package = importlib.import_module(half)
    lines = [f"# {_topic(room)}", "", about, "", "```{eval-rst}"]
    for name in names:
        of = getattr(package, name)
        kind = "class" if inspect.isclass(of) else "function" if inspect.isroutine(of) else "data"
        lines += [f".. auto{kind}:: {half}.{name}", *(["   :members:"] if kind == "class" else []), ""]
    return "\n".join([*lines, "```", ""])


def _topic(room: str) -> str:
    name = room.rpartition(".")[2]
    return "Old names" if name == "__init__" else name.replace("_", " ").capitalize()


def _about(half: str, name: str) -> str:
    of = getattr(importlib.import_module(half), name)
    return _first(inspect.getdoc(of) or "") if inspect.isclass(of) or inspect.isroutine(of) else f"`{of}`"


def _first(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|").replace("``", "`")
