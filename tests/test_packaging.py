"""setup.py where the native kernels cannot or shall not be built, and what a release contains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RELEASED = ("csrc", "moat_kernels", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")
RUN_SETUP = "import runpy; runpy.run_path('setup.py', run_name='__main__')"
WITHOUT_TORCH = f"import sys; sys.modules['torch'] = None; {RUN_SETUP}"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is released, without this checkout's own build outputs."""
    generated = shutil.ignore_patterns("*.so", "_build_record.json", "__pycache__")
    for name in (*RELEASED, "setup.py"):
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=generated)
        else:
            shutil.copy(source, target)
    return tmp_path


def run_setup(
    tree: Path, command: str, code: str = RUN_SETUP, **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MOAT_KERNELS")}
    return subprocess.run(
        [sys.executable, "-c", code, "-q", command, "--dist-dir", "dist"],
        cwd=tree,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize(
    ("code", "environment", "reason"),
    [
        (RUN_SETUP, {"MOAT_KERNELS_SKIP_EXT": "1"}, "MOAT_KERNELS_SKIP_EXT is set"),
        (RUN_SETUP, {"CXX": "no-such-c++"}, "no C++ compiler found (looked for no-such-c++)"),
        (WITHOUT_TORCH, {}, "torch is not installed in the build environment"),
    ],
    ids=["skipped", "no compiler", "no torch"],
)
def test_without_native_kernels_the_wheel_is_pure_and_one_line_says_why(
    tree: Path, code: str, environment: dict[str, str], reason: str
) -> None:
    output = run_setup(tree, "bdist_wheel", code, **environment).stderr
    lines = [line for line in output.splitlines() if line.startswith("moat_kernels:")]
    assert len(lines) == 1
    assert f"native CPU kernels not built: {reason}" in lines[0]

    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("moat_kernels/_build_record.json"))
    assert record["reason_not_built"].startswith(reason)
    assert "moat_kernels/py.typed" in names
    assert not [name for name in names if name.endswith(".so")]


def test_the_source_release_contains_the_sources_of_the_native_kernels(tree: Path) -> None:
    run_setup(tree, "sdist", MOAT_KERNELS_SKIP_EXT="1")
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as release:
        names = {name.partition("/")[2] for name in release.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.[ch]*")}
    assert sources
    assert sources <= names
