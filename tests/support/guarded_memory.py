"""Tensors behind which no memory may be read: whoever does crashes, by vectors and tiles too.

AddressSanitizer does not see what inline assembly reads.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_NO_ACCESS = 0  # PROT_NONE


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy that ends where a page begins that nobody may touch."""
    size = tensor.numel() * tensor.element_size()
    page = mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(start + pages * page)
    if libc.mprotect(guard, ctypes.c_size_t(page), _NO_ACCESS) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    begin = (pages * page - size) // tensor.element_size()
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=begin + tensor.numel())[begin:]
    return copy.copy_(tensor.flatten()).view(tensor.shape)
