"""Windows of a map and their position bias, in stock PyTorch operations."""
