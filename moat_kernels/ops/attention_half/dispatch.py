"""How a call of the attention half is computed by one operator: decided once for calls alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.attention_half import api, cpu, training
from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.backends import is_eager, requested_backend
from moat_kernels.ops.common.device import device_type
from moat_kernels.ops.triton_support.launching import unsupported_tensor
from moat_kernels.ops.window_attention.description import WindowAttentionDescription

# Ways to compute a call: without gradients by one of `api.BACKENDS`, or in training.
TRAINING = "training"

# Ways of calls by `_signature`. Threads may race to add the same one, which is harmless.
_ways: dict[tuple[Any, ...], str] = {}
_MOST_WAYS = 1024


def may_cover(y: Tensor) -> bool:
    """Whether there may be a way for such a map, whatever the layers; told at once."""
    recorded = torch.is_grad_enabled() and y.requires_grad
    if y.device.type == "cpu" and y.dtype in cpu.DTYPES and not recorded:
        return True
    return not unsupported_tensor(y)


def way_to_compute(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    description: WindowAttentionDescription,
    drops: bool,
) -> str:
    """A key of `api.BACKENDS`, or TRAINING; empty if no operator computes the call.

    tensors: as `api.attention_half` takes them. drops: whether samples may lose the branch.
    """
    if not is_eager() or type(y) is not Tensor:  # sizes may be symbols
        return _choose(y, tensors, description, drops)
    signature = (
        description,
        drops,
        requested_backend(),
        autocast_dtype(y),
        device_type(y),
        torch.is_grad_enabled(),
        *[t if t is None else (t.shape, t.dtype, t.device, t.requires_grad) for t in (y, *tensors)],
    )
    way = _ways.get(signature)
    if way is None:
        way = _choose(y, tensors, description, drops)
        if len(_ways) >= _MOST_WAYS:
            _ways.clear()
        _ways[signature] = way
    return way


def _choose(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    description: WindowAttentionDescription,
    drops: bool,
) -> str:
    backend = "" if drops else api.covering(y, tensors, description)
    if backend:
        return backend
    *layers, table = tensors
    return TRAINING if training.covers(y, layers, table, description) else ""
