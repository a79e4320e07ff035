"""Planning for a GPU that is not there: meta tensors stand for tensors on it.

Meta tensors have shapes, dtypes and storages of known size, and no data. PyTorch's own fake tensors
"on cuda" could stand for a GPU's as well, but builds of PyTorch without CUDA refuse to
differentiate them, and every call on them takes some ten times longer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

_architecture: ContextVar[int | None] = ContextVar("planned_architecture", default=None)


@contextlib.contextmanager
def planning(architecture: int) -> Iterator[None]:
    """Inside the block meta tensors stand for tensors on a GPU, and launches on them do nothing.

    architecture: its compute capability as 10 * major + minor. `use_backend("triton")` is allowed
    without a GPU, and autocast is that of CUDA devices (`torch.set_autocast_enabled("cuda", ...)`)
    as far as this package's ops are concerned.
    """
    token = _architecture.set(architecture)
    try:
        yield
    finally:
        _architecture.reset(token)


def planned_architecture() -> int | None:
    """The compute capability of the GPU that is planned for; None: outside `planning`."""
    return _architecture.get()


def device_type(x: Tensor) -> str:
    """The type of the device that `x` is on, or stands for."""
    if x.device.type == "meta" and planned_architecture() is not None:
        return "cuda"
    return x.device.type
