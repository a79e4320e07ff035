"""LayerNorm at the start of a residual branch, and the sum at its end."""

from moat_kernels.ops.layer_norm.api import branch_layer_norm, covers
from moat_kernels.ops.layer_norm.residual import add_branch

__all__ = ["add_branch", "branch_layer_norm", "covers"]
