"""Window attention by native CPU kernels."""
