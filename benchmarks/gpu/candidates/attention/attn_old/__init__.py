"""Window attention by Triton kernels."""
