"""The gallery: a page for every example with its pictures, what it says of itself and its code; and a page of all."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = [HERE.parent / folder for folder in ("examples", "benchmarks")]


def pages() -> dict[str, str]:
    """Return the pages by their path under the folder of generated pages."""
    made, overview = {}, []
    for path in [path for folder in SCRIPTS for path in sorted(folder.glob("*.py"))]:
        pictures = pictures_of(path.stem)
        if pictures:
            paragraphs = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")
            title = path.stem.replace("_", " ").capitalize()
            made[f"gallery/{path.stem}.md"] = _page(path, title, paragraphs, pictures)
            overview += [f"## [{title}](gallery/{path.stem}.md)", "", " ".join(paragraphs[0].split()), ""]
            overview += [_picture(pictures[0], title, "../"), ""]
    head = [
        "# Gallery",
        "",
        "Every picture is drawn by a script, which is on the page of the picture. Examples take `--help`, `--output` "
        "and `--quick`.",
        "",
    ]
    tree = ["```{toctree}", ":hidden:", "", *(path.removesuffix(".md") for path in made), "```", ""]
    return {"gallery.md": "\n".join(head + overview + tree), **made}


def pictures_of(script: str) -> list[str]:
    """Return the names of the pictures that a script has drawn: its own name, and whatever stands after it.

    Backwards by name, so that runs stand before what was measured before and after.
    """
    return sorted((path.name for path in (HERE / "images").glob(f"{script}*.png")), reverse=True)


def _page(path: Path, title: str, paragraphs: list[str], pictures: list[str]) -> str:
    where = f"{path.parent.name}/{path.name}"
    lines = [f"# {title}", "", f"`python {where}`", ""]
    for picture in pictures:
        lines += [_picture(picture, title, "../../"), ""]
    told = [f"::\n\n{text}" if text.startswith("    ") else text for text in paragraphs]
    lines += ["```{eval-rst}", "\n\n".join(told), "```", "", "## The script", ""]
    lines += [f"```{{literalinclude}} ../../../{where}", ":language: python", "```", ""]
    return "\n".join(lines)


def _picture(name: str, title: str, up: str) -> str:
    return f"```{{image}} {up}images/{name}\n:alt: {title}\n```"
