"""Every section of `make gpu` on the CPU, with Triton's interpreter and an invented clock."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.runner import ROOT
from benchmarks.gpu.sections import sections

pytest.importorskip("triton")

MINUTES = 5.0


def rehearse(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--output", str(output)]
    # An archive would be for a GPU.
    command += ["--archive", str(output / "none"), *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_all_sections(tmp_path: Path) -> None:
    start = time.monotonic()
    result = rehearse(tmp_path, "--minutes", str(MINUTES))
    assert time.monotonic() - start < 60 * MINUTES + 10
    assert result.returncode == 0, result.stderr
    ended = Journal(tmp_path).ended()
    assert {record["section"] for record in ended} == {each.name for each in sections(tmp_path)}
    wrong = [record for record in ended if record["status"] not in ("done", "skipped")]
    assert not wrong, (tmp_path / "log.txt").read_text()[-5000:]
    for section in sections(tmp_path):
        assert f"## {section.name}\n" in result.stdout
    for table in (
        "| ceiling | value |",
        "| case | worst | error | of stock | not the same twice |",
        "| workload | contender | ms | images/s | peak, GiB |",
        "| kernel | first tensor; launch | in a step |",
        "| map | attention | forward, µs |",
        "| tests | outcome |",
    ):
        assert table in result.stdout
    assert "1 passed, 0 failed" in result.stdout


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    result = rehearse(tmp_path, "--sections", "machine=5", "smok")
    assert result.returncode != 0
    assert "--sections: 'smok' is none of machine, smoke, headline" in result.stderr
