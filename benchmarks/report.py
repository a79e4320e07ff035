"""Turn benchmark results into the tables of benchmarks/RESULTS.md and the README's charts.

    pytest benchmarks/ --benchmark-only --benchmark-json build/benchmarks.json
    python benchmarks/report.py build/benchmarks.json

It reads the JSON lines of `--results` as well. RESULTS.md and the charts are a CPU's: results of a
GPU go to the files named by `--tables` and `--charts`.

Times are the interleaved medians that every benchmark records (interleaved.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charts import DARK, DIM, GREY, LIGHT, draw_bars, save, title, title_beside
from results import MEBIBYTE, Groups, Results, describe, is_gpu, load
from size_chart import charted_sizes, draw_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).parent
TABLES, CHARTS = HERE / "RESULTS.md", HERE.parent / "docs"

HEAD = """# Benchmark results

Made by `pytest benchmarks/ --benchmark-only` and `python benchmarks/report.py`; do not edit. All of
other people's models ("adapters") take part with `--full`.

Measured on: {machine}. Contenders take turns in one process; medians. 'stock / this' compares with
the faster of the stock rows; 'over floor' with the bare matrix products alone, by torch.mm (of the
stem: its two convolutions); 'of peak' with {peak:.0f} GFLOP/s, the most that a large matrix product
reached here; 'logit error' is the largest over the largest logit, against the stock model in
float64. {notes}
"""
CPU_NOTES = """'Peak of a call' is the growth of the resident set; runtimes that keep their memory
between calls have none. 'frozen' rows are models made by `freeze`. A row called bfloat16 or int8
multiplies in that; 'OpenVINO' does in its own default, bfloat16 where the CPU can."""
GPU_NOTES = """'Peak of a call' is what PyTorch's allocator gave out at most, beyond what there was
before. Times are by CUDA events, of calls that follow each other without waiting; each table was
measured in a process of its own."""
COLUMNS = (
    *("", "ms", "stock / this", "over floor", "GFLOP/s", "of peak"),
    *("saved for backward", "peak of a call", "logit error", "ms / megapixel"),
)

CHARTED_MODELS = ("tiny_moat_0", "moat_0")
# Held back for the targets' sake: users run OpenVINO as it comes.
NOT_CHARTED = ("OpenVINO float32",)


def format_group(
    name: str, rows: dict[str, dict], failures: dict[str, str], peak_gflops: float
) -> str:
    """One Markdown table, and below it who failed, with the first line of the reason."""
    stock = min(
        (rows[key]["interleaved_ms"] for key in ("stock", "stock channels_last") if key in rows),
        default=None,
    )
    lines = [f"## {name}", "", f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}"]
    for key, info in rows.items():
        cells = (
            key,
            f"{info['interleaved_ms']:.2f}",
            "" if stock is None else f"{stock / info['interleaved_ms']:.2f}",
            f"{info['time_over_floor']:.2f}" if "time_over_floor" in info else "",
            f"{info['gflops']:.1f}" if "gflops" in info else "",
            f"{info['gflops'] / peak_gflops:.0%}" if "gflops" in info else "",
            format_bytes(info.get("saved_bytes")),
            format_bytes(info.get("peak_bytes")),
            f"{info['logit_error']:.1e}" if "logit_error" in info else "",
            f"{info['ms_per_megapixel']:.0f}" if "ms_per_megapixel" in info else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    for key, reason in failures.items():
        lines += ["", f"{key} failed: `{reason.splitlines()[0]}`"]
    return "\n".join(lines)


def format_bytes(number: int | None) -> str:
    return "" if number is None else f"{number / MEBIBYTE:.1f} MiB"


def write_tables(results: Results, path: Path) -> None:
    """All groups as Markdown, with what was measured and how."""
    groups, facts, failures = results
    peak = max(
        (info.get("peak_gflops", 0) for rows in groups.values() for info in rows.values()),
        default=0,
    )
    notes = GPU_NOTES if is_gpu(facts) else CPU_NOTES
    head = HEAD.format(machine=describe(facts), peak=peak, notes=notes)
    tables = "\n\n".join(
        format_group(name, groups.get(name, {}), failures.get(name, {}), peak)
        for name in dict.fromkeys((*groups, *failures))
    )
    path.write_text(f"{head}\n{tables}\n")


def charted(groups: Groups, mode: str) -> Groups:
    """The groups of the charted models, by "variant, batch size"."""
    found = {}
    for name, rows in groups.items():
        if name.startswith(f"model {mode} ") and name.split()[2] in CHARTED_MODELS:
            _, _, model, resolution, _, batch = name.split()
            found[f"{model} at {resolution} px, batch {batch}"] = {
                key: info for key, info in rows.items() if key not in NOT_CHARTED
            }
    return found


def describe_contender(name: str) -> tuple[str, str]:
    """(label, colour) of a row in a chart."""
    kind = name.removesuffix(" bfloat16")
    label, colour = _describe_kind(kind)
    return (label if kind == name else f"{label}, bfloat16"), colour


def _describe_kind(name: str) -> tuple[str, str]:
    backend, _, level = name.partition(" ")
    if backend == "stock":
        labels = {"checkpoint": "stock, every block checkpointed"}
        return labels.get(level, f"stock, {level}" if level else "stock"), GREY
    if name == "OpenVINO":
        return "OpenVINO, its default precision", DIM
    kinds = {
        "torch": ("fused, stock operations", LIGHT),
        "cpu": ("fused, native CPU", DARK),
        "triton": ("fused, Triton", DARK),
    }
    if backend not in kinds:
        return name, DIM
    label, colour = kinds[backend]
    if level.startswith("frozen"):
        return ", ".join((label, *level.split())), colour
    return f'{label}, recompute="{level}"' if level else label, colour


def draw_training(groups: Groups, facts: dict[str, Any], path: Path) -> None:
    """Training step of whole models: time, bytes saved for backward and peak, per contender."""
    from matplotlib.figure import Figure  # not pyplot: it looks for a display

    rows = sum(map(len, groups.values()))
    figure = Figure(figsize=(12, 1.2 * len(groups) + 0.3 * rows))
    axes = figure.subplots(
        len(groups),
        3,
        squeeze=False,
        width_ratios=(1, 0.8, 0.8),
        height_ratios=[len(contenders) for contenders in groups.values()],
    )
    for (times, saved, peak), (name, contenders) in zip(axes, groups.items(), strict=True):
        draw_contenders(times, contenders, "interleaved_ms", 1e-3, "{:.2f} s")
        draw_contenders(saved, contenders, "saved_bytes", 1 / MEBIBYTE, "{:.0f} MiB")
        draw_contenders(peak, contenders, "peak_bytes", 1 / MEBIBYTE, "{:.0f} MiB")
        title(times, "time of a training step")
        title_beside(times, name)
        title(saved, "kept for the backward pass")
        title(peak, "peak of a step")
        for axis in (saved, peak):
            axis.set_yticklabels([])
    save(figure, describe(facts), path)


def draw_eval(groups: Groups, facts: dict[str, Any], path: Path) -> None:
    """Eval of whole models: time per call, per contender."""
    from matplotlib.figure import Figure

    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    most = max(map(len, groups.values()))
    figure = Figure(figsize=(1 + 6 * columns, lines * (1.1 + 0.3 * most)))
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    for axis, (name, contenders) in zip(axes[: len(groups)], groups.items(), strict=True):
        draw_contenders(axis, contenders, "interleaved_ms", 1.0, "{:.1f} ms")
        title(axis, name)
    save(figure, describe(facts), path)


def draw_contenders(axis: Axes, rows: dict[str, dict], key: str, unit: float, text: str) -> None:
    """Horizontal bars of info[key] * unit."""
    labels, colours = zip(*map(describe_contender, rows), strict=True)
    values = [(info.get(key) or 0) * unit for info in rows.values()]
    draw_bars(axis, labels, colours, values, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "results", type=Path, nargs="+", help="JSON files of pytest-benchmark, or .jsonl"
    )
    parser.add_argument("--tables", type=Path, help=f"default: {TABLES.name} beside this")
    parser.add_argument("--charts", type=Path, help=f"their folder; default: {CHARTS.name}")
    options = parser.parse_args()
    merged = Results({}, {}, {})
    for path in options.results:
        results = load(path)
        merged.groups.update(results.groups)
        merged.failures.update(results.failures)
        merged.facts.update(results.facts)
    if is_gpu(merged.facts) and None in (options.tables, options.charts):
        parser.error("results of a GPU need --tables FILE and --charts FOLDER")
    write_tables(merged, options.tables or TABLES)
    for mode, draw in (("training", draw_training), ("eval", draw_eval)):
        if models := charted(merged.groups, mode):
            draw(models, merged.facts, (options.charts or CHARTS) / f"{mode}.png")
    if sizes := charted_sizes(merged.groups):
        draw_sizes(sizes, merged.facts, (options.charts or CHARTS) / "sizes.png")


if __name__ == "__main__":
    main()
