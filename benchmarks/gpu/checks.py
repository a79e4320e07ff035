"""The tests that need a GPU, over several processes, and compute-sanitizer on CUDA C++ kernels."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

from benchmarks.gpu.bench import Bench, Skipped, Step
from benchmarks.gpu.journal import Row
from benchmarks.gpu.machine import cuda_program

TESTS_SECONDS, SANITIZER_SECONDS = 200, 100
TEST_SECONDS = 60  # a single test that takes longer hangs
PROCESSES = 12
# What `pytest -m gpu` selects, by file, so that not every process collects all tests; and the tests
# that the interpreter runs elsewhere.
SUITES = {
    "pytest -m gpu": ("-m", "gpu", "tests/gpu", "tests/cuda", "tests/test_fuse_recipes.py"),
    "tests/triton_kernels": ("tests/triton_kernels",),
}
SANITIZERS = ("memcheck", "racecheck")
# What a rehearsal runs in place of the first.
REHEARSED = ("tests/test_tensor_access.py",)


def steps(bench: Bench) -> list[Step]:
    suites = tuple(SUITES)[:1] if bench.rehearsal else tuple(SUITES)
    return [
        *(Step(name, partial(tests, bench, name), TESTS_SECONDS + 20.0) for name in suites),
        *(
            Step(
                f"compute-sanitizer {tool}",
                partial(sanitize, bench, tool),
                SANITIZER_SECONDS + 20.0,
            )
            for tool in SANITIZERS
        ),
    ]


def tests(bench: Bench, suite: str) -> list[Row]:
    """One row for the counts, and one for each failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        command += ["-p", "no:benchmark", f"--junitxml={report}"]
        command += REHEARSED if bench.rehearsal else SUITES[suite]
        if importlib.util.find_spec("pytest_timeout"):
            command += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
        if importlib.util.find_spec("xdist") and not bench.rehearsal:
            # A worker that dies takes one test with it, and is replaced.
            command += ["-n", str(min(PROCESSES, os.cpu_count() or 1)), "--dist=worksteal"]
        subprocess.run(command, timeout=TESTS_SECONDS, env={**os.environ, "TRITON_INTERPRET": "0"})
        if not report.exists():
            raise RuntimeError("pytest wrote no report, see log.txt")
        return read_report(report, suite)


def read_report(report: Path, suite: str) -> list[Row]:
    """The counts of a JUnit file, then what failed and the end of its message."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        (case, child) for case in cases for child in case if child.tag in ("failure", "error")
    ]
    skipped = sum(any(child.tag == "skipped" for child in case) for case in cases)
    passed = len(cases) - skipped - len({id(case) for case, _ in failed})
    counts = f"{passed} passed, {len(failed)} failed, {skipped} skipped"
    rows: list[Row] = [{"tests": suite, "outcome": counts}]
    for case, child in failed:
        name = f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
        message = " ".join((child.get("message") or "").split())
        rows.append({"tests": name, "outcome": message[:300]})
    return rows


def sanitize(bench: Bench, tool: str) -> list[Row]:
    """The small and some of MOAT's shapes through the CUDA C++ kernels, under a checker."""
    if bench.rehearsal:
        raise Skipped("compute-sanitizer is for GPUs")
    command = cuda_program("compute-sanitizer")
    if command is None:
        raise Skipped("compute-sanitizer is not installed")
    result = subprocess.run(
        [
            *(command, "--tool", tool, "--kernel-name", "kns=moat_kernels"),
            *("--print-limit", "20", sys.executable, "-m", "benchmarks.gpu.sanitized"),
        ],
        capture_output=True,
        text=True,
        timeout=SANITIZER_SECONDS,
    )
    print(result.stdout[-5000:], result.stderr[-2000:], flush=True)
    if "Internal Sanitizer Error" in result.stdout:
        raise RuntimeError(f"the checker itself failed: {_message(result.stdout)}")
    summary = re.findall(r"=+ (ERROR SUMMARY.*|RACECHECK SUMMARY.*)", result.stdout)
    if not summary:
        raise RuntimeError(f"no summary: {result.stdout[-200:]} {result.stderr[-200:]}")
    ran = re.search(r"ran (\d+) calls", result.stdout)
    outcome = {"checker": tool, "calls": int(ran[1]) if ran else 0, "summary": summary[-1]}
    if "0 errors" not in summary[-1] and "0 hazards" not in summary[-1]:
        raise AssertionError(f"{outcome}")
    return [outcome]


def _message(output: str) -> str:
    return next(line for line in output.splitlines() if "Internal Sanitizer Error" in line)
