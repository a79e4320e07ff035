"""Bytes kept for the backward pass, the peak of a call, and memory that is kept for reuse."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moat_kernels.extension import load_extension


def saved_bytes(function: Callable[[], Any], excluded: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves for backward while `function` computes its result.

    Each storage counts once, whole.

    excluded: tensors whose storages do not count, such as a model's parameters and buffers, which
        exist anyway.

    >>> x = torch.ones(1000, requires_grad=True)
    >>> saved_bytes(lambda: x.exp())
    4000
    """
    owned = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    # Holding the storages keeps their addresses from being used again.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage
        return tensor.detach()  # an operation that saves its own output would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(function: Callable[[], Any]) -> int | None:
    """Bytes by which the memory of this process grows while `function` runs, at its peak.

    Growth of the resident set: whole pages, with all that the allocator holds, to within some
    hundred KiB (Linux counts pages in batches). Memory that earlier calls left behind, free or kept
    for reuse, is given back first, so what a function keeps from one call to the next counts unless
    it lies outside of malloc and of these kernels. None where the system does not tell: it is read
    from Linux's /proc.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def resident(field: str) -> int:
        lines = status.read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field + ":")))

    gc.collect()
    release_memory()
    with suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
    # Linux forgets the peak so far; where it may not, peaks before this call count as well.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def release_memory() -> int:
    """Give the memory that the native CPU kernels keep between calls back to the system.

    Blocks from 2 MiB on, of training and of frozen models, and in eval from 32 MiB on, are kept, in
    all at most what was in use at a time; of those long out of use the system may take the pages
    when it runs short. Beside them eval keeps one block of at most 32 MiB per process, as large as
    a call has needed so far. Returns the number of bytes freed.
    """
    if not load_extension().usable:
        return 0
    native = torch.ops.moat_kernels
    return native.cpu_release_memory() + native.cpu_release_scratch()
