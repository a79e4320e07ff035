"""Autocast of CUDA devices, for meta tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moat_kernels.ops.common.autocast import autocast_dtype, without_autocast
from moat_kernels.ops.common.device import planning
from moat_kernels.plan.autocast import CudaAutocast


def test_dtypes_are_those_of_cuda_s_lists() -> None:
    x = torch.empty(2, 4, 6, 6, device="meta")
    weight = torch.empty(4, 4, 1, 1, device="meta")
    with CudaAutocast(torch.bfloat16):
        low = F.conv2d(x, weight)
        assert low.dtype == torch.bfloat16
        assert (x @ x.mT).dtype == torch.bfloat16
        assert F.linear(x, weight[:1, :1, 0, 0].expand(3, 6)).dtype == torch.bfloat16
        assert F.layer_norm(low, (6,)).dtype == torch.float32
        assert low.softmax(-1).dtype == torch.float32
        assert torch.softmax(low, -1, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert F.gelu(low).dtype == torch.bfloat16
        assert (low + x).dtype == torch.float32
        assert F.conv2d(x.double(), weight.double()).dtype == torch.float64
    assert F.conv2d(x, weight).dtype == torch.float32


def test_the_package_s_ops_see_it_while_planning() -> None:
    x = torch.empty(2, 3, device="meta")
    with planning(90), CudaAutocast(torch.float16):
        assert autocast_dtype(x) == torch.float16
        inside = without_autocast(lambda x: (autocast_dtype(x), (x @ x.t()).dtype))
        assert inside(x) == (None, torch.float32)
    assert not torch.is_autocast_enabled("cuda")
