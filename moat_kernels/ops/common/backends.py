"""Which backend computes an op: what is usable, what the user asked for, what covers the call."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from moat_kernels.extension import load_extension
from moat_kernels.ops.common.device import planned_architecture
from moat_kernels.ops.triton_support.launching import interpreting, triton_missing

BACKENDS = ("reference", "torch", "cpu", "triton")
ENVIRONMENT_VARIABLE = "MOAT_KERNELS_BACKEND"

# Tried in this order, by the type of the tensor's device, when no backend was asked for.
_PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "torch", "reference"),
    "cuda": ("triton", "torch", "reference"),
}
_DEFAULT_PREFERENCE = ("torch", "reference")

NO_TORCHSCRIPT = (
    "fused blocks do not become TorchScript; torch.export and torch.onnx.export work, "
    "and so does torch.jit.trace of a model with fused=False, or unfuse it"
)

_requested: ContextVar[str | None] = ContextVar("moat_kernels_backend", default=None)
_warned: set[str] = set()

Implementation = TypeVar("Implementation")
Result = TypeVar("Result")


class FallbackWarning(UserWarning):
    """A call was computed by a slower backend than the one asked for; the text names the reason."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run in this process, and if not, why not."""

    usable: bool
    reason: str = ""


def _triton_status() -> BackendStatus:
    reason = triton_missing()
    if not reason and not interpreting() and not torch.cuda.is_available():
        reason = "no CUDA device that torch can use, and TRITON_INTERPRET=1 is not set"
    return BackendStatus(not reason, reason)


# Loaded here rather than at the first call, which torch.compile may be tracing.
_EXTENSION = load_extension()
_STATUS = {
    "reference": BackendStatus(True),
    "torch": BackendStatus(True),
    "cpu": BackendStatus(_EXTENSION.usable, f"native kernels {_EXTENSION.reason}"),
    "triton": _triton_status(),
}


def backend_status() -> dict[str, BackendStatus]:
    """The state of every backend of this version, by name."""
    return dict(_STATUS)


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        supported = ", ".join(BACKENDS)
        raise ValueError(f"{source} names the backend {name!r}; this version has: {supported}")
    status = backend_status()[name]
    planned = name == "triton" and planned_architecture() is not None and not triton_missing()
    if not status.usable and not planned:
        raise RuntimeError(f"{source} names the backend {name!r}, not usable here: {status.reason}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute every op inside the `with` block by backend `name`, in this thread or task.

    Raises ValueError for an unknown name and RuntimeError if the backend is not usable here.
    A call that the backend does not cover falls back to "reference" with a FallbackWarning.
    """
    _check_name(name, "use_backend")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@torch.compiler.assume_constant_result
def requested_backend() -> str | None:
    """The backend asked for by `use_backend` or else MOAT_KERNELS_BACKEND; None: choose.

    torch.compile asks once, when it traces.
    """
    name = _requested.get()
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or None
        if name is not None:
            _check_name(name, ENVIRONMENT_VARIABLE)
    return name


def keep_backend(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, asking for the backend that is asked for now, whenever and wherever it runs.

    For what autograd calls again in its backward pass, outside the `use_backend` block.
    """
    requested = None if torch.compiler.is_compiling() else requested_backend()
    if requested is None:
        return function

    def run(*arguments: Any) -> Result:
        with use_backend(requested):
            return function(*arguments)

    return run


def warn_once(message: str) -> None:
    """Emit a FallbackWarning the first time that `message` occurs in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=4)


def choose_backend(
    op: str,
    device: torch.device,
    backends: Mapping[str, Implementation],
    unsupported: Callable[[Implementation], str],
    *,
    optional: bool = False,
) -> str:
    """The backend that computes this call of `op`: a key of `backends`, or "reference".

    unsupported: tells why a backend does not cover the call; empty if it does.
    optional: plain PyTorch does as well where no backend covers the call, so there is nothing to
        warn of, and nothing to refuse where PyTorch's own operators are needed.
    """
    requested = requested_backend()
    if requested is not None:
        candidates: tuple[str, ...] = (requested,)
    else:
        preferred = _PREFERENCE.get(device.type, _DEFAULT_PREFERENCE)
        candidates = tuple(name for name in preferred if _STATUS[name].usable)
    if optional and needs_standard_operators():
        return "reference"
    reasons = []
    chosen = "reference"
    for name in candidates:
        if name == "reference":
            break
        reason = unsupported(backends[name]) if name in backends else "the op"
        if not reason:
            chosen = name
            break
        reasons.append(f"backend {name!r} does not cover {reason}")
    # Of the backends that nobody asked for, only the last one's failure costs much speed.
    if reasons and not optional and (requested is not None or chosen == "reference"):
        warn_once(f"{op}: {'; '.join(reasons)}; falling back to {chosen!r}")
    return chosen if chosen == "reference" else _where_operators_are_known(op, chosen)


def is_exporting() -> bool:
    """torch.compiler.is_exporting; PyTorch 2.11 traces that as True in torch.compile too."""
    return torch.compiler._is_exporting_flag


def is_eager() -> bool:
    """Whether a call runs as it is: not compiled, exported, transformed or traced."""
    return not (torch.compiler.is_compiling() or needs_standard_operators())


def needs_standard_operators() -> bool:
    """Whether the call is seen by what knows PyTorch's own operators only.

    That is an ONNX export, torch.func's transforms or torch.jit.trace.
    """
    return (
        torch.onnx.is_in_onnx_export()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())
    )


def _where_operators_are_known(op: str, chosen: str) -> str:
    """`chosen`, or "reference" in an ONNX export, which knows standard operators only.

    Raises RuntimeError under torch.func's transforms and torch.jit.trace.
    """
    if torch.onnx.is_in_onnx_export():
        return "reference"
    if torch.compiler.is_compiling():
        return chosen
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{op}: backend {chosen!r} has no rules for torch.func transforms (grad, vmap, jvp, "
            "...); under moat_kernels.use_backend('reference') it is plain PyTorch, which has"
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(f"{op}: {NO_TORCHSCRIPT}")
    return chosen
