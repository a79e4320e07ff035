"""Chapters of docs/gpu_results.md: stock and fused models, and what tuned launches change."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu import headline
from benchmarks.gpu.findings import NOT_YET, Card, expected_steps, name_missing
from benchmarks.gpu.journal import Row
from benchmarks.gpu.tables import format_table

TUNED_ROWS = 20
_RATIOS = "to stock", "to the fastest stock way"


def expected(rehearsal: bool) -> dict[str, list[str]]:
    """The contenders of each workload, those of stock first, "stock" before all."""
    found: dict[str, list[str]] = {}
    for workload, contender, _ in headline.pairs(rehearsal):
        found.setdefault(str(workload), []).append(contender.name)
    return {name: sorted(contenders, key=_is_fused) for name, contenders in found.items()}


def _is_fused(contender: str) -> bool:
    return contender.startswith("fused")


def measured(card: Card, workload: str, contenders: Sequence[str], section: str) -> list[Row]:
    """The rows of a workload, in the order of contenders."""
    return [
        row for contender in contenders for row in card.rows(section, f"{workload}: {contender}")
    ]


def fastest(rows: Sequence[Row], fused: bool) -> Row | None:
    mine = [row for row in rows if _is_fused(row["contender"]) == fused]
    return min(mine, key=lambda row: row["ms"], default=None)


def judge(ours: Row | None, stock: Row | None) -> str:
    """Whether the fastest fused way is faster than the fastest stock way."""
    if ours is None or stock is None:
        return NOT_YET
    ratio = round(ours["ms"] / stock["ms"], 2)
    return "faster" if ratio < 1 else "slower" if ratio > 1 else "as fast"


def _name(row: Row | None) -> str:
    """Of a contender, with its run where there are several."""
    if row is None:
        return NOT_YET
    return f"{row['contender']} (run {row['run']})" if "run" in row else row["contender"]


def models(card: Card) -> list[str]:
    """A row for each workload, then a table of each."""
    summary, chapters = [], []
    for workload, contenders in expected(card.is_rehearsal).items():
        rows = measured(card, workload, contenders, "headline")
        ours, stock = fastest(rows, fused=True), fastest(rows, fused=False)
        summary.append(
            {
                "workload": workload,
                "fastest stock way": _name(stock),
                "stock, ms": None if stock is None else stock["ms"],
                "fastest fused way": _name(ours),
                "fused, ms": None if ours is None else ours["ms"],
                "fused / stock": None if not (ours and stock) else ours["ms"] / stock["ms"],
                "fused is": judge(ours, stock),
                "stock ways without a number": sum(
                    not _is_fused(name) and all(name != row["contender"] for row in rows)
                    for name in contenders
                ),
            }
        )
        chapters += [f"#### {workload}", "", *_workload(card, workload, contenders, rows)]
    return [
        "bfloat16 autocast, channels_last; a training step is forward, backward and AdamW. Ratios"
        " are of times (memory: of peaks), below 1 is better. The peak of what a CUDA graph, or"
        " max-autotune, captured is not counted. The fastest way is that of those with a number.",
        "",
        *format_table(tuple(summary[0]), summary),
        "",
        *chapters,
    ]


def _workload(
    card: Card, workload: str, contenders: Sequence[str], rows: Sequence[Row]
) -> list[str]:
    if not rows:
        table, sentence = [], ""
    else:
        compared = compare(rows, rows)
        table, sentence = [*format_table(tuple(compared[0]), compared), ""], _say(rows)
    found = {row["contender"] for row in rows}
    missing = {name: f"{workload}: {name}" for name in contenders if name not in found}
    gaps = name_missing(card, "headline", missing)
    return [sentence or f"Fused against stock: {NOT_YET}.", "", *table, *gaps]


def compare(rows: Sequence[Row], against: Sequence[Row]) -> list[Row]:
    """Rows with their ratios to the stock ones of `against`; None where there is none."""
    stock = next((row for row in against if row["contender"] == "stock"), None)
    best = fastest(against, fused=False)
    return [
        {
            "contender": row["contender"],
            "ms": row["ms"],
            "images/s": row["images/s"],
            _RATIOS[0]: _ratio(row, stock, "ms"),
            _RATIOS[1]: _ratio(row, best, "ms"),
            "peak, GiB": row["peak, GiB"],
            "peak, to stock": _ratio(row, stock, "peak, GiB"),
            **({"run": row["run"]} if "run" in row else {}),
        }
        for row in rows
    ]


def _ratio(row: Row, to: Row | None, key: str) -> float | None:
    if to is None or row[key] is None or to[key] is None:
        return None
    return row[key] / to[key]


def _say(rows: Sequence[Row]) -> str:
    ours, stock = fastest(rows, fused=True), fastest(rows, fused=False)
    outcome = judge(ours, stock)
    if ours is None or stock is None:
        return f"Fused against stock: {outcome}."
    than = "as the" if outcome == "as fast" else "than the"
    return (
        f"Fused is **{outcome}** {than} fastest stock way that was measured: "
        f"`{_name(ours)}` takes {ours['ms']:.2f} ms, `{_name(stock)}` "
        f"{stock['ms']:.2f} ms, a ratio of {ours['ms'] / stock['ms']:.2f}."
    )


def tuning(card: Card) -> list[str]:
    """The entries that `tune` measured, and models with them."""
    rows = card.rows("tune")
    status = card.status("tune", "tune")
    ended = [] if status == "done" else ["", f"The search: {status}."]
    return [*(_entries(rows) if rows else []), *ended, "", *_tuned(card)]


def _entries(rows: list[Row]) -> list[str]:
    static, tuned = (sum(row[f"{name}, µs"] for row in rows) for name in ("static", "tuned"))
    gained = [
        {**row, "kernel": f"`{row['kernel']}`", "gain, µs": gain}
        for row in rows
        if (gain := row["static, µs"] - row["tuned, µs"]) > 0
    ]
    gained.sort(key=lambda row: -row["gain, µs"])
    lines = [
        f"{len(rows)} launches were measured, {len(gained)} of them became faster. One call of each"
        f" takes {static:.0f} µs with the static table and {tuned:.0f} µs with the measured one"
        f" ({tuned / static:.2f} times). Those that gain the most, at most {TUNED_ROWS}:"
    ]
    shown = gained[:TUNED_ROWS]
    return [*lines, "", *(format_table(tuple(shown[0]), shown) if shown else ["None."])]


def _untuned(card: Card, workload: str, tuned: Row) -> Row | None:
    """The same contender with the static table in the same run: later ones have other kernels."""
    step = f"{workload}: {tuned['contender']}"
    for run in card.runs:
        if run.number == tuned.get("run", run.number):
            for record in run.records:
                if (record["section"], record["step"]) == ("headline", step) and record["rows"]:
                    return record["rows"][0]
    return None


def _tuned(card: Card) -> list[str]:
    rows = []
    # The section `tuned` has the same workloads in a rehearsal.
    for workload, contenders in expected(rehearsal=False).items():
        stock = measured(card, workload, contenders, "headline")
        for row in compare(measured(card, workload, contenders, "tuned"), stock):
            untuned = _untuned(card, workload, row)
            rows.append(
                {
                    "workload": workload,
                    "contender": row["contender"],
                    "untuned, ms": None if untuned is None else untuned["ms"],
                    "tuned, ms": row["ms"],
                    "tuned / untuned": _ratio(row, untuned, "ms"),
                    _RATIOS[1]: row[_RATIOS[1]],
                    **({"run": row["run"]} if "run" in row else {}),
                }
            )
    found = {f"{row['workload']}: {row['contender']}" for row in rows}
    steps = expected_steps(card.is_rehearsal)["tuned"]
    missing = {step: step for step in steps if step not in found}
    return [
        "Models with these launches:",
        "",
        *(format_table(tuple(rows[0]), rows) if rows else []),
        "",
        *name_missing(card, "tuned", missing),
    ]
