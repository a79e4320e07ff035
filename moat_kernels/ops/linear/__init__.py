"""Linear layers of the attention: native products where they are faster than stock."""

from moat_kernels.ops.linear.api import apply_linear

__all__ = ["apply_linear"]
