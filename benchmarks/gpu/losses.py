"""Chapter of docs/gpu_results.md: where the time of a step goes, and what our kernels lose."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable

from benchmarks.gpu.findings import Card, name_missing
from benchmarks.gpu.headline import FUSED
from benchmarks.gpu.journal import Row
from benchmarks.gpu.kernels import OWN_KERNELS, PROFILED, WORKLOAD
from benchmarks.gpu.tables import format_table

TOTAL, OURS, UNLISTED = "all kernels", "moat_kernels", "not listed"
NAMED_ROWS, LAUNCH_ROWS = 15, 20
# Kinds by what is in a kernel's name, the first that fits.
_KINDS = {
    "optimiser": "multi_tensor|adam",
    "batch norm": "batch_?norm|bn_fw|bn_bw",
    "layer norm": "layer_?norm",
    "attention": "fmha|flash|attention|softmax|sdpa",
    "depthwise convolutions": "depthwise|grouped_direct",
    "products, convolutions": "gemm|cutlass|xmma|cublas|nvjet|conv|wgrad|dgrad|fprop",
    "copies, casts": "copy|memcpy|memset|tonhwc|tonchw|transpose|catarray",
    "reductions": "reduce",
    "elementwise": "elementwise|vectorized|foreach",
}
KINDS = (OURS, *_KINDS, "others", UNLISTED)


def profile(card: Card, step: str) -> list[Row]:
    """The rows of one profiled step; empty where there are none."""
    return card.rows("kernels", f"profile of {step}")


def kind_of(row: Row) -> str:
    """One of KINDS, or TOTAL."""
    name = row["kernel"]
    if name == TOTAL:
        return TOTAL
    if re.fullmatch(r"\d+ other kinds", name):
        return UNLISTED
    if is_ours(row):
        return OURS
    for kind, pattern in _KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "others"


def is_ours(row: Row) -> bool:
    """Whether its launcher declared what it moves, or its name is one of ours."""
    own = OWN_KERNELS.removeprefix("regex:")
    return (
        row["floor ms"] is not None
        or bool(re.match(own, row["kernel"]))
        or "moat_kernels" in row["kernel"]
    )


def by_kind(rows: Iterable[Row]) -> dict[str, float]:
    """Milliseconds of each of KINDS."""
    times: dict[str, float] = collections.Counter()
    for row in rows:
        times[kind_of(row)] += row["ms"]
    return {kind: times[kind] for kind in KINDS if kind in times}


def kernels(card: Card) -> list[str]:
    return [
        f"Of {WORKLOAD}, without CUDA graphs, as CUPTI counts. The floor of a kernel is the longer"
        " of its predicted bytes at the bandwidth of a copy and its products at the rate of large"
        " products, both as measured here; lost is what is above it.",
        "",
        *_sources(card),
        "#### Stock and fused steps by kind of kernel",
        "",
        *_kinds(card),
        "",
        "#### Our kernels against their floors",
        "",
        *_ours(card),
        "",
        "#### Our different launches, alone",
        "",
        *_launches(card),
        "",
        *(line for each in PROFILED for line in _named(card, each.name)),
    ]


def _sources(card: Card) -> list[str]:
    """Which run each step is of, where there are several."""
    if len(card.runs) < 2 or not card.of_section("kernels"):
        return []
    steps = (f"{record['step']}: run {record['run']}" for record in card.of_section("kernels"))
    return [f"{'; '.join(steps)}.", ""]


def _absent(card: Card, *steps: str) -> list[str]:
    return name_missing(card, "kernels", {step: step for step in steps})


def _kinds(card: Card) -> list[str]:
    profiles = {each.name: profile(card, each.name) for each in PROFILED}
    found = {step: rows for step, rows in profiles.items() if rows}
    gaps = _absent(card, *(f"profile of {step}" for step in profiles if step not in found))
    if not found:
        return gaps
    times = {step: by_kind(rows) for step, rows in found.items()}
    kinds = [kind for kind in KINDS if any(kind in mine for mine in times.values())]
    table = [
        {"kind": kind, **{f"{step}, ms": mine.get(kind) for step, mine in times.items()}}
        for kind in kinds
    ]
    totals = {step: row for step, rows in found.items() for row in rows if row["kernel"] == TOTAL}
    table.append({"kind": TOTAL, **{f"{step}, ms": row["ms"] for step, row in totals.items()}})
    launches = "; ".join(f"{step}: {row['launches']}" for step, row in totals.items())
    note = f"Launches of {launches}. Kinds are told by the first 60 characters of a kernel's name."
    return [*format_table(tuple(table[0]), table), "", note, "", *gaps]


def _ours(card: Card) -> list[str]:
    """A row for each kernel: within the step, alone, and as the hardware counts it."""
    inside = {row["kernel"]: row for row in profile(card, FUSED.name) if kind_of(row) == OURS}
    alone = sum_launches(card.rows("kernels", "alone"))
    counted = {row["kernel"]: row for row in card.rows("kernels", "counters")}
    steps = {f"profile of {FUSED.name}": inside, "alone": alone, "counters": counted}
    gaps = _absent(card, *(step for step, rows in steps.items() if not rows))
    names = dict.fromkeys([*inside, *alone, *counted])
    if not names:
        return gaps
    rows = []
    for name in names:
        a, b, c = inside.get(name, {}), alone.get(name, {}), counted.get(name, {})
        rows.append(
            {
                "kernel": f"`{name}`",
                "launches": a.get("launches", b.get("launches", c.get("launches"))),
                "in the step, ms": a.get("ms"),
                "floor, ms": a.get("floor ms", b.get("floor ms")),
                "lost, ms": a.get("lost ms"),
                "alone, ms": b.get("ms"),
                "lost alone, ms": b.get("lost ms"),
                "predicted GB": a.get("predicted GB", b.get("predicted GB")),
                "DRAM GB": c.get("DRAM GB"),
                "instructions, millions": c.get("instructions, millions"),
                "issue, ms": c.get("issue at full rate, ms"),
            }
        )
    rows.sort(key=lambda row: -(row["lost, ms"] or row["lost alone, ms"] or 0.0))
    lost = sum(row["lost ms"] or 0.0 for row in inside.values())
    sentence = [f"Together they lose {lost:.2f} ms of the step.", ""] if inside else []
    note = (
        "Alone: each launch by itself with cold caches, times its number in a step. DRAM,"
        " instructions and issue: by Nsight Compute; issue is what the instructions take on 132"
        " multiprocessors at 1.755 GHz, four each clock."
    )
    table = format_table(tuple(rows[0]), rows)
    return [*sentence, *table, "", note, "", *gaps]


def sum_launches(rows: Iterable[Row]) -> dict[str, Row]:
    """The step `alone` by kernel, of all launches in a training step."""
    found: dict[str, Row] = {}
    for row in rows:
        mine = found.setdefault(
            row["kernel"],
            {"launches": 0, "ms": 0.0, "floor ms": 0.0, "lost ms": 0.0, "predicted GB": 0.0},
        )
        count = row["in a step"]
        mine["launches"] += count
        mine["ms"] += 1e-3 * count * row["µs"]
        mine["floor ms"] += 1e-3 * count * row["floor µs"]
        mine["lost ms"] += row["lost in a step, ms"]
        mine["predicted GB"] += 1e-3 * count * row["predicted MB"]
    return found


def _launches(card: Card) -> list[str]:
    rows = sorted(card.rows("kernels", "alone"), key=lambda row: -row["lost in a step, ms"])
    if not rows:
        return _absent(card, "alone")
    shown = [{**row, "kernel": f"`{row['kernel']}`"} for row in rows[:LAUNCH_ROWS]]
    sentence = f"{len(rows)} in all; those that lose the most, at most {LAUNCH_ROWS}:"
    return [sentence, "", *format_table(tuple(shown[0]), shown)]


def _named(card: Card, step: str) -> list[str]:
    heading = [f"#### Kernels of the step: {step}", ""]
    rows = [row for row in profile(card, step) if kind_of(row) not in (TOTAL, UNLISTED)]
    if not rows:
        return [*heading, *_absent(card, f"profile of {step}")]
    shown = [{**row, "kernel": f"`{row['kernel']}`"} for row in rows[:NAMED_ROWS]]
    columns = ("kernel", "launches", "ms", "TB/s", "TFLOP/s", "floor ms", "lost ms")
    filled = tuple(name for name in columns if any(row[name] is not None for row in shown))
    return [*heading, *format_table(filled, shown), ""]
