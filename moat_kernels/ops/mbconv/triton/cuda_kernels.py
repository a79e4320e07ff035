"""The stencil passes of the inverted bottleneck by CUDA C++ kernels (csrc/cuda), where built.

Names and arguments are those of the Triton kernels that they can take the place of;
passes.py chooses. Without a GPU the tests run the same sources on the host, and compile
them by nvcc.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moat_kernels.extension import reason_cuda_unusable
from moat_kernels.ops.common.registration import LIBRARY, register_fake
from moat_kernels.ops.mbconv.algebra.geometry import Stencil
from moat_kernels.ops.triton_support.launching import architecture

# Blocks that a launch aims at: several times what a GPU holds at once, so that the last ones leave
# little of it idle, yet few enough that their partial sums are small beside the maps.
TARGET_BLOCKS = 1056
# Columns of a tile, at most 14 (csrc/cuda/columns.cuh), of which MOAT's widths are multiples, or of
# 7: what was fastest on an H200, backward by stride (docs/cuda_kernels.md).
FORWARD_COLUMNS = 7
BACKWARD_COLUMNS = {1: 14, 2: 7}
ACTIVATIONS = ("identity", "gelu")
# The first with bfloat16 and asynchronous copies.
OLDEST_ARCHITECTURE = 80
ALIGNMENT = 16  # bytes, of what is loaded at once
# Channels that those hold.
CHANNEL_MULTIPLE = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}


def unsupported(z: Tensor, activations: tuple[str, ...]) -> str:
    """Why the stencil kernels do not cover rows z [N, E] and these activations; empty: they do."""
    return (
        _unsupported_device(z.device)
        or _unsupported_rows(z, "E")
        or _unsupported_activations(activations)
    )


def unsupported_expand(rows: Tensor, weight: Tensor, activations: tuple[str, ...]) -> str:
    """The same for `expand_depthwise` of rows [N, C] by weight [E, C]."""
    if rows.dtype == torch.float32:
        return "torch.float32 on tensor cores"
    if rows.dtype != weight.dtype:
        return f"rows in {rows.dtype} and a weight in {weight.dtype}"
    return (
        _unsupported_device(rows.device)
        or _unsupported_rows(rows, "C")
        or _unsupported_rows(weight.t(), "E")
        or _unsupported_activations(activations)
    )


def _has_kernel(device_type: str) -> bool:
    if device_type == "cuda":
        return not reason_cuda_unusable()
    # In tests only.
    return device_type == "cpu" and torch._C._dispatch_has_kernel_for_dispatch_key(
        "moat_kernels::cuda_depthwise_forward", "CPU"
    )


def _unsupported_device(device: torch.device) -> str:
    if not _has_kernel(device.type):
        return f"CUDA kernels on {device.type}"
    if 0 < architecture(device) < OLDEST_ARCHITECTURE:
        return f"a GPU older than sm_{OLDEST_ARCHITECTURE}"
    return ""


def _unsupported_rows(rows: Tensor, name: str) -> str:
    multiple = CHANNEL_MULTIPLE.get(rows.dtype)
    if multiple is None:
        return str(rows.dtype)
    if rows.shape[1] % multiple:
        return f"{name} = {rows.shape[1]}, not a multiple of {multiple}, in {rows.dtype}"
    if not rows.numel():
        return "an empty tensor"
    # A fake tensor has no address; it stands for memory that PyTorch allocates, which is aligned.
    fake = isinstance(rows, FakeTensor)
    begin = rows.storage_offset() * rows.element_size() if fake else rows.data_ptr()
    if begin % ALIGNMENT:
        return f"rows that do not begin at a multiple of {ALIGNMENT} bytes"
    return ""


def _unsupported_activations(activations: tuple[str, ...]) -> str:
    others = [name for name in activations if name not in ACTIVATIONS]
    return f"activation {others[0]!r}" if others else ""


class Geometry(NamedTuple):
    """Where the kernels' windows lie, as the ops take it."""

    out_height: int
    out_width: int
    stride: int
    padding_top: int
    padding_left: int


def _geometry(stencil: Stencil) -> Geometry:
    return Geometry(
        stencil.out_height, stencil.out_width, stencil.stride, stencil.top, stencil.left
    )


def _input_map(rows: Tensor, stencil: Stencil) -> Tensor:
    return rows.view(stencil.batch, stencil.height, stencil.width, -1)


def _output_map(rows: Tensor, stencil: Stencil) -> Tensor:
    return rows.view(stencil.batch, stencil.out_height, stencil.out_width, -1)


def depthwise(
    z: Tensor,
    affine: Tensor | None,
    activation: str,
    taps: Tensor,
    bias: Tensor | None,
    output_activation: str,
    stencil: Stencil,
    measure: bool,
    target_blocks: int = TARGET_BLOCKS,
    columns: int = FORWARD_COLUMNS,
) -> tuple[Tensor, Tensor | None]:
    """output_activation(convolution of activation(z scale + shift) by taps, + bias).

    z: [B*H*W, E]; affine: float32 (scale, shift) [2, E]; taps: float32 [9, E]; bias: float32 [E].
    Returns [B*H_out*W_out, E] and, to measure, its mean and squared deviations [1, 2, E].
    """
    output, moments = torch.ops.moat_kernels.cuda_depthwise_forward(
        _input_map(z, stencil),
        affine,
        activation,
        taps,
        bias,
        output_activation,
        *_geometry(stencil),
        measure,
        target_blocks,
        columns,
    )
    return output.view(-1, z.shape[1]), moments if measure else None


def depthwise_backward(
    grad: Tensor,
    z2: Tensor | None,
    factors: Tensor | None,
    z1: Tensor,
    affine: Tensor | None,
    activation: str,
    taps: Tensor,
    stencil: Stencil,
    target_blocks: int = TARGET_BLOCKS,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of y1 [B*H*W, E]; and sums [P, 11, E]: of the taps, and of it, and it * z1.

    grad, z2: [B*H_out*W_out, E]; factors: float32 (a, b, c) [3, E] of dz2 = a grad + b z2 + c (both
    None: dz2 = grad); z1: [B*H*W, E]; affine: float32 (scale, shift) [2, E]; taps: float32 [9, E].
    """
    output, sums = torch.ops.moat_kernels.cuda_depthwise_backward(
        _output_map(grad, stencil),
        None if z2 is None else _output_map(z2, stencil),
        factors,
        _input_map(z1, stencil),
        affine,
        activation,
        taps,
        *_geometry(stencil),
        target_blocks,
        columns or BACKWARD_COLUMNS[stencil.stride],
    )
    return output.view(z1.shape), sums


def expand_depthwise(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    taps: Tensor,
    depthwise_bias: Tensor | None,
    output_activation: str,
    stencil: Stencil,
) -> Tensor:
    """`depthwise` of rows weight^T + bias, which is computed on the way and not stored.

    rows: [B*H*W, C], weight: [E, C], both bfloat16 or float16; bias, depthwise_bias: float32 [E].
    """
    output = torch.ops.moat_kernels.cuda_expand_depthwise(
        _input_map(rows, stencil),
        weight,
        bias,
        activation,
        taps,
        depthwise_bias,
        output_activation,
        *_geometry(stencil),
    )
    return output.view(-1, weight.shape[0])


def _fake_moments(like: Tensor, channels: int, measures: bool) -> Tensor:
    return like.new_empty(int(measures), 2, channels, dtype=torch.float32)


def _fake_depthwise(
    z1: Tensor,
    affine: Tensor | None,
    activation: str,
    weights: Tensor,
    bias: Tensor | None,
    output_activation: str,
    out_height: int,
    out_width: int,
    stride: int,
    padding_top: int,
    padding_left: int,
    measures: bool,
    target_blocks: int,
    columns: int,
) -> tuple[Tensor, Tensor]:
    output = z1.new_empty(z1.shape[0], out_height, out_width, z1.shape[3])
    return output, _fake_moments(z1, z1.shape[3], measures)


def _fake_depthwise_backward(
    dy2: Tensor,
    z2: Tensor | None,
    factors: Tensor | None,
    z1: Tensor,
    affine: Tensor | None,
    activation: str,
    weights: Tensor,
    out_height: int,
    out_width: int,
    stride: int,
    padding_top: int,
    padding_left: int,
    target_blocks: int,
    columns: int,
) -> tuple[Tensor, Tensor]:
    images, height, width, channels = z1.shape
    positions_y, positions_x = (
        (padding + size - 1) // stride - padding // stride + 1
        for padding, size in ((padding_top, height), (padding_left, width))
    )
    row_elements = max(width, out_width) * channels * stride
    parts = _backward_parts(
        images, positions_y, positions_x, channels, row_elements, target_blocks, columns
    )
    return torch.empty_like(z1), z1.new_empty(parts, 11, channels, dtype=torch.float32)


def _backward_parts(
    images: int,
    height: int,
    width: int,
    channels: int,
    row_elements: int,
    target_blocks: int,
    columns: int,
) -> int:
    """How many groups of tiles the kernel sums by; see `divide_map` in csrc/cuda/columns.cuh."""
    least_rows, most_elements = 8, 1 << 30
    wanted = -(-target_blocks // -(-channels // 64))
    across = images * -(-width // columns)
    bands = max(1, min(wanted // across, height // least_rows))
    rows = min(-(-height // bands), most_elements // row_elements)
    return min(wanted, across * -(-height // rows))


def _fake_expand_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    depthwise_weights: Tensor,
    depthwise_bias: Tensor | None,
    output_activation: str,
    out_height: int,
    out_width: int,
    stride: int,
    padding_top: int,
    padding_left: int,
) -> Tensor:
    return x.new_empty(x.shape[0], out_height, out_width, weight.shape[0])


# Maps are [B, H, W, C]. csrc/cuda/binding.cpp registers the implementations.
_GEOMETRY = ", ".join(f"int {name}" for name in Geometry._fields)
LIBRARY.define(
    "cuda_depthwise_forward(Tensor z1, Tensor? affine, str activation, Tensor weights, "
    f"Tensor? bias, str output_activation, {_GEOMETRY}, bool measures, int target_blocks, "
    "int columns) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "cuda_depthwise_backward(Tensor dy2, Tensor? z2, Tensor? factors, Tensor z1, Tensor? affine, "
    f"str activation, Tensor weights, {_GEOMETRY}, int target_blocks, int columns) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    "cuda_expand_depthwise(Tensor x, Tensor weight, Tensor? bias, str activation, "
    f"Tensor depthwise_weights, Tensor? depthwise_bias, str output_activation, {_GEOMETRY}) "
    "-> Tensor"
)
for _name, _fake in (
    ("cuda_depthwise_forward", _fake_depthwise),
    ("cuda_depthwise_backward", _fake_depthwise_backward),
    ("cuda_expand_depthwise", _fake_expand_depthwise),
):
    register_fake(_name, _fake, LIBRARY)
