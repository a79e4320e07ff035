"""Runs the sections of `make gpu`, each in a process of its own, and survives all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.section import CONTEXT_LOST
from benchmarks.gpu.tables import write_tables

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.1
# In the records, where a process was lost before its first step.
START = "start"


@dataclass(frozen=True)
class Section:
    """name: in records and on the command line. module: has its steps. seconds: its share of the
    time. environment: what its process has besides.
    """

    name: str
    module: str
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """sections: in order. deadline: of the whole run, on `time.monotonic`'s clock."""

    sections: Sequence[Section]
    deadline: float
    environment: Mapping[str, str]
    rehearse: bool = False


def run(plan: Plan, folder: Path) -> None:
    """Run all sections; what they found is in the journal of `folder`, their output in log.txt."""
    journal = Journal(folder)
    with (folder / "log.txt").open("ab") as log:
        for section in plan.sections:
            _run_section(section, plan, journal, log)
            write_tables(journal)


def _run_section(section: Section, plan: Plan, journal: Journal, log) -> None:  # type: ignore[no-untyped-def]
    """Processes one after the other until all steps had their turn or the time is up.

    Each that dies takes one step with it at least, so this ends.
    """
    until = min(plan.deadline, time.monotonic() + section.seconds)
    while True:
        if time.monotonic() >= until:
            journal.end(section.name, START, "cut off", reason="no time left")
            return
        process = _start(section, plan, journal, log)
        status, reason = _watch(process, section, journal, until)
        if status == "done":
            if START in journal.unfinished(section.name):
                journal.end(section.name, START, "done")
            return
        running = journal.running(section.name)
        if running is None and status == "lost":
            continue
        step = START if running is None else running["step"]
        journal.end(section.name, step, status, reason=reason)
        if running is None or status == "cut off":
            return


def _start(section: Section, plan: Plan, journal: Journal, log) -> subprocess.Popen:  # type: ignore[no-untyped-def, type-arg]
    command = [sys.executable, "-m", "benchmarks.gpu.section", section.module]
    command += ["--name", section.name, "--output", str(journal.file.parent)]
    if plan.rehearse:
        command.append("--rehearse")
    environment = {**os.environ, **plan.environment, **section.environment}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _watch(
    process: subprocess.Popen,  # type: ignore[type-arg]
    section: Section,
    journal: Journal,
    until: float,
) -> tuple[str, str]:
    """How a section's process ended, and why: "done", "lost" (its GPU context), or one of ENDS."""
    while True:
        status = process.poll()
        if status is not None:
            return _ended(status)
        if time.monotonic() >= until:
            _kill(process)
            return "cut off", "the section's time was up"
        running = journal.running(section.name)
        if running is not None and time.time() > running["at"] + running["limit"]:
            _kill(process)
            return "hung", f"no end within {running['limit']:.0f} s"
        time.sleep(POLL_SECONDS)


def _ended(status: int) -> tuple[str, str]:
    if status == 0:
        return "done", ""
    if status == CONTEXT_LOST:
        return "lost", ""
    if status < 0:
        return "crashed", f"killed by {signal.Signals(-status).name}"
    return "crashed", f"exit status {status}, see log.txt"


def _kill(process: subprocess.Popen) -> None:  # type: ignore[type-arg]
    """With all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
