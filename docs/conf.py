"""Sphinx builds the site: ``make docs``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from errors import page_of_errors

import ignite_tbptt

project = "ignite_tbptt"
author = "The ignite_tbptt maintainers"
release = ignite_tbptt.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"
html_theme = "furo"
html_title = "ignite_tbptt"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_rtype = False
napoleon_use_ivar = True
myst_heading_anchors = 3
# of Ignite's and torch's own base classes, whose docstrings are in their own dialect
autodoc_inherit_docstrings = False

(Path(__file__).parent / "errors.md").write_text(page_of_errors())
