"""Triton kernels of the inverted bottleneck, each with its launcher. Importing imports triton.

Maps are NHWC, seen as rows: x is [N, C], the expand convolution's output z1 [N, E], the depthwise
convolution's z2 [M, E]. Tiles are summed in float32; sums over many tiles are left as partial sums
that the next kernel, or PyTorch, adds up in a fixed order: results repeat bit by bit.
"""
