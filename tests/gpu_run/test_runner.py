"""`make gpu` survives what its sections do, and goes on where it ended."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.runner import ROOT, START, Plan, Section, run


def make_plan(*sections: Section, seconds: float = 60.0) -> Plan:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {"PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    return Plan(sections, time.monotonic() + seconds, environment)


def outcomes(folder: Path, section: str) -> dict[str, tuple[str, str]]:
    """(status, reason) of each step."""
    return {
        record["step"]: (record["status"], record["reason"])
        for record in Journal(folder).ended()
        if record["section"] == section
    }


def test_each_fault_costs_its_step_only(tmp_path: Path) -> None:
    plan = make_plan(
        Section("faults", "support.gpu_faults", 60.0),
        Section("broken", "support.gpu_broken", 60.0),
        Section("after", "support.gpu_faults", 0.0),
    )
    run(plan, tmp_path)
    found = outcomes(tmp_path, "faults")
    assert found["good"] == found["last"] == ("done", "")
    assert found["raises"] == ("failed", "ValueError: a bad number (gpu_faults.py:27)")
    assert found["does not apply"] == ("skipped", "there is no such thing here")
    assert found["loses the context"][0] == "failed"
    assert found["crashes"] == ("crashed", "killed by SIGSEGV")
    assert found["exits"] == ("crashed", "exit status 7, see log.txt")
    assert found["hangs"] == ("hung", "no end within 0 s")
    assert outcomes(tmp_path, "broken") == {START: ("crashed", "exit status 1, see log.txt")}
    assert outcomes(tmp_path, "after") == {START: ("cut off", "no time left")}
    assert "a library is missing" in (tmp_path / "log.txt").read_text()
    # Steps after one that takes the process with it run in another process, and no step runs twice.
    begun = [r["step"] for r in Journal(tmp_path).records() if r["status"] == "begun"]
    assert len(begun) == len(set(begun))
    tables = (tmp_path / "tables.md").read_text()
    assert "| found |\n|---:|\n| 1 |\n| 2 |" in tables
    assert "- crashes: crashed: killed by SIGSEGV" in tables
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_run_that_is_cut_off_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW_ONCE", str(tmp_path / "mark"))
    output = tmp_path / "output"
    slow = Section("slow", "support.gpu_slow", 60.0)
    start = time.monotonic()
    run(make_plan(slow, seconds=8.0), output)
    assert time.monotonic() - start < 10.0
    assert outcomes(output, "slow")["first"] == ("done", "")
    assert outcomes(output, "slow")["second"][0] == "cut off"
    run(make_plan(slow), output)
    assert Journal(output).rows("slow") == [{"found": "at once"}, {"found": "the second time"}]
    assert outcomes(output, "slow").keys() == {"first", "second"}
