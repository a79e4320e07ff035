"""The inverted bottleneck by Triton kernels and CUDA C++ ones."""
