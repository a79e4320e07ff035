"""The Triton kernels of window attention."""
