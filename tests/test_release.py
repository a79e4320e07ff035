"""`make release` refuses a tree that is not as its last commit, and code for other GPUs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from release import check_gpu_code

ROOT = Path(__file__).parent.parent
GENERATED = (
    *(".venv/bin/python", "build/extension.log", "dist/moat_kernels-1.tar.gz"),
    *(
        "moat_kernels.egg-info/PKG-INFO",
        "moat_kernels/_C.abi3.so",
        "moat_kernels/_build_record.json",
    ),
    *("moat_kernels/__pycache__/a.pyc", ".benchmarks/a", ".hypothesis/a", ".mypy_cache/a"),
    *(".pytest_cache/a", ".ruff_cache/a"),
)

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(repository: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    command = ["git", *identity, *arguments]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert not result.returncode, result.stderr
    return result.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A clean one with what a release starts with, after a build."""
    (tmp_path / "tests").mkdir()
    for name in (".gitignore", "Makefile", "tests/release.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "all")
    for name in GENERATED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def release(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tests/release.py", *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True)


def test_what_builds_and_checks_leave_behind_is_no_change(repository: Path) -> None:
    assert release(repository, "--check").returncode == 0


def test_changed_and_unknown_files_are_named(repository: Path) -> None:
    with (repository / "Makefile").open("a") as makefile:
        makefile.write("# changed\n")
    (repository / "csrc" / "new").mkdir(parents=True)
    (repository / "csrc" / "new" / "kernel.cpp").touch()
    result = release(repository)
    assert result.returncode == 1
    assert result.stderr.startswith("not released")
    assert " M Makefile\n" in result.stderr and "?? csrc/new/kernel.cpp\n" in result.stderr
    # An older release is still there: nothing was done.
    assert (repository / "dist" / "moat_kernels-1.tar.gz").exists()
    assert release(repository, "--check", "--uncommitted").returncode == 0


def test_a_tree_without_a_commit_is_refused(repository: Path) -> None:
    shutil.rmtree(repository / ".git")
    result = release(repository)
    assert result.returncode == 1
    assert "git says" in result.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_refuses_before_it_sets_anything_up(repository: Path) -> None:
    shutil.rmtree(repository / ".venv")
    (repository / "new.py").touch()
    command = ["make", "release", f"PYTHON={sys.executable}"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert result.returncode and "?? new.py\n" in result.stderr
    assert not (repository / ".venv").exists()


@pytest.mark.parametrize(
    ("architectures", "ptx", "accepted"),
    [
        ([80, 90], [90], True),
        ([80], [90], False),
        ([80, 90, 120], [90], False),
        ([80, 90], [], False),
    ],
)
def test_a_library_has_code_for_the_recorded_gpus_and_for_no_others(
    architectures: list[int], ptx: list[int], accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("ELF file    1: a.1.sm_80.cubin", "ELF file    2: a.2.sm_90.cubin")
    listing = "\n".join((*files, "PTX file    1: a.1.sm_90.ptx", ""))
    monkeypatch.setattr("release.run", lambda *command: listing)
    monkeypatch.setattr("shutil.which", lambda name: name)
    record = {"cuda_architectures": architectures, "cuda_ptx": ptx}
    if accepted:
        check_gpu_code(Path("library"), record)
    else:
        with pytest.raises(SystemExit, match="library has code for"):
            check_gpu_code(Path("library"), record)
