"""Memory: what autograd keeps for the backward pass, and what the native kernels keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from moat_kernels.extension import load_extension


def saved_bytes(function: Callable[[], Any], excluded: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves for backward while `function` computes its result.

    Each storage counts once, whole. excluded: tensors whose storages do not count, such as a
    model's parameters and buffers, which exist anyway.
    """
    owned = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    # Holding the storages keeps their addresses from being used again.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in storages.values())


def release_scratch() -> int:
    """Free the scratch memory that the native CPU kernels keep between calls; the bytes it had.

    It is one block of at most 32 MiB per process, as large as a call has needed so far.
    """
    return torch.ops.moat_kernels.cpu_release_scratch() if load_extension().usable else 0
