"""The kernels that MOATs launch, compiled for GPUs that are not there.

`record` runs an op's launchers; `compile_all` compiles what they launch and `write` makes two
documents of it: a table with a row for each kernel, and a summary to read.
"""

from __future__ import annotations

import csv
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moat_kernels import get_preprocessing, list_models
from moat_kernels.functional import WindowAttentionDescription
from moat_kernels.ops.attention_half.description import Half, Layers
from moat_kernels.ops.attention_half.triton import backend as attention_half
from moat_kernels.ops.layer_norm.triton import backend as layer_norm
from moat_kernels.ops.window_attention.triton import backend as window_attention
from moat_kernels.variants import get_variant
from support.compile_only_driver import (
    MULTIPROCESSORS,
    NVIDIA,
    Launch,
    Usage,
    compile_launches,
    nvidia_usage,
    record_launches,
)
from support.mbconv_launches import launch_mbconv

DOCUMENTS = Path(__file__).parents[2] / "docs"
SUMMARY = DOCUMENTS / "gpu_kernels.md"
TABLE = DOCUMENTS / "gpu_kernels.csv"

BATCHES = (1, 64)
HEAD_DIM = 32
EPS = 1e-5
# Input pixels per token of each stage's map; the last two stages have attention.
STRIDES = (4, 8, 16, 32)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Compute capabilities and dtypes that the table covers: all that their kernels launch.
COMPILED = tuple(itertools.product(NVIDIA, DTYPES))


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention_maps() -> Iterator[tuple[int, int, int]]:
    """(batch, side, channels) of every map that the nine variants attend to."""
    for name in list_models():
        for width, stride in list(zip(get_variant(name).widths, STRIDES, strict=True))[2:]:
            for batch in BATCHES:
                yield batch, get_preprocessing(name).resolution // stride, width


def launch_window_attention(dtype: torch.dtype, autocast: bool) -> None:
    """Forward and backward of every attention of the nine variants, and of a larger map."""
    for batch, size, width in (*_attention_maps(), (2, 40, 256)):
        description = WindowAttentionDescription(width // HEAD_DIM, HEAD_DIM)
        sides = 2 * size - 1
        table = _empty(description.heads, sides, sides, dtype=torch.float32 if autocast else dtype)
        qkv = _empty(batch, size, size, 3 * description.heads * HEAD_DIM, dtype=dtype)
        output, saved = window_attention.forward(qkv, table, description)
        window_attention.backward(output, qkv, table, description, output, saved, True)


def launch_layer_norm(dtype: torch.dtype, autocast: bool) -> None:
    """Forward and backward of the norm before every attention of the nine variants."""
    outside = torch.float32 if autocast else dtype
    for batch, size, width in _attention_maps():
        x = _empty(batch, size, size, width, dtype=outside)
        weight = _empty(width, dtype=outside)
        normalized, saved = layer_norm.forward(x, weight, weight, EPS, dtype)
        layer_norm.backward(normalized, x, x, weight, saved, True)


def launch_attention_half(dtype: torch.dtype, autocast: bool) -> None:
    """Training of every attention half of the nine variants, with drop path."""
    outside = torch.float32 if autocast else dtype
    for batch, size, width in _attention_maps():
        heads = width // HEAD_DIM
        inner = heads * HEAD_DIM
        shapes = ((width,), (width,), (3 * inner, width), (3 * inner,), (width, inner), (width,))
        layers = Layers(*(_empty(*shape, dtype=outside) for shape in shapes))
        table = _empty(heads, 2 * size - 1, 2 * size - 1, dtype=outside)
        y = _empty(batch, width, size, size, dtype=outside).to(memory_format=torch.channels_last)
        half = Half(WindowAttentionDescription(heads, HEAD_DIM), EPS, 2.0, dtype)
        arguments = (y, layers, table, _empty(batch, dtype=outside), half)
        output, saved = attention_half.forward(*arguments)
        attention_half.backward(output, *arguments, saved, [True] * 8)


@dataclass(frozen=True)
class Op:
    """What is compiled of an op.

    launch: runs its launchers on meta tensors of a dtype, as in a model of that dtype or under
        autocast in it. without_product: its kernels that multiply no matrices. exact_float32:
        whether float32 products leave the tensor cores alone.
    """

    launch: Callable[[torch.dtype, bool], None]
    without_product: frozenset[str]
    exact_float32: bool

    def multiplies_on_tensor_cores(self, kernel: str, dtype: str) -> bool:
        exact = dtype == "float32" and self.exact_float32
        return not exact and kernel not in self.without_product


OPS = {
    "window_attention": Op(
        launch_window_attention,
        frozenset({"spread_bias_kernel", "fold_table_kernel"}),
        exact_float32=True,
    ),
    "layer_norm": Op(
        launch_layer_norm,
        frozenset({"layer_norm_kernel", "layer_norm_backward_kernel"}),
        exact_float32=True,
    ),
    "attention_half": Op(
        launch_attention_half,
        frozenset(
            {
                *("norm_and_cast_kernel", "branch_gradient_kernel"),
                *("layer_norm_backward_kernel", "fold_sums_kernel"),
            }
        ),
        exact_float32=True,
    ),
    "mbconv": Op(
        launch_mbconv,
        frozenset(
            {
                "row_moments_kernel",
                "fold_weights_kernel",
                "fold_evaluation_kernel",
                "norm_kernel",
                "norm_gradient_kernel",
                "depthwise_kernel",
                "depthwise_backward_kernel",
                "pool_kernel",
                "excite_kernel",
                "excite_backward_kernel",
                "excite_weight_kernel",
            }
        ),
        exact_float32=False,
    ),
}


@functools.cache
def record(op: str, arch: int | str, dtype: str) -> tuple[Launch, ...]:
    """The different kernels that `op` launches on `arch`: in training, evaluation, autocast."""
    with record_launches(arch) as launches:
        OPS[op].launch(DTYPES[dtype], False)
        if dtype != "float32":
            OPS[op].launch(DTYPES[dtype], True)
    return tuple(launches)


def representatives(launches: Iterable[Launch]) -> list[Launch]:
    """The first launch of each kernel."""
    return list({launch.kernel: launch for launch in reversed(list(launches))}.values())


def compile_for(launches: Iterable[Launch], arch: int) -> list[Usage]:
    """What each launch takes of an `arch`."""
    return [nvidia_usage(kernel, arch) for kernel in compile_launches(launches, arch)]


def faults(op: str, dtype: str, arch: int, kernel: str, usage: Usage) -> list[str]:
    """What is wrong with a compiled kernel."""
    limit = MULTIPROCESSORS[arch].shared_memory_per_block
    on_tensor_cores = usage.tensor_core_instructions > 0
    found = []
    if usage.stack:
        found.append(f"{usage.stack} bytes of registers spilled")
    if usage.shared_memory > limit:
        found.append(f"{usage.shared_memory} bytes of shared memory, {limit} fit")
    if on_tensor_cores != OPS[op].multiplies_on_tensor_cores(kernel, dtype):
        found.append("on tensor cores" if on_tensor_cores else "not on tensor cores")
    return [f"{kernel}, {dtype}, sm_{arch}: {fault}" for fault in found]


# op, dtype, kernel, constants, arguments
Key = tuple[str, str, str, str, str]
KEY_COLUMNS = ("op", "dtype", "kernel", "constants", "arguments")
Table = dict[Key, dict[int, Usage]]


def row_key(op: str, dtype: str, launch: Launch) -> Key:
    """A launch's row in the table."""
    return op, dtype, *launch.key


def compile_all(report: Callable[[str], None]) -> tuple[Table, list[str]]:
    """Every kernel of every op, as COMPILED says; and what is wrong with any."""
    table: Table = {}
    wrong: list[str] = []
    for (arch, dtype), op in itertools.product(COMPILED, OPS):
        launches = record(op, arch, dtype)
        report(f"{op}, {dtype}, sm_{arch}: {len(launches)} kernels")
        for launch, usage in zip(launches, compile_for(launches, arch), strict=True):
            table.setdefault(row_key(op, dtype, launch), {})[arch] = usage
            for fault in faults(op, dtype, arch, launch.kernel, usage):
                wrong.append(f"{fault} ({' '.join(launch.key[1:])})")
                report(wrong[-1])
    return table, wrong


def _format(usage: Usage) -> str:
    text = f"{usage.warps} warps, {usage.registers} registers, {usage.shared_memory} bytes"
    return f"{text}, {usage.tensor_core_instructions} products"


def _parse(text: str) -> Usage:
    warps, registers, shared_memory, products = map(int, re.findall(r"\d+", text))
    return Usage(registers, 0, shared_memory, products, warps)


def read_table() -> Table:
    """The table in docs/."""
    with TABLE.open(newline="") as file:
        return {
            tuple(row[column] for column in KEY_COLUMNS): {
                arch: _parse(row[f"sm_{arch}"]) for arch in NVIDIA if row[f"sm_{arch}"]
            }
            for row in csv.DictReader(file)
        }


def write_table(table: Table) -> None:
    """Put the table into docs/."""
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*KEY_COLUMNS, *(f"sm_{arch}" for arch in NVIDIA)))
        for key, usages in sorted(table.items()):
            cells = (_format(usages[arch]) if arch in usages else "" for arch in NVIDIA)
            writer.writerow((*key, *cells))


def table_triton() -> str:
    """The version of Triton that compiled the table in docs/: another's registers are not its."""
    (version,) = re.findall(r"by Triton (\d[\w.]*\w)", SUMMARY.read_text())
    return version


def _title(key: Key) -> str:
    """The kernel and its block sizes."""
    blocks = re.findall(r"\bBLOCK_\w+=(\d+)", key[3])
    return f"{key[2]} {'x'.join(blocks)}".strip()


def _summarise(usages: list[Usage], arch: int) -> str:
    if not usages:
        return ""
    registers = max(usage.registers for usage in usages)
    shared_memory = max(usage.shared_memory for usage in usages) / 1024
    occupancy = min(usage.occupancy(arch) for usage in usages)
    return f"{registers} reg., {shared_memory:.1f} KiB, {occupancy:.0%}"


def summarise(table: Table, triton_version: str) -> str:
    """The document: for each op, kernel and tile the most that any of its launches takes."""
    kernels = sum(len(usages) for usages in table.values())
    lines = [
        "# What the GPU kernels compile to",
        "",
        "Written by `python benchmarks/gpu_kernels.py`, which needs no GPU.",
        f"All {kernels} kernels that the nine variants launch in training and evaluation at their",
        "own resolutions, at batch 1 and 64, in models of a dtype and under autocast, compiled",
        f"by Triton {triton_version} for A100 (sm_80), H100 and H200 (sm_90), B200 (sm_100) and",
        "RTX 50 (sm_120). Each version of Triton allots registers in its own way: the tests",
        "compare under this one, and compile some kernels under whichever is there. None spills,",
        "each fits the shared memory, and those with products use tensor cores (attention in",
        "float32 does not, on purpose). This says nothing about speed; gpu_results.md does.",
        "",
        "Kernels that differ only in which steps they take and in what is known to be a multiple",
        "of 16 share a line: the most registers a thread and shared memory a block of any, and the",
        "smallest share of a multiprocessor's warps that fit. [gpu_kernels.csv](gpu_kernels.csv)",
        "has each by itself.",
    ]
    for op in OPS:
        lines += ["", f"## {op}", ""]
        lines.append(f"| kernel, blocks | dtype | {' | '.join(f'sm_{a}' for a in NVIDIA)} |")
        lines.append("|---" * (2 + len(NVIDIA)) + "|")
        grouped: dict[tuple[str, str], dict[int, list[Usage]]] = {}
        for key, usages in sorted(table.items()):
            if key[0] == op:
                group = grouped.setdefault((_title(key), key[1]), {arch: [] for arch in NVIDIA})
                for arch, usage in usages.items():
                    group[arch].append(usage)
        for (title, dtype), group in sorted(grouped.items()):
            cells = " | ".join(_summarise(group[arch], arch) for arch in NVIDIA)
            lines.append(f"| {title} | {dtype} | {cells} |")
    return "\n".join(lines) + "\n"
