"""The ops as stateless functions: documented shapes, any supported backend, exact gradients."""

from moat_kernels.ops.mbconv import (
    MBConvDescription,
    MBConvParameters,
    Norm,
    NormParameters,
    Pool,
    SqueezeExcite,
    mbconv,
)
from moat_kernels.ops.window_attention import (
    WindowAttentionDescription,
    resize_table,
    window_attention,
)

__all__ = [
    "MBConvDescription",
    "MBConvParameters",
    "Norm",
    "NormParameters",
    "Pool",
    "SqueezeExcite",
    "WindowAttentionDescription",
    "mbconv",
    "resize_table",
    "window_attention",
]
