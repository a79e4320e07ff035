"""The kernels that MOATs launch in training, compiled for GPUs that are not there.

`collect` runs an op's launchers; `format_tables` is docs/gpu_kernels.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moat_kernels import get_preprocessing, list_models
from moat_kernels.functional import WindowAttentionDescription
from moat_kernels.ops.window_attention import triton_backend as window_attention
from moat_kernels.variants import get_variant
from support.compile_only_driver import NVIDIA, Launch, Usage, compile_only, nvidia_usage
from support.mbconv_launches import launch_mbconv

DOCUMENT = Path(__file__).parents[2] / "docs" / "gpu_kernels.md"
BATCHES = (1, 64)
HEAD_DIM = 32
# Input pixels per token of each stage's map; the last two stages have attention.
STRIDES = (4, 8, 16, 32)

# (compute capability, dtype); every pair costs some ten seconds of compiling. float16 was compiled
# once for sm_90: the same shared memory, and registers to within one, as bfloat16.
COMPILED = (
    *((arch, torch.bfloat16) for arch in NVIDIA),
    (80, torch.float32),
    (90, torch.float32),
)


@dataclass(frozen=True)
class Compiled:
    """A kernel as the compiler left it."""

    launch: Launch
    usage: Usage

    @property
    def name(self) -> str:
        """The kernel and its block sizes."""
        blocks = [str(v) for k, v in self.launch.options.items() if k.startswith("BLOCK_")]
        return f"{self.launch.kernel} {'x'.join(blocks)}"


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_window_attention(dtype: torch.dtype) -> None:
    """Forward and backward of every attention of the nine variants."""
    for name in list_models():
        for width, stride in list(zip(get_variant(name).widths, STRIDES, strict=True))[2:]:
            size = get_preprocessing(name).resolution // stride
            description = WindowAttentionDescription(width // HEAD_DIM, HEAD_DIM)
            table = _empty(description.heads, 2 * size - 1, 2 * size - 1)
            for batch in BATCHES:
                qkv = _empty(batch, size, size, 3 * description.heads * HEAD_DIM, dtype=dtype)
                output, saved = window_attention.forward(qkv, table, description)
                window_attention.backward(output, qkv, table, description, output, saved, True)


@dataclass(frozen=True)
class Op:
    """What is compiled of an op.

    launch: runs its launchers on meta tensors of a dtype. scope: which ones, in words.
    without_product: its kernels that multiply no matrices. exact_float32: whether float32 products
        leave the tensor cores alone.
    """

    launch: Callable[[torch.dtype], None]
    scope: str
    without_product: frozenset[str]
    exact_float32: bool


OPS = {
    "window_attention": Op(
        launch_window_attention,
        "the nine variants at their own resolutions, batch 1 and 64",
        frozenset({"fold_table_kernel"}),
        exact_float32=True,
    ),
    # The first stage (squeeze-excite, statistics by covariance) and the last (few rows per
    # channel). The nine variants launch the same kernels, some with smaller tiles; compiling all
    # of them, 86 per GPU, takes a minute per GPU.
    "mbconv": Op(
        lambda dtype: launch_mbconv(dtype, ["moat_0"], stages=(0, 3), batches=(64,)),
        "the first and the last stage of MOAT-0, batch 64",
        frozenset({"depthwise_kernel", "depthwise_backward_kernel", "pool_kernel"}),
        exact_float32=False,
    ),
}


@functools.cache
def collect(op: str, arch: int, dtype: torch.dtype) -> tuple[Compiled, ...]:
    """The different kernels that `op` launches, compiled for compute capability `arch`."""
    with compile_only(arch) as launches:
        OPS[op].launch(dtype)
    distinct = {launch.key: launch for launch in launches}
    return tuple(Compiled(launch, nvidia_usage(launch, arch)) for launch in distinct.values())


def _rows(op: str) -> Iterator[str]:
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for arch, dtype in COMPILED:
        for kernel in collect(op, arch, dtype):
            usage = kernel.usage
            row = cells.setdefault((str(dtype).removeprefix("torch."), kernel.name), {})
            row[arch] = (
                f"{usage.warps} warps, {usage.registers} reg., "
                f"{usage.shared_memory / 1024:.1f} KiB, {usage.occupancy(arch):.0%}"
            )
    for (dtype, name), row in cells.items():
        yield f"| {name} | {dtype} | {' | '.join(row.get(arch, '') for arch in NVIDIA)} |"


def format_tables() -> str:
    """The document: a section and a table for each op."""
    lines = [
        "# What the GPU kernels compile to",
        "",
        "Written by `python benchmarks/gpu_kernels.py`, which needs no GPU; the tests compare.",
        "Every kernel launched in training, with the launch tables' block sizes: warps a block,",
        "registers a thread, shared memory a block, share of a multiprocessor's warps that fit.",
        "None spills. Where launches differ in less than their block sizes, the last one stands.",
        "None of this was run on a GPU, and it says nothing about speed.",
    ]
    for op in OPS:
        lines += ["", f"## {op}", "", f"In {OPS[op].scope}.", ""]
        lines.append(f"| kernel, blocks | dtype | {' | '.join(f'sm_{a}' for a in NVIDIA)} |")
        lines.append("|---" * (2 + len(NVIDIA)) + "|")
        lines += _rows(op)
    return "\n".join(lines) + "\n"
