"""Two checkouts against each other, each with its library built in place: what a change costs.

    git worktree add ../before COMMIT   # and build it there: python setup.py build_ext --inplace
    python benchmarks/compare_trees.py ../before . --rounds 5

The trees take turns, a process each time, on a CPU. Printed are, in microseconds, the medians over
the rounds of each process's median, their ratio, and the ratio of the fastest rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

SCRIPT = Path(__file__).resolve()
THREADS = 2
IMPORT = "import moat_kernels (after torch)"


def median(function: Callable[[], object], repeats: int) -> float:
    """Of `repeats` calls after a few others, in microseconds."""
    for _ in range(max(1, repeats // 8)):
        function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times)


def evaluation(module: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return module(x)

    module.eval()
    return run


def step(module: nn.Module, x: Tensor) -> Callable[[], object]:
    module.train()
    return lambda: module(x).sum().backward()


def measure(only: str) -> dict[str, float]:
    """The cases whose names contain `only`, of the package that is on the path."""
    torch.set_num_threads(THREADS)
    begin = time.perf_counter()
    import moat_kernels as mk

    results = {IMPORT: 1e6 * (time.perf_counter() - begin)}
    torch.manual_seed(0)

    def maps(*shape: int) -> Tensor:
        return torch.randn(shape).to(memory_format=torch.channels_last)

    blocks = {
        "MBConv 16x8x8, batch 1": (mk.FusedMBConv(16, 16), maps(1, 16, 8, 8), 300),
        "MOAT 32x8x8, batch 1": (
            mk.FusedMOATBlock(32, 32, window_size=4),
            maps(1, 32, 8, 8),
            300,
        ),
        "MOAT 192x28x28, batch 8": (
            mk.FusedMOATBlock(192, 192, window_size=14),
            maps(8, 192, 28, 28),
            8,
        ),
        "tiny_moat_0 224 px, batch 1": (
            mk.create_model("tiny_moat_0"),
            torch.randn(1, 3, 224, 224),
            20,
        ),
    }
    for name, (module, x, repeats) in blocks.items():
        for kind, make in (("eval", evaluation), ("step", step)):
            if only in f"{name}, {kind}":
                results[f"{name}, {kind}"] = median(make(module, x), repeats)
    model, image, repeats = blocks["tiny_moat_0 224 px, batch 1"]
    if only in "tiny_moat_0 224 px, batch 1, frozen":
        frozen = mk.freeze(model.eval())
        name = "tiny_moat_0 224 px, batch 1, frozen"
        results[name] = median(evaluation(frozen, image), repeats)
    return results


def compare(before: Path, after: Path, rounds: int, only: str) -> None:
    results: dict[str, dict[Path, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        for tree in (before, after) if number % 2 == 0 else (after, before):
            command = [sys.executable, str(SCRIPT), "--measure", "--only", only]
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            output = subprocess.check_output(command, cwd=tree, env=environment, text=True)
            for name, microseconds in json.loads(output).items():
                results[name][tree].append(microseconds)
    print("| | before | after | ratio | of the fastest |\n|---|---:|---:|---:|---:|")
    for name, times in results.items():
        old, new = (statistics.median(times[tree]) for tree in (before, after))
        fastest = min(times[after]) / min(times[before])
        print(f"| {name} | {old:.0f} | {new:.0f} | {new / old:.2f} | {fastest:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trees", nargs="*", type=Path, help="the folders of the old and the new")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="a part of the names of the cases to measure")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.only)))
    elif len(options.trees) == 2:
        compare(*(tree.resolve() for tree in options.trees), options.rounds, options.only)
    else:
        parser.error("two trees are compared, the old one and the new one")


if __name__ == "__main__":
    main()
