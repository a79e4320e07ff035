"""Turn benchmark results into the tables of benchmarks/RESULTS.md and the README's chart.

    pytest benchmarks/ --benchmark-only --benchmark-json results.json
    python benchmarks/report.py results.json

Times are the interleaved medians that every benchmark records (interleaved.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MEBIBYTE = 2**20

# Rows of the same kind keep their colour in every chart.
GREY, LIGHT, DARK = "#8b929e", "#f0a67f", "#d9480f"


def load_groups(path: Path) -> tuple[dict[str, dict[str, dict]], dict[str, Any]]:
    """({group: {contender: extra_info}}, the machine's facts) of a pytest-benchmark JSON file."""
    contents = json.loads(path.read_text())
    groups: dict[str, dict[str, dict]] = {}
    for entry in contents["benchmarks"]:
        info = entry["extra_info"]
        groups.setdefault(entry["group"], {})[info["contender"]] = info
    return groups, contents["machine_info"]["moat_kernels"]


def format_group(name: str, rows: dict[str, dict]) -> str:
    """One Markdown table: time, ratio to the better stock row, GFLOP/s, floor, saved bytes."""
    stock = min(
        (info["interleaved_ms"] for key, info in rows.items() if key.startswith("stock")),
        default=None,
    )
    lines = [
        f"### {name}",
        "",
        "| | ms | stock / this | over floor | GFLOP/s | saved for backward |",
    ]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for key, info in rows.items():
        faster = "" if stock is None else f"{stock / info['interleaved_ms']:.2f}"
        floor = f"{info['time_over_floor']:.2f}" if "time_over_floor" in info else ""
        saved = f"{info['saved_bytes'] / MEBIBYTE:.1f} MiB" if "saved_bytes" in info else ""
        lines.append(
            f"| {key} | {info['interleaved_ms']:.1f} | {faster} | {floor} "
            f"| {info['gflops']:.1f} | {saved} |"
        )
    return "\n".join(lines)


def describe(facts: dict[str, Any]) -> str:
    """The machine and the versions, in one line."""
    cpu, versions = facts["cpu"], facts["versions"]
    features = ", ".join(feature for feature in cpu["features"] if feature.startswith("avx"))
    return (
        f"{cpu['name']} ({features}), {cpu['threads']} threads, torch {versions['torch']}, "
        f"moat_kernels {versions['moat_kernels']}; float32; no GPU was used"
    )


def write_tables(groups: dict[str, dict[str, dict]], facts: dict[str, Any], path: Path) -> None:
    """All groups as Markdown, with what was measured and how."""
    head = (
        "# Benchmark results\n\nMade by `pytest benchmarks/ --benchmark-only` and "
        "`python benchmarks/report.py`; do not edit.\n\n"
        f"Measured on: {describe(facts)}. Contenders take turns in one process; medians. "
        "'stock / this' compares with the faster stock row; 'over floor' with the bare matrix "
        "products alone.\n"
    )
    tables = "\n\n".join(format_group(name, rows) for name, rows in groups.items())
    path.write_text(f"{head}\n{tables}\n")


def training_groups(groups: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """The whole-model training groups by variant."""
    return {
        name.split()[2]: rows for name, rows in groups.items() if name.startswith("model training")
    }


def describe_contender(name: str) -> tuple[str, str]:
    """(label, colour) of a contender of the training groups."""
    backend, _, level = name.partition(" ")
    if backend == "stock":
        return f"stock, {level}" if level else "stock", GREY
    kind, colour = {"torch": ("torch", LIGHT), "cpu": ("native CPU", DARK)}[backend]
    return f'fused, {kind}, recompute="{level}"', colour


def draw_chart(groups: dict[str, dict[str, dict]], facts: dict[str, Any], path: Path) -> None:
    """Training step of whole models: time and bytes saved for backward, per contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = training_groups(groups)
    figure, axes = pyplot.subplots(
        len(models), 2, figsize=(11, 0.9 + 3 * len(models)), squeeze=False, width_ratios=(1, 0.8)
    )
    for (time_axis, memory_axis), (model, contenders) in zip(axes, models.items(), strict=True):
        labels, colours = zip(*map(describe_contender, contenders), strict=True)
        seconds = [info["interleaved_ms"] / 1e3 for info in contenders.values()]
        saved = [info["saved_bytes"] / MEBIBYTE for info in contenders.values()]
        draw_bars(time_axis, labels, seconds, colours, "{:.2f} s")
        draw_bars(memory_axis, [""] * len(saved), saved, colours, "{:.0f} MiB")
        title(time_axis, f"{model}, batch 8: time of a training step")
        title(memory_axis, "kept for the backward pass")
    figure.text(0.01, 0.015, describe(facts), size=8, color=GREY)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def title(axis, text: str) -> None:
    axis.set_title(text, loc="left", size=11, weight="bold")


def draw_bars(
    axis, names: Sequence[str], values: list[float], colours: Sequence[str], text: str
) -> None:
    """Horizontal bars from top to bottom, each labelled with its value and share of the first."""
    positions = range(len(values))
    axis.barh(positions, values, color=colours, height=0.68)
    axis.set_yticks(positions, names)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.set_xlim(0, 1.3 * max(values))
    axis.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    for position, value in zip(positions, values, strict=True):
        share = f"  ({value / values[0]:.2f}×)" if position else ""
        axis.text(value, position, f" {text.format(value)}{share}", va="center", size=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the JSON file of pytest-benchmark")
    parser.add_argument("--tables", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--chart", type=Path, default=HERE.parent / "docs" / "training.png")
    options = parser.parse_args()
    groups, facts = load_groups(options.results)
    write_tables(groups, facts, options.tables)
    if training_groups(groups):
        draw_chart(groups, facts, options.chart)


if __name__ == "__main__":
    main()
