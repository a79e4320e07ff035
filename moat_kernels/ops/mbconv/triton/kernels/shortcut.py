"""Average pool of the shortcut: 2x2 pixels to one.

Its backward pass is in kernels/expand_backward.py, where each pixel of x finds the one it went to.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.triton_support.launching import launch

_BLOCK_ROWS, _BLOCK_C = 32, 64


@triton.jit
def pool_rows_kernel(
    rows_ptr,  # [B * H * W, C]
    output_ptr,  # [B * H/2 * W/2, C]
    count,
    out_width,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """output = mean of 2x2 pixels, in float32, rounded once. Reads rows and writes output once."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // channel_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < count)[:, None] & (channel < channels)[None, :]
    # H and W are even, so that lines of the output follow each other as pairs of lines do.
    first = row // out_width * (4 * out_width) + row % out_width * 2
    source = rows_ptr + first[:, None] * channels + channel[None, :]
    below = source + 2 * out_width * channels
    total = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(source + channels, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(below, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(below + channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        output_ptr + row[:, None] * channels + channel[None, :],
        (0.25 * total).to(output_ptr.dtype.element_ty),
        mask=mask,
    )


def pool_rows(rows: Tensor, width: int) -> Tensor:
    """[B*H*W, C] to [B * H/2 * W/2, C], of maps of even sizes, `width` = W."""
    count, channels = rows.shape[0] // 4, rows.shape[1]
    output = rows.new_empty((count, channels))
    launch(
        pool_rows_kernel,
        (-(-count // _BLOCK_ROWS) * -(-channels // _BLOCK_C),),
        *(rows, output, count, width // 2, channels),
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_C=_BLOCK_C,
        num_warps=4,
        num_stages=1,
        reads=(rows,),
        writes=(output,),
    )
    return output
