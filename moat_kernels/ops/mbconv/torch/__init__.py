"""The inverted bottleneck in stock PyTorch operations, on any device."""
