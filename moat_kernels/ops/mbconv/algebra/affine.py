"""A batch norm as one scale and shift per channel."""

from __future__ import annotations

import torch
from torch import Tensor

from moat_kernels.ops.mbconv.description import NormParameters


def scale_and_bias(parameters: NormParameters, inverse_std: Tensor) -> tuple[Tensor, Tensor]:
    """(weight / std, bias) of a norm [C] in the dtype of inverse_std; its defaults are 1 and 0."""
    scale = inverse_std if parameters.weight is None else inverse_std * parameters.weight
    if parameters.bias is None:
        return scale, torch.zeros_like(inverse_std)
    return scale, parameters.bias.to(inverse_std.dtype)
