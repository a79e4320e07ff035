"""What the sections of `make gpu` find: a line of JSON for each step, written as it happens.

A step has a line when it begins and one when it has ended, so that a process that is gone tells
where it was. Only one process writes at a time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Record = dict[str, Any]

# How a step can end. "skipped": it does not apply here; "cut off": the time was up.
ENDS = ("done", "skipped", "failed", "crashed", "hung", "cut off")
# Those that a resumed run takes up again.
UNFINISHED = ("cut off",)


class Journal:
    """The records in FOLDER/results.jsonl."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "results.jsonl"

    def begin(self, section: str, step: str, seconds: float) -> None:
        """seconds: after which the step counts as hung."""
        self._write(section, step, "begun", {"at": time.time(), "limit": seconds})

    def end(
        self,
        section: str,
        step: str,
        status: str,
        rows: Sequence[Row] = (),
        reason: str = "",
        seconds: float = 0.0,
    ) -> None:
        """status: one of ENDS; rows: what was found; reason: why it is not "done"."""
        assert status in ENDS, status
        found = {"seconds": round(seconds, 2), "reason": reason, "rows": list(rows)}
        self._write(section, step, status, found)

    def _write(self, section: str, step: str, status: str, more: Mapping[str, Any]) -> None:
        line = json.dumps({"section": section, "step": step, "status": status, **more})
        with self.file.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[Record]:
        """All lines so far; one that was cut short when its process died is left out."""
        if not self.file.exists():
            return []
        found = []
        for line in self.file.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def ended(self) -> list[Record]:
        """The last end of every step, in the order in which they first ended."""
        last: dict[tuple[str, str], Record] = {}
        for record in self.records():
            if record["status"] in ENDS:
                last[record["section"], record["step"]] = record
        return list(last.values())

    def finished(self, section: str) -> set[str]:
        """The steps of a section that need not run again."""
        return {
            record["step"]
            for record in self.ended()
            if record["section"] == section and record["status"] not in UNFINISHED
        }

    def unfinished(self, section: str) -> set[str]:
        """The steps of a section that were cut off."""
        return {
            record["step"]
            for record in self.ended()
            if record["section"] == section and record["status"] in UNFINISHED
        }

    def running(self, section: str) -> Record | None:
        """The step of a section that has begun and not ended."""
        begun = None
        for record in self.records():
            if record["section"] == section:
                begun = record if record["status"] == "begun" else None
        return begun

    def rows(self, section: str, step: str = "") -> list[Row]:
        """What a section, or a step of it, found."""
        return [
            row
            for record in self.ended()
            if record["section"] == section and step in ("", record["step"])
            for row in record["rows"]
        ]
