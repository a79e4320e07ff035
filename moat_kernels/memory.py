"""Bytes that autograd keeps between forward and backward, and memory that is kept for reuse."""

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


def release_memory() -> int:
    """Give the memory that the native CPU kernels keep between calls back to the system.

    For training, blocks above 2 MiB are kept, in all at most what was in use at a time; the system
    may take their pages away when it runs short. For eval it is one block of at most 32 MiB per
    process, as large as a call has needed so far. Returns the number of bytes freed.
    """
    if not load_extension().usable:
        return 0
    native = torch.ops.moat_kernels
    return native.cpu_release_memory() + native.cpu_release_scratch()
