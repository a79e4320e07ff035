"""Training the attention half of a MOAT block by Triton kernels and PyTorch's matrix products."""
