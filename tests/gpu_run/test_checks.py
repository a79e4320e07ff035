"""Reading what pytest and Nsight Compute report."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.checks import read_report
from benchmarks.gpu.kernels import sum_counters


def test_failures_are_named(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.gpu.test_a" name="one"/>'
        '<testcase classname="tests.gpu.test_a" name="two"><failure message="a\n  b"/></testcase>'
        '<testcase classname="tests.gpu.test_a" name="three"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert read_report(report, "all") == [
        {"tests": "all", "outcome": "1 passed, 1 failed, 1 skipped"},
        {"tests": "test_a::two", "outcome": "a b"},
    ]


def test_counters_are_added_by_kernel() -> None:
    line = {
        "Kernel Name": "expand_kernel",
        "smsp__inst_executed.sum": "1,000,000",
        "dram__bytes.sum": "2000000000",
        "gpu__time_duration.sum": "3000000",
    }
    (row,) = sum_counters([line, line])
    assert (row["kernel"], row["launches"], row["ms"], row["DRAM GB"]) == (
        "expand_kernel",
        2,
        6.0,
        4.0,
    )
    assert row["instructions, millions"] == 2.0
