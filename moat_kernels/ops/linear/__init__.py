"""Linear layers of the attention: native products where they are faster than stock."""

from moat_kernels.ops.linear.api import linear

__all__ = ["linear"]
