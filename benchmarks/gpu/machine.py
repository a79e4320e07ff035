"""What machine this is, and its ceilings: what a copy and a product of large matrices reach."""

from __future__ import annotations

import shutil
import subprocess
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench, Skipped, Step
from benchmarks.gpu.journal import Journal, Row
from moat_kernels import info

GIGA, TERA = 1e9, 1e12
# Names in the rows that other sections look up.
COPY, PRODUCT = "copy, TB/s", "bfloat16 products, TFLOP/s"


def steps(bench: Bench) -> list[Step]:
    return [
        Step("facts", partial(facts, bench)),
        Step("copy", partial(copy, bench)),
        Step("products", partial(products, bench)),
        Step("launches", partial(launches, bench)),
        Step("extension", extension),
    ]


def facts(bench: Bench) -> list[Row]:
    collected = info.collect()
    gpu = collected["gpus"][0] if collected["gpus"] else {"name": "none (a rehearsal)"}
    found = {
        "GPU": gpu["name"],
        "compute capability": gpu.get("compute_capability", ""),
        "memory, GiB": f"{gpu['memory_bytes'] / 2**30:.1f}" if "memory_bytes" in gpu else "",
        "driver": driver_version(),
        "CUDA of torch": torch.version.cuda or "none",
        "CPU": f"{collected['cpu']['name']}, {collected['cpu']['cores']} cores",
        **{name: version or "not installed" for name, version in collected["versions"].items()},
    }
    return [{"": name, "this machine": value} for name, value in found.items()]


def driver_version() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "not known"
    query = [command, "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return result.stdout.strip().splitlines()[0] if result.stdout.strip() else "not known"


def cuda_program(name: str) -> str | None:
    """The path of a program of the CUDA toolkit: on PATH, or beside nvcc; None: not installed."""
    nvcc = shutil.which("nvcc")
    beside = None if nvcc is None else shutil.which(name, path=str(Path(nvcc).resolve().parent))
    return shutil.which(name) or beside


def copy(bench: Bench) -> list[Row]:
    """Bytes read and written."""
    size = 2**31 if not bench.rehearsal else 2**20
    source = torch.empty(size, dtype=torch.int8, device=bench.device).random_()
    target = torch.empty_like(source)
    seconds = bench.time(lambda: target.copy_(source))
    return [{"ceiling": COPY, "value": 2 * size / seconds / TERA}]


def products(bench: Bench) -> list[Row]:
    side = 8192 if not bench.rehearsal else 64
    left, right = (
        torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2)
    )
    seconds = bench.time(lambda: left @ right)
    return [{"ceiling": PRODUCT, "value": 2 * side**3 / seconds / TERA}]


def launches(bench: Bench) -> list[Row]:
    """From one small kernel to the next: what the host needs, or the GPU if that is slower."""
    x = torch.zeros(1024, device=bench.device)
    eager = bench.time(lambda: x.add_(1.0))

    def many() -> None:
        for _ in range(100):
            x.add_(1.0)

    graph = bench.time(bench.graph(many)) / 100
    return [
        {"ceiling": "a launch by the host, µs", "value": 1e6 * eager},
        {"ceiling": "a launch in a CUDA graph, µs", "value": 1e6 * graph},
    ]


def extension() -> list[Row]:
    """Whether the native library is here with its CUDA kernels; the runner built or unpacked it."""
    collected = info.collect()["extension"]
    if not collected["usable"]:
        raise Skipped(f"the native library: {collected['reason']}")
    architectures = ", ".join(f"sm_{number}" for number in collected["cuda_architectures"])
    built = collected["reason_cuda_unusable"] or architectures
    return [{"native library": "loaded", "CUDA kernels": built, "against": collected["torch"]}]


def ceilings(journal: Journal) -> tuple[float, float]:
    """Bytes per second of a copy, and FLOP per second of bfloat16 products, as measured here."""
    found = {row["ceiling"]: row["value"] for row in journal.rows("machine") if "ceiling" in row}
    if COPY not in found or PRODUCT not in found:
        raise Skipped("the section `machine` has not measured the ceilings")
    return TERA * found[COPY], TERA * found[PRODUCT]
