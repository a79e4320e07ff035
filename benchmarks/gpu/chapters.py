"""The shorter chapters of docs/gpu_results.md."""

from __future__ import annotations

import re
from collections.abc import Iterable

from benchmarks.gpu import smoke
from benchmarks.gpu.attention import MAPS, TINY_MAPS
from benchmarks.gpu.findings import NOT_YET, Card, count_ends, expected_steps, name_missing
from benchmarks.gpu.journal import Record, Row
from benchmarks.gpu.tables import format_table

OURS = "moat_kernels"
_FAMILIES = ("attention", "layer norm", "mbconv")


def write_reason(text: str) -> str:
    """A reason as Markdown: without folders of the machine, and no tags."""
    short = re.sub(r"(?<!\w)/(?:[\w.+-]+/)+(?=[\w.+-])", "…/", text)
    return short.replace("<", "&lt;").replace("*", r"\*")


def ceilings(card: Card) -> list[str]:
    """What `machine` measured; its facts stand in the heading."""
    rows = [row for row in card.rows("machine") if "ceiling" in row]
    library = [row for row in card.rows("machine") if "native library" in row]
    lines = format_table(tuple(rows[0]), rows) if rows else [f"Ceilings: {NOT_YET}."]
    if library:
        built = library[-1]["CUDA kernels"]
        return [*lines, "", f"The native library was loaded; its CUDA kernels: {built}."]
    return [*lines, "", f"The native library: {card.status('machine', 'extension')}."]


def correctness(card: Card) -> list[str]:
    """The worst error of each family of kernels, and who failed."""
    names = [name for name, *_ in smoke.cases(card.is_rehearsal, "cpu")]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        groups.setdefault(classify(name), []).append(name)
    rows = [_family(card, group, cases) for group, cases in groups.items()]
    failed = [
        record for record in card.of_section("smoke") if record["status"] not in ("done", "skipped")
    ]
    measured = any(row["passed"] for row in rows)
    return [
        "Each case runs repeatedly on memory that is NaN where nothing was written, and is compared"
        " with float64. Errors are relative to the largest element. They are those of the cases"
        " that passed: a case that does not gives a reason instead.",
        "",
        *(format_table(tuple(rows[0]), rows) if measured or failed else [f"Errors: {NOT_YET}."]),
        "",
        *(write_records(failed, card) or [f"Failures: {'none' if measured else NOT_YET}."]),
    ]


def classify(name: str) -> tuple[str, str, str]:
    """(family, kernels, dtype) of a case of the section `smoke`."""
    parts = name.split(", ")
    family = next(each for each in _FAMILIES if name.startswith(each))
    kernels = parts[-1] if parts[-1] in smoke.KERNELS else "Triton"
    dtypes = [smoke.spell(dtype) for dtype in smoke.DTYPES]
    return family, kernels, next(part for part in parts if part in dtypes)


def _family(card: Card, group: tuple[str, str, str], cases: list[str]) -> Row:
    statuses = [card.status("smoke", case) for case in cases]
    rows = [row for case in cases for row in card.rows("smoke", case)]
    worst = max(rows, key=lambda row: row["error"], default=None)
    differing = sum(bool(row["not the same twice"]) for row in rows) + sum(
        "two runs differ" in _reason(card, case) for case in cases
    )
    skipped, not_yet = statuses.count("skipped"), statuses.count(NOT_YET)
    passed = statuses.count("done")
    return {
        "family": group[0],
        "kernels": group[1],
        "dtype": group[2],
        "cases": len(cases),
        "passed": passed,
        "skipped": skipped,
        NOT_YET: not_yet,
        "failed or lost": len(cases) - passed - skipped - not_yet,
        "differing bits": differing,
        "worst error": None if worst is None else worst["error"],
        "stock's there": None if worst is None else worst["of stock"],
        "worst of error / stock's": max(
            (row["error"] / row["of stock"] for row in rows if row["of stock"]), default=None
        ),
    }


def _reason(card: Card, step: str) -> str:
    record = card.records.get(("smoke", step))
    return "" if record is None else record["reason"]


def attention(card: Card) -> list[str]:
    """A table for each map, ours first, and by how much it is faster or slower."""
    lines = ["bfloat16; gradients of q, k, v and of the position bias.", ""]
    rows = card.rows("attention")
    expected = expected_steps(card.is_rehearsal)["attention"]
    for name in TINY_MAPS if card.is_rehearsal else MAPS:
        mine = [row for row in rows if row.get("map") == name]
        found = {row["attention"] for row in mine}
        steps = {
            step.removeprefix(f"{name}: "): step
            for step in expected
            if step.startswith(f"{name}: ")
        }
        missing = {method: step for method, step in steps.items() if method not in found}
        lines += [f"#### {name}", ""]
        if mine:
            columns = tuple(column for column in mine[0] if column != "map")
            lines += [_say_attention(mine), "", *format_table(columns, mine), ""]
        lines += name_missing(card, "attention", missing)
    return lines


def _say_attention(rows: list[Row]) -> str:
    key = "in CUDA graphs, µs"
    ours = next((row for row in rows if row["attention"] == OURS), None)
    others = [row for row in rows if row["attention"] != OURS]
    best = min(others, key=lambda row: row[key], default=None)
    if ours is None or best is None:
        return f"Ours against others: {NOT_YET}."
    ratio = ours[key] / best[key]
    two = round(ratio, 2)
    outcome = "faster than" if two < 1 else "slower than" if two > 1 else "as fast as"
    return (
        f"Ours is **{outcome}** the fastest other way that was measured ({best['attention']}), "
        f"forward and backward in CUDA graphs: a ratio of {ratio:.2f}."
    )


def checks(card: Card) -> list[str]:
    """Counts and failures of the tests, and what the sanitizers say."""
    lines = []
    for step in expected_steps(card.is_rehearsal)["checks"]:
        rows = card.rows("checks", step)
        outcome = card.status("checks", step)
        if rows:
            row = rows[0]
            outcome = (
                row["outcome"] if "tests" in row else f"{row['calls']} calls, {row['summary']}"
            )
        lines += [f"`{step}`: {outcome}.", ""]
        failures = _failed_tests(rows)
        lines += [f"- `{row['tests']}`: {write_reason(row['outcome'])}" for row in failures]
        lines.append("")
    return lines


def _failed_tests(rows: list[Row]) -> list[Row]:
    """Of a step: its first row counts."""
    return [row for row in rows[1:] if "tests" in row]


def overview(card: Card) -> list[str]:
    rows = count_ends(card)
    return format_table(tuple(rows[0]), rows)


def undone(card: Card) -> list[str]:
    """All steps that did not get to their end, with their reasons."""
    if not card.records:
        return [f"Everything is {NOT_YET}."]
    lines = []
    for status in ("failed", "crashed", "hung", "cut off", "skipped"):
        records = [record for record in card.records.values() if record["status"] == status]
        if records:
            lines += [f"#### {status}", "", *write_records(records, card, with_section=True), ""]
    failures = sum(len(_failed_tests(record["rows"])) for record in card.of_section("checks"))
    if failures:
        lines.append(f"Failed tests, named above: {failures}.")
    return lines or ["Every step that began was done."]


def write_records(records: Iterable[Record], card: Card, with_section: bool = False) -> list[str]:
    """A line for each step that was not done."""
    lines = []
    for record in records:
        name = f"{record['section']}, {record['step']}" if with_section else record["step"]
        run = f" (run {record['run']})" if len(card.runs) > 1 else ""
        lines.append(f"- {name}{run}: {record['status']}: {write_reason(record['reason'])}")
    return lines
