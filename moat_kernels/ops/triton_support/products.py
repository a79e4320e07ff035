"""Products beside the kernels, by BLAS."""

from __future__ import annotations

import torch
from torch import Tensor

from moat_kernels.ops.common.device import device_type


def weight_gradient(grad: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """grad^T rows in the weight's dtype, on NVIDIA's GPUs not rounded to a narrower one before.

    grad: [N, out]; rows: [N, in].
    """
    left = grad.t()
    if dtype == grad.dtype or torch.version.hip is not None:
        product = left @ rows
    elif device_type(grad) == "cuda":
        product = torch.mm(left, rows, out_dtype=torch.float32)
    else:  # interpreted: on CPUs PyTorch has no such product
        product = left.float() @ rows.float()
    return product.to(dtype)
