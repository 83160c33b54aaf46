"""The code of every page runs as it stands, one page after its own beginning; and the page of errors misses none."""

from __future__ import annotations

import logging
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import ignite_tbptt
import ignite_tbptt.blackbox

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "generated"} & set(path.parts))
# what is meant on a page, and would end a test
MEANT = ["ignore:the first backward pass left", "ignore:.*its steps were measured"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings(*MEANT)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```\{code-cell\}\n(?::.*\n)*(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert "```python" not in page.read_text(), "neither the site nor this test runs it"
    assert all(len(line) <= 88 for block in blocks for line in block.splitlines()), "wider than a page of the site"
    monkeypatch.chdir(tmp_path)
    logging.disable()
    try:
        script = tmp_path / f"{page.stem}.py"
        script.write_text("\n".join(blocks))  # a file, so that warnings and pickling find it
        runpy.run_path(str(script), run_name=f"page_{page.stem}")
    finally:
        logging.disable(logging.NOTSET)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]*)\)", page.read_text()):
            assert (page.parent / f"{target}.md").exists() or (page.parent / target).exists(), (page, target)


def test_every_public_name_is_in_the_reference() -> None:
    pages = runpy.run_path(str(DOCS / "reference.py"))["pages"]()
    documented = re.findall(r"^\.\. auto\w+:: (\S+)$", "\n".join(pages.values()), flags=re.MULTILINE)
    assert len(documented) == len(set(documented))
    tables = pages["reference/time/index.md"] + pages["reference/blackboxes/index.md"]
    for package in (ignite_tbptt, ignite_tbptt.blackbox):
        for name in set(package.__all__) - {"__version__"}:
            assert {f"ignite_tbptt.{name}", f"ignite_tbptt.blackbox.{name}"} & set(documented), name
            assert f"`{name} <" in tables


def test_every_picture_has_a_page_with_the_script_that_drew_it() -> None:
    examples = "".join(path.read_text() for path in (DOCS.parent / "examples").glob("*.py"))
    shown = re.findall(r"^\.\. image:: /images/(\S+)$", examples, flags=re.MULTILINE)
    thumbnails = re.findall(r"^# sphinx_gallery_thumbnail_path = \"images/(\S+)\"$", examples, flags=re.MULTILINE)
    assert len(shown) >= 8
    assert len(thumbnails) == len(list((DOCS.parent / "examples").glob("*.py")))
    measured = runpy.run_path(str(DOCS / "measured.py"))["page_of_benchmarks"]()
    shown += re.findall(r"\(\.\./images/(\S+)\)", measured)
    assert sorted(shown) == sorted(path.name for path in (DOCS / "images").glob("*.png"))


def test_every_message_is_on_the_page_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    script: dict[str, Any] = runpy.run_path(str(DOCS / "errors.py"))
    page = script["page_of_errors"]()
    written = sum(len(script["messages"](path)) for path in script["PACKAGE"].rglob("*.py"))
    assert page.count("\n- **") == written > 150
    for part in ("gives other outputs for the same inputs", "has no time events"):
        assert part in page
