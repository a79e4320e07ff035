"""Window attention in stock PyTorch operations, on any device."""
