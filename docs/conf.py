"""The documentation site: `make docs` builds it into build/site.

Its pages are the Markdown files of the repository, where they are, so that their links hold here
and on a code host alike. The API reference is made of docstrings.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from moat_kernels import __version__  # noqa: E402

project = "moat_kernels"
author = "The moat_kernels authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/RESULTS.md",
    "docs/*.md",
    "docs/api/*.md",
]
exclude_patterns = [".*", "build", "csrc", "examples", "moat_kernels", "tests", "**/gpu_runs"]

myst_heading_anchors = 4
myst_all_links_external = False
default_role = "code"  # a word in backticks in a docstring

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Padding": "Padding"}
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"moat_kernels {version}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

# The order of the pages: hidden in README.md, whose own links lead a reader of the repository.
NAVIGATION = {
    "Use": (
        *("install", "models", "dense_prediction", "fuse", "freeze", "memory", "supported"),
        *("commands", "environment"),
    ),
    "API": (
        *("api/blocks", "api/models", "api/timm", "api/functional", "api/reference", "api/fuse"),
        *("api/freeze", "api/checkpoints", "api/normalization", "api/backends", "api/tools"),
    ),
    "Measured": (
        *(
            "performance",
            "../benchmarks/RESULTS",
            "benchmarks",
            "cpu_kernels",
            "gpu_results",
            "gpu",
        ),
        *("gpu_kernels", "cuda_kernels", "launch_tables", "roofline"),
    ),
    "Change": (
        *("../CONTRIBUTING", "architecture", "add_an_adapter", "add_a_backend", "add_an_op"),
        "../CHANGELOG",
    ),
}


def navigation() -> str:
    """The pages as hidden tables of contents, one per part."""
    lines = []
    for part, pages in NAVIGATION.items():
        names = [
            page.removeprefix("../") if page.startswith("../") else f"docs/{page}" for page in pages
        ]
        lines += ["", "```{toctree}", ":hidden:", f":caption: {part}", "", *names, "```"]
    return "\n".join(lines)


# `name: text` or `one, other: text`: an argument or a field, as this project's docstrings have it.
FIELD = re.compile(r'([a-z_]\w*(?:, [a-z_]\w*)*(?: "\w+")?):(?:\s+(.*))?$')
NEW_PARAGRAPH = re.compile(r"(Returns|Raises) ")
CODE = re.compile(r"(``.+?``|`[^`]*`)")


def to_restructured_text(lines: list[str]) -> list[str]:
    """A docstring of this project in Sphinx's markup: arguments as a list of definitions."""
    converted: list[str] = []
    inside = example = False  # of an argument's definition, of an example
    for line in lines:
        example = line.startswith(">>> ") or (example and bool(line.strip()))
        begins = inside or not converted or not converted[-1].strip()
        match = FIELD.match(line) if begins else None
        if example:
            converted.append(line)
        elif match:
            if not inside:
                converted.append("")
            converted.append(f"``{match[1]}``")
            if match[2]:
                converted.append(f"    {escape(match[2])}")
            inside = True
        elif not line.strip() or (inside and NEW_PARAGRAPH.match(line)):
            converted += ["", escape(line)]
            inside = False
        else:
            converted.append(f"    {escape(line.strip())}" if inside else escape(line))
    return converted


def escape(line: str) -> str:
    """Stars and bars outside of backticks mean themselves."""
    pieces = CODE.split(line)
    return "".join(
        piece if number % 2 else re.sub(r"([*|])", r"\\\1", piece)
        for number, piece in enumerate(pieces)
    )


def comment_on_field(name: str) -> str:
    """The comment behind a field of a NamedTuple, which says its shape; empty if there is none."""
    module, owner, field = name.rsplit(".", 2)
    source = inspect.getsource(getattr(importlib.import_module(module), owner))
    match = re.search(rf"^    {field}: .*  # (.+)$", source, re.M)
    return match[1] if match else ""


def on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if lines and lines[0].startswith("Alias for field number"):
        lines[:] = [comment_on_field(name)]
    # The others are napoleon's.
    elif not any(re.match(r"(Args|Returns|Raises|Attributes):$", line) for line in lines):
        lines[:] = to_restructured_text(lines)


def on_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """A default that a function makes, as Sphinx can read it."""
    return (signature.replace("<factory>", "..."), returns) if signature else None


def on_source(app: Any, name: str, source: list[str]) -> None:
    if name == root_doc:
        source[0] += navigation()


def on_finished(app: Any, exception: Exception | None) -> None:
    """The landing page is README.html; browsers ask for index.html."""
    if exception is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Any) -> dict[str, bool]:
    # Before napoleon, which leaves what is converted as it is.
    app.connect("autodoc-process-docstring", on_docstring, priority=400)
    app.connect("autodoc-process-signature", on_signature)
    app.connect("source-read", on_source)
    app.connect("build-finished", on_finished)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
