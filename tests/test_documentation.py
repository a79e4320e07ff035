"""README.md, CONTRIBUTING.md and docs/: their examples run, their links lead somewhere."""

from __future__ import annotations

import doctest
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peers import import_own, import_peer

import moat_kernels
from moat_kernels.adapters import registry
from moat_kernels.extension import load_extension
from moat_kernels.ops.frozen import multiplies

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "docs/api/*.md", "benchmarks/*.md")
    for page in ROOT.glob(pattern)
)
# A source release has README.md alone.
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="no docs/ here")

# A block of Python, and the comment before it that says what it needs, or why it is not run.
BLOCK = re.compile(
    r"(?:^<!-- example: (?P<note>[^>]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S
)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """An example of a page: its first line in the page, its note, its code."""

    line: int
    note: str
    code: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [
        Block(text.count("\n", 0, match.start("code")), match["note"] or "", match["code"])
        for match in BLOCK.finditer(text)
    ]


def reason_to_skip(note: str) -> str:
    """Why a block with this note is not run here; empty if it is."""
    if not note:
        return ""
    if note.startswith("not run, "):
        return note.removeprefix("not run, ")
    needed = note.removeprefix("needs ")
    assert needed != note, f"a note begins with 'needs' or 'not run,', got {note!r}"
    return next(filter(None, map(reason_to_lack, needed.split(" and "))), "")


def reason_to_lack(needed: str) -> str:
    """Why it is not here; empty if it is. A missing package skips the test."""
    if needed == "the native kernels":
        return "" if load_extension().usable else f"native kernels {load_extension().reason}"
    if needed == "the native kernels in int8":
        usable = load_extension().usable and multiplies(torch.int8)
        return "" if usable else "no native kernels, or a CPU that does not multiply int8"
    import_peer(needed)
    return ""


EXAMPLES = [(page, number) for page in PAGES for number in range(len(blocks(page)))]


@pytest.fixture(scope="module")
def namespaces() -> Iterator[dict[str, dict[str, Any]]]:
    """What the examples of a page have left to those that follow."""
    before = dict(registry._ADAPTERS)
    yield {}
    registry._ADAPTERS.clear()
    registry._ADAPTERS.update(before)


@pytest.mark.parametrize(("page", "number"), EXAMPLES, ids=str)
def test_an_example_runs(
    page: str,
    number: int,
    namespaces: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After those before it on the page, as for somebody who reads it."""
    block = blocks(page)[number]
    if reason := reason_to_skip(block.note):
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    namespace = namespaces.setdefault(page, {"__name__": "example"})
    for earlier in blocks(page)[namespace.get("__next__", 0) : number + 1]:
        if earlier is block or not earlier.note:
            # The line numbers of a traceback are the page's.
            source = "\n" * earlier.line + earlier.code
            exec(compile(source, str(ROOT / page), "exec"), namespace)
    namespace["__next__"] = number + 1


def modules() -> list[str]:
    names = [
        item.name
        for item in pkgutil.walk_packages(moat_kernels.__path__, "moat_kernels.")
        if not item.name.endswith(("._C", ".__main__")) and ".triton" not in item.name
    ]
    return ["moat_kernels", *names]


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_docstrings_run(name: str) -> None:
    result = doctest.testmod(import_own(name), extraglobs={"torch": torch})
    assert not result.failed


@pytest.mark.parametrize("name", ["", ".functional", ".checkpoints", ".adapters", ".timm"])
def test_the_api_reference_has_every_public_name(name: str) -> None:
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    module = import_own(f"moat_kernels{name}")
    missing = [public for public in module.__all__ if not re.search(rf"\b{public}\b", text)]
    assert not missing


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and the site make them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    """To files and headings of this repository; those to other hosts are not fetched."""
    file = ROOT / page
    for match in LINK.finditer(CODE.sub("", file.read_text())):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = (file.parent / target).resolve() if target else file
        assert linked.is_relative_to(ROOT.resolve()) and linked.exists(), match[0]
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), match[0]


# Paths as prose names them.
PATH = re.compile(
    r"`((?:csrc|moat_kernels|tests|benchmarks|docs|examples)/[\w./]+?\.\w+|"
    r"(?:csrc|moat_kernels|tests|benchmarks|docs|examples)(?:/\w+)*/?)`"
)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(page for page in PAGES if "docs/a" in page)]
)
def test_the_paths_that_a_page_names_exist(page: str) -> None:
    for path in PATH.findall((ROOT / page).read_text()):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_every_environment_variable_is_documented() -> None:
    """Each that a source names, macros of the preprocessor apart, and no other."""
    name = r"MOAT_KERNELS_[A-Z_]*[A-Z]"
    files = [ROOT / "setup.py", ROOT / "Makefile"]
    for folder in ("moat_kernels", "csrc", "build_support", "tests", "benchmarks", "examples"):
        files += [
            file
            for file in (ROOT / folder).rglob("*")
            if file.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
        ]
    text = "\n".join(file.read_text() for file in files)
    macros = set(re.findall(rf"(?:#\s*define\s+|-D)({name})\b", text))
    documented = set(re.findall(name, (ROOT / "docs" / "environment.md").read_text()))
    assert documented == set(re.findall(rf"{name}\b", text)) - macros
