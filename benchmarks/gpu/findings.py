"""What the folders of several runs of `make gpu` hold, by the card that they ran on."""

from __future__ import annotations

import datetime
import importlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.journal import ENDS, Journal, Record, Row
from benchmarks.gpu.runner import START
from benchmarks.gpu.sections import LAUNCH_TABLE, sections

NOT_YET = "not measured yet"
UNKNOWN_CARD = "a card that was not recorded"
REHEARSAL = "none (a rehearsal)"  # as the section `machine` calls it
# Ends that say nothing about a step, so that those of an earlier run stand.
_VOID = ("cut off", "skipped")
# Facts of the section `machine`, and how a run spells them. "driver" has the highest clock too.
_FACTS = {
    "driver": "driver",
    "torch": "torch",
    "triton": "Triton",
    "CUDA of torch": "CUDA",
    "moat_kernels": "moat_kernels",
    "python": "Python",
}
MERGED_FACTS = ("driver", "torch", "triton", "CUDA of torch", "moat_kernels")


@dataclass(frozen=True)
class Run:
    """A folder. number: its place on the command line; facts: of the section `machine`; began: by
    the clock of its machine, in seconds; records: the last end of each step.
    """

    number: int
    facts: dict[str, str]
    began: float | None
    records: list[Record]

    @property
    def card(self) -> str:
        return self.facts.get("GPU", UNKNOWN_CARD)

    def __str__(self) -> str:
        facts = [
            f"{ours} {self.facts[name]}" for name, ours in _FACTS.items() if name in self.facts
        ]
        cpu = [self.facts["CPU"]] if "CPU" in self.facts else []
        date = "on a day that was not recorded"
        if self.began is not None:
            date = datetime.datetime.fromtimestamp(self.began, datetime.timezone.utc).date()
        versions = facts or ["versions were not recorded"]
        return f"run {self.number}, {date}: {', '.join([*versions, *cpu])}"


@dataclass(frozen=True)
class Card:
    """name: of the GPU. records: of its runs, each with the number of its "run"; the later run
    wins, step by step.
    """

    name: str
    runs: list[Run]
    records: dict[tuple[str, str], Record]

    @property
    def is_rehearsal(self) -> bool:
        return self.name == REHEARSAL

    def rows(self, section: str, step: str = "") -> list[Row]:
        """What a section, or a step of it, found; with the "run" where there are several."""
        return [
            {**row, "run": record["run"]} if len(self.runs) > 1 else row
            for record in self.of_section(section)
            if step in ("", record["step"])
            for row in record["rows"]
        ]

    def of_section(self, section: str) -> list[Record]:
        return [record for (name, _), record in self.records.items() if name == section]

    def status(self, section: str, step: str) -> str:
        """How a step ended."""
        record = self.records.get((section, step))
        return NOT_YET if record is None else record["status"]


def name_missing(card: Card, section: str, steps: Mapping[str, str]) -> list[str]:
    """A paragraph that says how steps ended, by the names to give them; none without steps."""
    by_status: dict[str, list[str]] = {}
    for name, step in steps.items():
        by_status.setdefault(card.status(section, step), []).append(f"`{name}`")
    if not by_status:
        return []
    ends = (f"{status.capitalize()}: {', '.join(names)}." for status, names in by_status.items())
    return [" ".join(ends), ""]


def read_cards(folders: Sequence[Path]) -> list[Card]:
    """The cards in the order of their first runs; none where no folder has records."""
    runs = [read_run(folder, number) for number, folder in enumerate(folders, 1)]
    by_card: dict[str, list[Run]] = {}
    for run in runs:
        if run.records:
            by_card.setdefault(run.card, []).append(run)
    return [Card(name, mine, merge(mine)) for name, mine in by_card.items()]


def read_run(folder: Path, number: int) -> Run:
    """Without records where there is no such folder, or nothing in it."""
    if not (folder / "results.jsonl").exists():
        return Run(number, {}, None, [])
    journal = Journal(folder)
    last = {(record["section"], record["step"]): record for record in journal.ended()}
    for section in dict.fromkeys(record["section"] for record in journal.records()):
        # The whole run was ended from outside.
        if (begun := journal.running(section)) is not None:
            lost = {"status": "cut off", "reason": "the run ended in it", "rows": [], "seconds": 0}
            last[section, begun["step"]] = {**begun, **lost}
    search = last.get(("tune", "tune"))
    if search is not None and not search["rows"]:
        last["tune", "tune"] = {**search, "rows": read_launches(folder / LAUNCH_TABLE)}
    facts = {row[""]: row["this machine"] for row in journal.rows("machine", "facts")}
    times = [record["at"] for record in journal.records() if "at" in record]
    return Run(number, facts, min(times, default=None), list(last.values()))


def read_launches(file: Path) -> list[Row]:
    """The rows of the section `tune` from the launch table that it writes at once, for a search
    that did not end.
    """
    try:
        tables = json.loads(file.read_text())["sections"] if file.exists() else []
    except ValueError:
        return []
    return [
        {
            "kernel": f"{entry['op']} {entry['kernel']}",
            "sizes": "x".join(map(str, entry["sizes"])),
            "static, µs": entry["static_microseconds"],
            "tuned, µs": entry["microseconds"],
            "launch": " ".join(f"{name}={value}" for name, value in entry["blocks"].items()),
        }
        for table in tables
        for entry in table["launches"]
    ]


def merge(runs: Sequence[Run]) -> dict[tuple[str, str], Record]:
    """The records of runs on one card by (section, step)."""
    merged: dict[tuple[str, str], Record] = {}
    for run in runs:
        for section in {record["section"] for record in run.records}:
            merged.pop((section, START), None)  # of the section's processes, not of a step
        for record in run.records:
            key = record["section"], record["step"]
            if key in merged and record["status"] in _VOID and merged[key]["status"] not in _VOID:
                continue
            merged[key] = {**record, "run": run.number}
    return merged


def expected_steps(rehearsal: bool) -> dict[str, list[str]]:
    """The steps that a complete run has, by section."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Journal(Path(folder)), rehearsal)
        return {
            section.name: [
                step.name for step in importlib.import_module(section.module).steps(bench)
            ]
            for section in sections(Path(folder))
        }


def count_ends(card: Card) -> list[Row]:
    """How many steps of each section ended how."""
    found = []
    for section, steps in expected_steps(card.is_rehearsal).items():
        ended = [record for record in card.of_section(section) if record["step"] != START]
        names = {record["step"] for record in ended}
        counts = {end: sum(record["status"] == end for record in ended) for end in ENDS}
        not_begun = sum(step not in names for step in steps)
        found.append({"section": section, **counts, "not begun": not_begun})
    return found
