"""What training the attention half computes: its settings and its layers' tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moat_kernels.ops.window_attention.description import WindowAttentionDescription


class Layers(NamedTuple):
    """The norm [C], qkv [3 * heads * head_dim, C] and proj [C, heads * head_dim], with biases."""

    norm_weight: Tensor
    norm_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor


@dataclass(frozen=True)
class Half:
    """y + factor * kept * proj(attention(qkv(layer_norm(y)))).

    factor: 1 / p where samples are kept with probability p.
    dtype: of the products, autocast's or y's.
    """

    description: WindowAttentionDescription
    eps: float
    factor: float
    dtype: torch.dtype


class Forward(NamedTuple):
    """The output, as y, and what the backward pass takes beside the arguments."""

    output: Tensor
    saved: list[Tensor]
