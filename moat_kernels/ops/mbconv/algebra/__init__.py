"""What two backends of the inverted bottleneck use, in stock PyTorch operations."""
