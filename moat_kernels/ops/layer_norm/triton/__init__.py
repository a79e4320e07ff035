"""LayerNorm of a residual branch by Triton kernels."""
