"""Whether Triton can run here, and launching its kernels."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from moat_kernels.ops.common.device import device_type, planned_architecture
from moat_kernels.ops.triton_support import traffic

MINIMUM_TRITON = "3.6"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Result = TypeVar("Result")


@functools.cache
def triton_missing() -> str:
    """Why Triton cannot be imported here; empty: it can. Does not import it."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if TorchVersion(version) < MINIMUM_TRITON:
        return f"triton {version} is installed; at least {MINIMUM_TRITON} is needed"
    return ""


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_tensor(x: Tensor) -> str:
    """Why Triton kernels do not take `x`; empty: they do."""
    if device_type(x) != ("cpu" if interpreting() else "cuda"):
        return f"tensors on {x.device}"
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    return ""


def architecture(device: torch.device) -> int:
    """Compute capability of a device as 10 * major + minor; 0 where it is not an NVIDIA GPU."""
    planned = planned_architecture() if device.type == "meta" else None
    return _architecture(device) if planned is None else planned


@functools.cache
def _architecture(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiplies_as_tf32() -> bool:
    """Whether PyTorch multiplies float32 matrices on CUDA devices as TF32.

    However that was set: `allow_tf32` raises an error once `fp32_precision` says so.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def device_name(device: torch.device) -> str:
    """The GPU's name as its driver tells it; empty where there is no GPU that torch can use."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    return torch.cuda.get_device_name(device)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    reads: Sequence[traffic.Touched],
    writes: Sequence[traffic.Touched],
    flops: int = 0,
    **options: Any,
) -> None:
    """Run `kernel` on `grid` programs, on the device of the first argument, a tensor.

    reads, writes: what crosses DRAM, once; every tensor among the arguments is in one of them (None
    where it is optional and absent). flops: of products, in the dtype of the first argument and
    PRECISION, or of stencils. options: its compile-time arguments, num_warps and num_stages. Does
    nothing for an empty grid, and for tensors without data: fake ones and those of `planning`.
    """
    if 0 in grid:
        return
    if traffic.recording():
        unit = _arithmetic(arguments[0].dtype, options.get("PRECISION"))
        traffic.record(kernel.fn.__name__, arguments, reads, writes, flops, unit)
    planned = arguments[0].device.type == "meta" and planned_architecture() is not None
    if planned or isinstance(arguments[0], FakeTensor):
        return
    options.setdefault("enable_fp_fusion", True)
    device = arguments[0].device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        compiled = _run(kernel, grid, arguments, options)
    else:
        with torch.cuda.device(device):
            compiled = _run(kernel, grid, arguments, options)
    listener = _listener.get()
    if listener is not None:
        listener(Launched(kernel, grid, arguments, options, compiled))


def _run(kernel: Any, grid: tuple[int, ...], arguments: Any, options: dict[str, Any]) -> Any:
    if is_in_torch_dispatch_mode() and interpreting():
        # The interpreter copies tensors by operators that are no part of the call.
        with _disable_current_modes():
            return kernel[grid](*arguments, **options)
    return kernel[grid](*arguments, **options)


def _arithmetic(dtype: torch.dtype, precision: str | None) -> str:
    """Where a kernel multiplies: see `traffic.Pass`. Those without products have no precision."""
    if precision is None:
        return "float32"
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    return "float32" if precision == "ieee" else precision


class Launched(NamedTuple):
    """A launch that was made. compiled: what its kernel was compiled to; None: interpreted."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    compiled: Any


Listener = Callable[[Launched], None]
_listener: ContextVar[Listener | None] = ContextVar("moat_kernels_launch_listener", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of every launch inside the `with` block, in this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def is_heard() -> bool:
    """Whether somebody is told of the launches in this thread."""
    return _listener.get() is not None


@contextlib.contextmanager
def collect_compiled() -> Iterator[list[Any]]:
    """What the kernels launched inside the `with` block were compiled to (None: interpreted)."""
    compiled: list[Any] = []
    with listening(lambda launched: compiled.append(launched.compiled)):
        yield compiled


# Sees each call of a launcher: gets it as a function without arguments, and returns its result.
Observer = Callable[[Callable[[], Any]], Any]
_observer: ContextVar[Observer | None] = ContextVar("moat_kernels_launch_observer", default=None)


def tunable(launcher: Callable[..., Result]) -> Callable[..., Result]:
    """Mark a function that makes one choice in a launch table and may be called repeatedly."""

    @functools.wraps(launcher)
    def call(*arguments: Any, **options: Any) -> Result:
        observer = _observer.get()
        if observer is None:
            return launcher(*arguments, **options)
        return observer(functools.partial(launcher, *arguments, **options))

    return call


@contextlib.contextmanager
def observing(observer: Observer | None) -> Iterator[None]:
    """Hand the calls of launchers inside the `with` block, in this thread, to `observer`."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def is_observed() -> bool:
    """Whether an observer sees the calls of launchers in this thread."""
    return _observer.get() is not None
