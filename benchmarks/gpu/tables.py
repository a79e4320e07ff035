"""The records as short Markdown tables, in tables.md beside them."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.gpu.journal import Journal, Record, Row


def write_tables(journal: Journal) -> None:
    """In one step, so that a reader never finds half of them."""
    target = journal.file.with_name("tables.md")
    temporary = target.with_name(f"tables.md.{os.getpid()}")
    temporary.write_text(format_tables(journal.ended()))
    temporary.replace(target)


def format_tables(records: list[Record]) -> str:
    """One table for the rows of each section and set of columns; below it what was not done."""
    lines = ["# What `make gpu` found", ""]
    sections = dict.fromkeys(record["section"] for record in records)
    for section in sections:
        lines += [f"## {section}", ""]
        mine = [record for record in records if record["section"] == section]
        groups: dict[tuple[str, ...], list[Row]] = {}
        for record in mine:
            for row in record["rows"]:
                groups.setdefault(tuple(row), []).append(row)
        for columns, rows in groups.items():
            lines += [*format_table(columns, rows), ""]
        undone = [record for record in mine if record["status"] != "done"]
        lines += [f"- {each['step']}: {each['status']}: {each['reason']}" for each in undone]
        lines += [""] if undone else []
    return "\n".join(lines)


def format_table(columns: tuple[str, ...], rows: list[Row]) -> list[str]:
    """Text to the left, numbers to the right."""
    numeric = [all(not isinstance(row[column], str) for row in rows) for column in columns]
    rule = "|".join("---:" if right else "---" for right in numeric)
    return [
        f"| {' | '.join(columns)} |",
        f"|{rule}|",
        *(f"| {' | '.join(format_cell(row[column]) for column in columns)} |" for row in rows),
    ]


def format_cell(value: Any) -> str:
    """Floats with three figures that count; what is missing is left empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")
