"""Sphinx builds the site: ``make docs``."""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import jupyter_client
import reference
from errors import page_of_errors
from measured import page_of_benchmarks

import ignite_tbptt

project = "ignite_tbptt"
author = "The ignite_tbptt maintainers"
release = ignite_tbptt.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_gallery.gen_gallery"]
exclude_patterns = ["_build"]
default_role = "code"
html_theme = "furo"
html_title = "ignite_tbptt"
html_show_copyright = False
html_static_path = ["style"]
html_css_files = ["site.css"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_use_rtype = False
napoleon_use_ivar = True
myst_heading_anchors = 3
# every page runs, in a folder of its own, and an error in one ends the build
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
logging.getLogger("traitlets").setLevel(logging.WARNING)  # which tells of every page that it runs
jupyter_client.KernelManager.transport_encryption.default_value = "auto"  # without it each kernel warns
# the pictures lie in docs/images: examples train for minutes, so that the build does not run them
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "generated/gallery",
    "plot_gallery": False,
    "within_subsection_order": "FileNameSortKey",
    "thumbnail_size": (640, 320),
    "notebook_extensions": set(),
    "show_signature": False,
    "write_computation_times": False,
    "remove_config_comments": True,
}
nitpicky = True
# fields of named tuples are documented with their types: those of torch, which no inventory here holds, and our own
# that are no concern of a user's; and an error that is raised, which users know by its base class
nitpick_ignore_regex = [
    ("py:class", r"torch\..*|ignite_tbptt\..*(flat|random_streams)\..*"),
    ("py:exc", "LostEvaluationError"),
]
# of Ignite's and torch's own base classes, whose docstrings are in their own dialect
autodoc_inherit_docstrings = False

GENERATED = Path(__file__).parent / "generated"
made = {**reference.pages(), "errors.md": page_of_errors(), "benchmarks.md": page_of_benchmarks()}
for name, page in made.items():
    path = GENERATED / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != page:  # so that an unchanged page is not built again
        path.write_text(page)
