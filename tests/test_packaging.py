"""setup.py where the native kernels cannot or shall not be built, and what a release contains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from build_support import cuda, record
from build_support.environment import reason_not_built

ROOT = Path(__file__).parent.parent
FOLDERS = ("build_support", "csrc", "moat_kernels")
RELEASED = (*FOLDERS, "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
RUN_SETUP = "import runpy; runpy.run_path('setup.py', run_name='__main__')"
WITHOUT_TORCH = f"import sys; sys.modules['torch'] = None; {RUN_SETUP}"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is released, without this checkout's own build outputs."""
    generated = shutil.ignore_patterns("*.so", "_build_record.json", "__pycache__")
    for name in RELEASED:
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=generated)
        else:
            shutil.copy(source, target)
    return tmp_path


def own_environment() -> dict[str, str]:
    """The environment without what the caller set for builds."""
    ours = ("MOAT_KERNELS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def run_setup(
    tree: Path, command: str, code: str = RUN_SETUP, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, "-q", command, "--dist-dir", "dist"],
        cwd=tree,
        env={**own_environment(), **environment},
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
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        assert "\nLicense: Apache-2.0\n" in archive.read(metadata).decode()
    assert record["reason_not_built"].startswith(reason)
    assert "moat_kernels/py.typed" in names
    assert not [name for name in names if name.endswith(".so")]


def test_the_source_release_contains_the_sources_of_the_native_kernels(tree: Path) -> None:
    run_setup(tree, "sdist", MOAT_KERNELS_SKIP_EXT="1")
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as release:
        names = {name.partition("/")[2] for name in release.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.[ch]*")}
    support = {path.relative_to(ROOT).as_posix() for path in (ROOT / "build_support").glob("*.py")}
    assert sources and support
    assert sources | support <= names


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variables for builds, and no reasons remembered from another environment."""
    reasons = (cuda.reason_cuda_not_built, reason_not_built)
    for name in set(os.environ) - set(own_environment()):
        monkeypatch.delenv(name)
    for reason in reasons:
        reason.cache_clear()
    yield
    for reason in reasons:
        reason.cache_clear()


@pytest.fixture
def toolkit(
    request: pytest.FixtureRequest,
    clean_environment: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An nvcc in CUDA_HOME that compiles for these architectures."""
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text(f"#!/bin/sh\nprintf 'sm_%s\\n' {request.param}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MOAT_KERNELS_WITH_CUDA", "1")


NVCC_11, NVCC_12_4, NVCC_13 = "60 75", "75 80 86 89 90 90a", "75 80 86 89 90 100 103 110 120 121"
EVERY = [(80, False), (90, False), (100, False), (120, True)]


@pytest.mark.parametrize(
    ("toolkit", "choice", "expected"),
    [
        (NVCC_13, "", EVERY),
        (NVCC_12_4, "", [(80, False), (90, True)]),
        (NVCC_11, "", []),
        (NVCC_13, "7.5;12.0", [(120, False)]),
        (NVCC_13, "8.6 9.0+PTX", [(86, False), (90, True)]),
        (NVCC_13, "7.5", []),
    ],
    indirect=["toolkit"],
)
def test_cuda_kernels_are_compiled_for_what_nvcc_knows_or_what_is_asked_for(
    toolkit: None, choice: str, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", choice)
    assert cuda.architectures() == expected
    reason = "" if expected else "TORCH_CUDA_ARCH_LIST, or nvcc, has nothing from 8.0 on"
    assert cuda.reason_cuda_not_built() == reason


@pytest.mark.parametrize("toolkit", [NVCC_13], indirect=True)
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CUDA_HOME", "/nowhere", "nvcc not found (looked in CUDA_HOME and on PATH)"),
        ("MOAT_KERNELS_SKIP_CUDA", "1", "MOAT_KERNELS_SKIP_CUDA is set"),
        pytest.param(
            *("MOAT_KERNELS_WITH_CUDA", "0", f"torch {torch.__version__} is built without CUDA"),
            marks=pytest.mark.skipif(bool(torch.version.cuda), reason="it is built with CUDA"),
        ),
    ],
)
def test_cuda_kernels_are_left_out_where_they_cannot_be_or_are_not_wanted(
    toolkit: None, variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert cuda.reason_cuda_not_built() == reason


def test_an_unreadable_list_of_architectures_is_an_error(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 Hopper")
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST has 'Hopper'"):
        cuda.architectures()


def test_a_build_without_kernels_leaves_those_of_an_earlier_one_their_record(
    clean_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOAT_KERNELS_SKIP_EXT", "1")
    (tmp_path / "moat_kernels").mkdir()
    path = tmp_path / "moat_kernels" / "_build_record.json"
    record.write(tmp_path)
    assert json.loads(path.read_text()) == {"reason_not_built": "MOAT_KERNELS_SKIP_EXT is set"}
    path.write_text("of the library")
    path.with_name("_C.abi3.so").touch()
    record.write(tmp_path)
    assert path.read_text() == "of the library"


@pytest.mark.parametrize("changed", [True, False])
@pytest.mark.parametrize("newer", [True, False])
def test_objects_of_other_sources_that_look_older_are_not_used_again(
    changed: bool, newer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.cpp").touch()
    objects, kept = tmp_path / "objects", tmp_path / "objects" / "a.o"
    assert not record.discard_outdated(objects, {"a.cpp": "before"})
    kept.touch()
    last = (objects / "sources.json").stat().st_mtime
    os.utime("a.cpp", times=(last, last + 1 if newer else last - 1))
    removed = record.discard_outdated(objects, {"a.cpp": "after" if changed else "before"})
    assert removed == (changed and not newer)
    assert kept.exists() != removed
