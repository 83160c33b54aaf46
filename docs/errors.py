"""The page of all error messages and warnings, collected from the source so that none is missing."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ignite_tbptt"


def page_of_errors() -> str:
    """Return the page: for every room the messages that it raises or warns with, placeholders as they are written."""
    lines = [
        "# Error messages",
        "",
        "What the package raises and warns of, by the room that does. A part in braces is filled in.",
        "",
    ]
    for path in sorted(PACKAGE.rglob("*.py")):
        found = sorted(messages(path))
        if found:
            room = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            lines += [f"## {room}", "", *(f"- **{kind}**: {_escaped(text)}" for kind, text in found), ""]
    return "\n".join(lines)


def messages(path: Path) -> set[tuple[str, str]]:
    """Return (kind, message) of every exception that is raised, or warning that is given, in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        kind = "warning" if name in ("warn", "warnings.warn") else name
        text = _text(node.args[0]) if node.args else ""
        if (kind == "warning" or kind.endswith("Error")) and len(text.split()) > 2:
            found.add((kind, text))
    return found


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "{" + ast.unparse(part.value) + "}"
            for part in node.values
            if isinstance(part, (ast.Constant, ast.FormattedValue))
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ""


def _escaped(text: str) -> str:
    return "".join("\\" + c if c in r"\`*_{}[]<>#|$" else c for c in " ".join(text.split()))
