"""How the pages are built (`make docs`).

The source folder is the repository, not `docs/`, so that every link works here as it does in the repository.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

import rcnn_svm

ROOT = Path(__file__).parents[1]

project = "rcnn_svm"
author = "the rcnn_svm authors"
version = release = rcnn_svm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "results/*/README.md", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".*", "build"]

# Docstrings are Google's, and say `name` where reStructuredText says ``name``.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
strip_signature_backslash = True  # and escape names that end in an underscore
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
add_module_names = False
python_maximum_signature_line_length = 90

myst_heading_anchors = 3
myst_fence_as_directive = ["math"]  # as GitHub writes formulas
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "rcnn_svm"
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_additional_pages = {"index": "start.html"}
templates_path = ["."]


class Printed(SphinxDirective):
    """What an example prints, by running it; nothing where the build was not asked to (`EXAMPLES=1`)."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Run the example in an empty folder, as a reader would."""
        if not self.config.run_examples:
            return []
        path = ROOT / "examples" / f"{self.arguments[0]}.py"
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, path],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
            )
        if done.returncode != 0:
            raise ExtensionError(f"examples/{path.name}: must run to its end, got {done.stderr}")
        return [nodes.paragraph(text="It prints:"), nodes.literal_block(text=done.stdout, language="text")]


_INSIDE = r"[^\[\]]|\[(?:[^\[\]]|\[[^\[\]]*\])*\]"  # of brackets, two more pairs deep
_BOUND = re.compile(rf"Annotated\[((?:{_INSIDE})*?), ~?[\w.]*(?:Interval|Values)\([^()]*\)\]")
_ARRAY = re.compile(r"~?[\w.]*ndarray\[~?[\w.]*tuple\[[^\[\]]*\], ~?[\w.]*dtype\[([^\[\]]*)\]\]")


def plain_types(
    app: Sphinx, what: str, name: str, part: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Write types as the code does: arrays by what they hold, numbers without the bounds of settings."""

    def plain(text: str | None) -> str | None:
        before, text = None, text and text.replace("<factory>", "...")  # which no parser reads
        while text and text != before:
            before, text = text, _BOUND.sub(r"\1", _ARRAY.sub(r"NDArray[\1]", text))
        return text

    if getattr(part, "_is_protocol", False):
        return "", None  # nobody makes one
    return plain(signature), plain(returned)


def without_links(app: Sphinx, doctree: nodes.document) -> None:
    """Take links to files out of headings: Sphinx fails where it copies them into a table of contents."""
    for title in doctree.findall(nodes.title):
        for link in list(title.findall(addnodes.download_reference)):
            link.replace_self(link.children)


def without_routing(app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what scikit-learn adds to its estimators for metadata: its texts point into its own pages."""
    return True if name.startswith("set_") and name.endswith("_request") else None


def mathml(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula into the page itself; MathJax would be fetched from elsewhere when it is opened."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    translator.body.append(
        f'<div style="overflow-x: auto; margin: 1em 0">{formula}</div>\n' if block else formula
    )
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Add `printed`, and what is put right in what Sphinx reads."""
    app.add_config_value("run_examples", False, "env", bool)
    app.add_directive("printed", Printed)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("autodoc-process-signature", plain_types)
    app.connect("autodoc-skip-member", without_routing)
    app.connect("doctree-read", without_links, priority=400)
    return {"parallel_read_safe": True}
