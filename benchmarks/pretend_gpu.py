"""The host's share of GPU kernels without a GPU: launches go through Triton up to the driver.

Tensors are the CPU's, whose stock operators run as they are; Triton's kernels are bound, looked up
and handed to a launcher that does nothing. Uses private parts of Triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from moat_kernels.ops.attention_half import dispatch as attention_half
from moat_kernels.ops.common import backends
from moat_kernels.ops.layer_norm.triton import backend as layer_norm
from moat_kernels.ops.mbconv.triton import backend as mbconv
from moat_kernels.ops.window_attention.triton import backend as window_attention

_TARGET = GPUTarget("cuda", 90, 32)


class _Driver:
    """What launching asks Triton's driver for."""

    def get_current_target(self) -> GPUTarget:
        return _TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Compiled:
    """A kernel that was compiled and is launched: nothing happens."""

    function, packed_metadata = 0, ()

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        return None


def _compile(kernel: JITFunction, key: str, signature: Any, device: int, *_: Any) -> _Compiled:
    return kernel.device_caches[device][0].setdefault(key, _Compiled())


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Inside the `with` block the backend "triton" takes the CPU's tensors and computes nothing."""
    usable = {"triton": backends.BackendStatus(True)}
    with contextlib.ExitStack() as stack:
        for backend in (attention_half, layer_norm, mbconv, window_attention):
            stack.enter_context(mock.patch.object(backend, "unsupported_tensor", lambda _: ""))
        stack.enter_context(mock.patch.dict(backends._STATUS, usable))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", _compile))
        stack.enter_context(backends.use_backend("triton"))
        yield
