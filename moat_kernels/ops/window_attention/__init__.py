"""Window attention with relative position bias as one operator."""

from moat_kernels.ops.window_attention.description import WindowAttentionDescription
from moat_kernels.ops.window_attention.front import window_attention
from moat_kernels.ops.window_attention.position_bias import resize_table

__all__ = ["WindowAttentionDescription", "resize_table", "window_attention"]
