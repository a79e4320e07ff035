"""Window attention with relative position bias as one operator."""

from moat_kernels.ops.window_attention.algebra.position_bias import resize_table
from moat_kernels.ops.window_attention.api import window_attention
from moat_kernels.ops.window_attention.description import WindowAttentionDescription

__all__ = ["WindowAttentionDescription", "resize_table", "window_attention"]
