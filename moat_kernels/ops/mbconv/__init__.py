"""The inverted bottleneck of MBConv and MOAT blocks as one operator."""

from moat_kernels.ops.mbconv.api import mbconv
from moat_kernels.ops.mbconv.description import (
    MBConvDescription,
    MBConvParameters,
    Norm,
    NormParameters,
    Pool,
    SqueezeExcite,
)

__all__ = [
    "MBConvDescription",
    "MBConvParameters",
    "Norm",
    "NormParameters",
    "Pool",
    "SqueezeExcite",
    "mbconv",
]
