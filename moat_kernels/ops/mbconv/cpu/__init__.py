"""The inverted bottleneck by native CPU kernels."""
