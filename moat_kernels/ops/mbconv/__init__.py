"""The inverted bottleneck of MBConv and MOAT blocks as one operator."""

from moat_kernels.ops.mbconv.description import (
    MBConvDescription,
    MBConvParameters,
    Norm,
    NormParameters,
    Pool,
    SqueezeExcite,
)
from moat_kernels.ops.mbconv.front import mbconv

__all__ = [
    "MBConvDescription",
    "MBConvParameters",
    "Norm",
    "NormParameters",
    "Pool",
    "SqueezeExcite",
    "mbconv",
]
