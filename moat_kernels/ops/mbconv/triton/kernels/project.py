"""The project 1x1 convolution with depthwise norm, activation and gate before it, and the shortcut
that is added to it; and the pooling of squeeze-excite, which sees the same activations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.mbconv.triton.kernels.affine import exist, load_affine
from moat_kernels.ops.mbconv.triton.kernels.fold import Ready
from moat_kernels.ops.mbconv.triton.kernels.moments import Sums
from moat_kernels.ops.mbconv.triton.launch_table import dot_precision, gemm_blocks, pool_blocks
from moat_kernels.ops.triton_support.activations import activate
from moat_kernels.ops.triton_support.launching import launch, tunable


@triton.jit
def rows_of_block(block, count, pixels, BLOCK_ROWS: tl.constexpr, BY_IMAGE: tl.constexpr):
    """(rows, whether each is valid, image) of a block of rows; BY_IMAGE: within one image."""
    if BY_IMAGE:
        blocks_per_image = tl.cdiv(pixels, BLOCK_ROWS)
        image = block // blocks_per_image
        pixel = (block % blocks_per_image) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        return image.to(tl.int64) * pixels + pixel, pixel < pixels, image
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return row.to(tl.int64), row < count, 0


def row_blocks(count: int, pixels: int, block: int, by_image: bool) -> int:
    """How many blocks `rows_of_block` divides `count` rows of maps of `pixels` into."""
    if by_image:
        return count // pixels * -(-pixels // block)
    return -(-count // block)


@triton.jit
def pool_kernel(
    z_ptr,  # [M, E]
    affine_ptr,  # [2, E] float32: scale and shift; or None
    sums_ptr,  # [B, splits, E] float32
    pixels,
    channels,
    chunk,
    splits,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """sums = sum of act(z scale + shift) over a chunk of an image's pixels. Reads z, E-wide."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(0) // channel_blocks % splits
    image = tl.program_id(0) // channel_blocks // splits
    valid = channel < channels
    scale, shift = load_affine(affine_ptr, channel, channels, valid)
    source = z_ptr + image.to(tl.int64) * pixels * channels + channel
    sums = tl.zeros([BLOCK_PIXELS, BLOCK_C], tl.float32)
    end = tl.minimum(pixels, (split + 1) * chunk)
    for start in tl.range(split * chunk, end, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        mask = (pixel < end)[:, None] & valid[None, :]
        offset = pixel.to(tl.int64)[:, None] * channels
        z = tl.load(source[None, :] + offset, mask=mask, other=0.0).to(tl.float32)
        sums += tl.where(mask, activate(z * scale[None, :] + shift[None, :], ACTIVATION), 0.0)
    target = sums_ptr + (image.to(tl.int64) * splits + split) * channels
    tl.store(target + channel, tl.sum(sums, 0), mask=valid)


@tunable
def pool(z: Tensor, affine: Tensor | None, activation: str, pixels: int) -> Sums:
    """Sums over parts of each image of activation(z [M, E] scale + shift), float32 [B, parts, E].

    pixels: of an image.
    """
    batch, channels = z.shape[0] // pixels, z.shape[1]
    blocks = pool_blocks(z, channels, batch, pixels)
    splits = -(-pixels // blocks.band)
    sums = z.new_empty((batch, splits, channels), dtype=torch.float32)
    launch(
        pool_kernel,
        (-(-channels // blocks.channels) * splits * batch,),
        *(z, affine, sums, pixels, channels, blocks.band, splits),
        BLOCK_PIXELS=blocks.width,
        BLOCK_C=blocks.channels,
        ACTIVATION=activation,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(z, affine),
        writes=(sums,),
    )
    return Sums(sums, 1)


@triton.jit
def project_kernel(
    z_ptr,  # [M, E]
    affine_ptr,  # [2, E] float32: scale and shift; or None
    gate_ptr,  # [B, E] float32, or None
    weight_ptr,  # [C_out, E]
    bias_ptr,  # [C_out], or None
    drop_path_ptr,  # [B], or None
    shortcut_ptr,  # [M, C] with a weight, [M, C_out] without; or None
    shortcut_weight_ptr,  # [C_out, C], or None
    shortcut_bias_ptr,  # [C_out], or None
    output_ptr,  # [M, C_out]
    count,
    pixels,
    wide,
    channels,
    shortcut_channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    WHOLE_WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """output = drop_path * ((gate * act(z scale + shift)) weight^T + bias) + added,
    added = shortcut, or shortcut shortcut_weight^T + shortcut_bias.

    Reads z (E-wide) and the shortcut, writes output (C_out-wide). Blocks of the same rows run side
    by side, so that all but the first find z in L2. The activation is computed on the way into the
    product and never stored.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    row, valid_row, image = rows_of_block(
        tl.program_id(0) // channel_blocks, count, pixels, BLOCK_ROWS, gate_ptr is not None
    )
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid_channel = channel < channels
    products = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for start in tl.range(0, wide, BLOCK_WIDE):
        column = start + tl.arange(0, BLOCK_WIDE)
        valid = exist(column, wide, WHOLE_WIDE)
        z = tl.load(
            z_ptr + row[:, None] * wide + column[None, :],
            mask=valid_row[:, None] & valid[None, :],
            other=0.0,
        )
        scale, shift = load_affine(affine_ptr, column, wide, valid)
        activated = activate(z.to(tl.float32) * scale[None, :] + shift[None, :], ACTIVATION)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + image * wide + column, mask=valid, other=0.0)
            activated *= gate[None, :]
        weight = tl.load(
            weight_ptr + channel[None, :] * wide + column[:, None],
            mask=valid_channel[None, :] & valid[:, None],
            other=0.0,
        )
        products = tl.dot(activated.to(weight.dtype), weight, products, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=valid_channel, other=0.0)
        products += bias.to(tl.float32)[None, :]
    if drop_path_ptr is not None:
        factor = tl.load(drop_path_ptr + row // pixels, mask=valid_row, other=0.0)
        products *= factor.to(tl.float32)[:, None]
    if shortcut_weight_ptr is not None:
        for start in tl.range(0, shortcut_channels, BLOCK_WIDE):
            inner = start + tl.arange(0, BLOCK_WIDE)
            valid = inner < shortcut_channels
            shortcut = tl.load(
                shortcut_ptr + row[:, None] * shortcut_channels + inner[None, :],
                mask=valid_row[:, None] & valid[None, :],
                other=0.0,
            )
            weight = tl.load(
                shortcut_weight_ptr + channel[None, :] * shortcut_channels + inner[:, None],
                mask=valid_channel[None, :] & valid[:, None],
                other=0.0,
            )
            products = tl.dot(shortcut, weight, products, input_precision=PRECISION)
    if shortcut_bias_ptr is not None:
        bias = tl.load(shortcut_bias_ptr + channel, mask=valid_channel, other=0.0)
        products += bias.to(tl.float32)[None, :]
    offset = row[:, None] * channels + channel[None, :]
    mask = valid_row[:, None] & valid_channel[None, :]
    if shortcut_ptr is not None and shortcut_weight_ptr is None:
        products += tl.load(shortcut_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + offset, products.to(output_ptr.dtype.element_ty), mask=mask)


@tunable
def project(
    z: Tensor,
    affine: Tensor | None,
    activation: str,
    gate: Tensor | None,
    ready: Ready,
    bias: Tensor | None,
    drop_path_scale: Tensor | None,
    shortcut: Tensor | None,
    pixels: int,
    dtype: torch.dtype,
) -> Tensor:
    """drop_path_scale * ((gate * activation(z scale + shift)) weight^T + bias) + what is added.

    That is the shortcut [M, C_out], or its convolution where `ready` has a weight: of [M, C], in
    the dtype of that.
    z: [M, E], `pixels` rows an image; affine: float32 (scale, shift) [2, E]; gate: float32 [B, E];
    bias: [C_out]; drop_path_scale: [B].
    Returns [M, C_out] in `dtype`.
    """
    (count, wide), channels = z.shape, ready.project.shape[0]
    inner = 1 if shortcut is None or ready.shortcut is None else shortcut.shape[1]
    reads = (z, affine, gate, ready.project, bias, drop_path_scale, shortcut, *ready[1:])
    blocks = gemm_blocks("project", z, count, channels, wide)
    output = z.new_empty((count, channels), dtype=dtype)
    launch(
        project_kernel,
        (
            row_blocks(count, pixels, blocks.rows, gate is not None)
            * -(-channels // blocks.columns),
        ),
        *(*reads, output, count, pixels, wide, channels, inner),
        BLOCK_ROWS=blocks.rows,
        BLOCK_C=blocks.columns,
        BLOCK_WIDE=blocks.depth,
        WHOLE_WIDE=wide % blocks.depth == 0,
        ACTIVATION=activation,
        PRECISION=dot_precision(z),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=reads,
        writes=(output,),
        flops=2 * count * channels * (wide + (0 if ready.shortcut is None else inner)),
    )
    return output
