"""Tensors of modules are read wherever the module keeps or computes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moat_kernels.tensor_access import tensor_of


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parameters_buffers_and_parametrizations() -> None:
    norm = nn.BatchNorm2d(3, affine=False)
    assert tensor_of(norm, "running_mean") is norm.running_mean
    assert tensor_of(norm, "weight") is None
    linear = nn.Linear(2, 2)
    assert tensor_of(linear, "weight") is linear.weight
    weight = linear.weight.detach().clone()
    parametrize.register_parametrization(linear, "weight", Doubled())
    assert torch.equal(tensor_of(linear, "weight"), 2 * weight)
    assert tensor_of(None, "weight") is None
