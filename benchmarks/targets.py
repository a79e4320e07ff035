"""How far this machine is from the project's targets: `make targets`.

Takes what the newest benchmark results hold (build/benchmarks.json of `make bench`, and what this
program measured before), measures what is missing, and prints a table. Only what the benchmarks
measure by default is measured, unless --full is given (an hour and more on two cores).

All targets are those of the native CPU kernels: a GPU is neither measured nor looked up.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bench_host_time
import bench_mbconv
import bench_models
import bench_reading
import bench_sizes
import bench_window_attention
import torch
from interleaved import Comparison, Row
from machine import facts
from results import Groups, is_gpu, load
from shapes import ATTENTION_MAPS, LARGE_MODELS, MODELS, OTHER_BLOCKS, PLAIN_BLOCKS, TRAINING_BATCH

BUILD = Path(__file__).parents[1] / "build"
BENCHMARKS, MEASURED = BUILD / "benchmarks.json", BUILD / "targets.json"

TIME, SAVED, ERROR = "interleaved_ms", "saved_bytes", "logit_error"
PEAK, TIME_OF_PIXELS = "peak_bytes", "ms_per_megapixel"
STOCK = ("stock", "stock channels_last")


@dataclass(frozen=True)
class Target:
    """One row. `over` compares with the least of several rows.

    at_most: ours / over is at most this. at_least: over / ours, the speedup, is at least this.
    """

    section: str
    group: str
    quantity: str
    ours: str
    over: tuple[str, ...]
    at_most: float | None = None
    at_least: float | None = None

    @property
    def contenders(self) -> tuple[str, ...]:
        return (self.ours, *self.over)

    def measure(self, rows: dict[str, dict]) -> float | None:
        """The ratio that has the target; None where a row is missing."""
        if any(name not in rows for name in self.contenders):
            return None
        ours = rows[self.ours][self.quantity]
        over = min(rows[name][self.quantity] for name in self.over)
        return ours / over if self.at_most is not None else over / ours

    def met(self, ratio: float) -> bool:
        return ratio <= self.at_most if self.at_most is not None else ratio >= self.at_least

    @property
    def bound(self) -> str:
        return f"<= {self.at_most:.2f}" if self.at_most is not None else f">= {self.at_least:.2f}"


def eval_limit(channels: int) -> float:
    """Of a block's time over its bare products: few channels leave little to multiply."""
    return next(
        limit
        for least, limit in ((192, 1.05), (96, 1.10), (64, 1.25), (0, 1.40))
        if channels >= least
    )


def training_limit(channels: int) -> float:
    return 1.15 if channels >= 96 else 1.40


def block_targets() -> list[Target]:
    """Over both floors: the one by oneDNN is the lower one on AMD's processors (floor.py)."""
    floors = {"torch.mm": "floor", "oneDNN": "floor, oneDNN"}
    eval_targets = [
        Target(
            f"eval block, time over its matrix products by {name}",
            *(f"mbconv eval {block} batch {batch}", TIME, "cpu", (floor,)),
            at_most=eval_limit(block.out_channels),
        )
        for name, floor in floors.items()
        for batch in (1, 8)
        for block in (*PLAIN_BLOCKS, *OTHER_BLOCKS)
    ]
    return eval_targets + [
        Target(
            f"training block, time over six matrix products by {name}",
            *(f"mbconv training {block} batch {TRAINING_BATCH}", TIME, "cpu auto", (floor,)),
            at_most=training_limit(block.out_channels),
        )
        for name, floor in floors.items()
        for block in PLAIN_BLOCKS
    ]


def attention_targets() -> list[Target]:
    return [
        Target(
            f"attention, forward and backward, speedup over {over}",
            *(f"window_attention training {attention_map} batch {TRAINING_BATCH}", TIME, "cpu"),
            (over,),
            at_least=least,
        )
        for over, least in (("scaled_dot_product_attention", 2.5), ("torch.compile", 2.0))
        for attention_map in ATTENTION_MAPS
    ]


# Raised once they were easy: docs/cpu_kernels.md says from what. Speedups of the variants that are
# not named are the least.
RUNTIMES = ("OpenVINO float32", "ONNX Runtime", "torch.compile")
EVAL_SPEEDUPS, LEAST_EVAL_SPEEDUP = {"tiny_moat_0": 1.30, "moat_0": 1.15}, 1.10
# Of frozen models in low precision, over OpenVINO as it comes and over float32.
BFLOAT16_SPEEDUPS, LEAST_BFLOAT16_SPEEDUP = {"tiny_moat_0": 1.25, "moat_0": 1.15}, 1.10
BFLOAT16_OVER_FLOAT32 = {"tiny_moat_0": 1.40, "moat_0": 1.60}
INT8_SPEEDUP = 1.10
TRAINING_SPEEDUPS, LEAST_TRAINING_SPEEDUP = {"tiny_moat_0": 1.9, "moat_0": 1.6}, 1.5
# Under autocast to bfloat16, over our own step in float32 and over the others under autocast, and
# what is saved over float32's: half, but for statistics, and softmax's sums and moments of rows.
AUTOCAST_OVER_FLOAT32 = {"tiny_moat_0": 1.40, "moat_0": 1.40}
LEAST_AUTOCAST_SPEEDUP, AUTOCAST_SAVED = 1.5, 0.51
SAVED_LIMITS = {"cpu auto": 0.40, "cpu expand": 0.22, "cpu block": 0.10}


def low_precision_targets() -> list[Target]:
    """Of the two smallest models at batch 1 and 8, of the others at batch 1."""
    groups = {
        f"model eval {model} batch {batch}": model.name
        for batch in (1, 8)
        for model in MODELS
        if batch == 1 or model.name in BFLOAT16_OVER_FLOAT32
    }

    def speedup(group: str, ours: str, over: str, least: float) -> Target:
        section = f"model eval, {ours}, speedup over {over}"
        return Target(section, group, TIME, ours, (over,), at_least=least)

    bfloat16, int8 = "cpu frozen bfloat16", "cpu frozen int8"
    return [
        *(
            speedup(
                *(group, bfloat16, "OpenVINO"),
                BFLOAT16_SPEEDUPS.get(name, LEAST_BFLOAT16_SPEEDUP),
            )
            for group, name in groups.items()
        ),
        *(
            speedup(group, bfloat16, "cpu frozen", BFLOAT16_OVER_FLOAT32[name])
            for group, name in groups.items()
            if name in BFLOAT16_OVER_FLOAT32
        ),
        *(speedup(group, int8, "OpenVINO int8", INT8_SPEEDUP) for group in groups),
        *(
            Target(
                f"model eval, {int8}, logit error over that of OpenVINO int8",
                *(group, ERROR, int8, ("OpenVINO int8",)),
                at_most=1.0,
            )
            for group in groups
        ),
    ]


def autocast_targets() -> list[Target]:
    ours = "cpu auto bfloat16"
    rivals = ("stock channels_last bfloat16", "torch.compile bfloat16")
    groups = {
        f"model training {model} batch {model.training_batch}": AUTOCAST_OVER_FLOAT32[model.name]
        for model in MODELS
        if model.name in AUTOCAST_OVER_FLOAT32
    }

    def speedup(group: str, over: str, contenders: tuple[str, ...], least: float) -> Target:
        section = f"model training step, {ours}, speedup over {over}"
        return Target(section, group, TIME, ours, contenders, at_least=least)

    return [
        *(speedup(group, "cpu auto", ("cpu auto",), least) for group, least in groups.items()),
        *(
            speedup(group, "the fastest of the others", rivals, LEAST_AUTOCAST_SPEEDUP)
            for group in groups
        ),
        *(
            Target(
                f"saved for backward over cpu auto, {ours}",
                *(group, SAVED, ours, ("cpu auto",), AUTOCAST_SAVED),
            )
            for group in groups
        ),
    ]


def model_targets() -> list[Target]:
    targets = [
        Target(
            f"model eval, both with weights prepared once, speedup over {runtime}",
            *(f"model eval {model} batch {batch}", TIME, "cpu frozen", (runtime,)),
            at_least=EVAL_SPEEDUPS.get(model.name, LEAST_EVAL_SPEEDUP),
        )
        for runtime in RUNTIMES
        for batch in (1, 8)
        for model in MODELS
        if batch == 1 or model.name not in LARGE_MODELS
    ]
    groups = {f"model training {model} batch {model.training_batch}": model for model in MODELS}
    targets += [
        Target(
            "model training step, speedup over the fastest of eager and torch.compile",
            *(group, TIME, "cpu auto", (*STOCK, "torch.compile")),
            at_least=TRAINING_SPEEDUPS.get(model.name, LEAST_TRAINING_SPEEDUP),
        )
        for group, model in groups.items()
    ]
    for level, limit in SAVED_LIMITS.items():
        targets += [
            Target(f"saved for backward over eager, {level}", group, SAVED, level, STOCK, limit)
            for group in groups
        ]
    return targets + [
        Target(
            "saved for backward over torch.compile, cpu auto",
            *(group, SAVED, "cpu auto", ("torch.compile",)),
            at_most=1.0,
        )
        for group in groups
    ]


def size_targets() -> list[Target]:
    """Of backbones for dense prediction: the same time for a pixel at every size."""
    smallest, largest = bench_sizes.SIZES[0], bench_sizes.SIZES[-1]
    ours = {"eval": ("cpu", "cpu frozen", "cpu frozen bfloat16"), "training": ("cpu auto",)}
    return [
        *(
            Target(
                f"backbone {mode}, {kind}, time of a pixel at {largest} over that at {smallest}",
                *(f"sizes {mode} {name}", TIME_OF_PIXELS, f"{kind}, {largest}"),
                (f"{kind}, {smallest}",),
                at_most=1.15,
            )
            for mode, kinds in ours.items()
            for kind in kinds
            for name in bench_sizes.VARIANTS
        ),
        *(
            Target(
                f"backbone training, cpu auto, peak of a step at {size} over stock's",
                *(f"sizes training {name}", PEAK, f"cpu auto, {size}"),
                (f"{bench_sizes.STOCK}, {size}",),
                at_most=0.5,
            )
            for name in bench_sizes.VARIANTS
            for size in bench_sizes.SIZES[1:]
        ),
        *(
            Target(
                "frozen backbone, two maps over the last alone",
                *(comparison.name, TIME, "two maps", ("last map",)),
                at_most=1.05,
            )
            for comparison in bench_sizes.MAPS_OF_FROZEN
        ),
    ]


READING_TARGET = Target(
    "reading the modules, over an eval call",
    *(bench_reading.READING[0].name, TIME, "reading", ("model",)),
    at_most=0.05,
)
HOST_TARGET = Target(
    "host time of a block on a GPU, over stock's",
    *(bench_host_time.HOST_TIME[0].name, TIME, "fused", ("stock",)),
    at_most=0.5,
)
TARGETS = [
    *(*block_targets(), *attention_targets(), *low_precision_targets(), *model_targets()),
    *(*autocast_targets(), *size_targets(), READING_TARGET, HOST_TARGET),
]
COMPARISONS = {
    comparison.name: comparison
    for comparison in (
        *(*bench_mbconv.EVAL, *bench_mbconv.TRAINING),
        *(*bench_window_attention.TRAINING, *bench_models.EVAL, *bench_models.TRAINING),
        *(*bench_sizes.EVAL, *bench_sizes.TRAINING, *bench_sizes.MAPS_OF_FROZEN),
        *(*bench_reading.READING, *bench_host_time.HOST_TIME),
    )
}


def needed(group: str) -> tuple[str, ...]:
    """The contenders that the targets of a group compare, as far as they can run here."""
    comparison = COMPARISONS[group]
    wanted = {name for target in TARGETS if target.group == group for name in target.contenders}
    return tuple(name for name in (*comparison.contenders, *comparison.slow) if name in wanted)


def find(group: str, results: Sequence[Groups]) -> dict[str, dict] | None:
    """The first result that has most of what is needed: only rows of one run can be compared."""
    wanted = set(needed(group))
    candidates = [groups[group] for groups in results if wanted & set(groups.get(group, ()))]
    return max(candidates, key=lambda rows: len(wanted & set(rows)), default=None)


def measure(comparison: Comparison) -> dict[str, dict]:
    """extra_info of all contenders needed, as the benchmarks record it; not of those that fail."""
    rows: dict[str, Row] = {}

    def report(row: Row) -> None:
        if "failure" in row:
            print(f"{row['contender']} failed: {row['failure']}", file=sys.stderr)
        else:
            rows[row["contender"]] = row

    comparison.measure(needed(comparison.name), report)
    return rows


def save(groups: Groups) -> None:
    """As pytest-benchmark does, so that one program reads both."""
    entries = [
        {"group": group, "extra_info": info}
        for group, rows in groups.items()
        for info in rows.values()
    ]
    contents = {"benchmarks": entries, "machine_info": {"moat_kernels": facts()}}
    MEASURED.parent.mkdir(exist_ok=True)
    MEASURED.write_text(json.dumps(contents, indent=1) + "\n")


def format_table(targets: Sequence[Target], found: Groups) -> str:
    """The targets with what was measured, by section."""
    lines, section, met, measured = [], "", 0, 0
    for target in targets:
        if target.section != section:
            section = target.section
            lines += ["", section]
        rows = found.get(target.group, {})
        ratio = target.measure(rows)
        if ratio is None:
            cells = ("not measured", "", "")
        else:
            measured += 1
            met += target.met(ratio)
            info = rows[target.ours]
            where = f"{info['device']}, {info['instruction_set']}, {info['threads']} threads"
            cells = (f"{ratio:.2f}", "met" if target.met(ratio) else "missed", where)
        lines.append(f"  {target.group:<68} {target.bound:<8}{cells[0]:<14}{cells[1]:<8}{cells[2]}")
    lines += ["", f"{met} of {measured} met; {len(targets) - measured} not measured"]
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="measure all that is missing")
    parser.add_argument("--fresh", action="store_true", help="measure again what there is")
    parser.add_argument("--no-run", action="store_true", help="measure nothing")
    parser.add_argument("--only", default="", metavar="REGEX", help="groups whose name matches")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[BENCHMARKS, MEASURED],
        help="earlier results, as far as they exist",
    )
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    targets = [target for target in TARGETS if re.search(options.only, target.group)]
    groups = list(dict.fromkeys(target.group for target in targets))

    files = [path for path in options.results if path.exists()]
    files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    earlier = [results.groups for results in map(load, files) if not is_gpu(results.facts)]
    found = {group: rows for group in groups if (rows := find(group, earlier))}
    missing = [
        group
        for group in groups
        if options.fresh or not set(needed(group)) <= set(found.get(group, ()))
    ]
    if not options.full:
        missing = [group for group in missing if not COMPARISONS[group].full]
    if missing and not options.no_run:
        measured = load(MEASURED).groups if MEASURED.exists() else {}
        for number, group in enumerate(missing, start=1):
            print(f"measuring {number} of {len(missing)}: {group}", file=sys.stderr, flush=True)
            found[group] = measured[group] = measure(COMPARISONS[group])
            save(measured)
    print(format_table(targets, found))
    if torch.cuda.is_available():
        print("These are targets of the CPU; the GPU here has none: make bench measures it")


if __name__ == "__main__":
    main()
