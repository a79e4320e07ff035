"""One training step of a MOAT, traced on meta tensors: forward, loss, backward, optimiser."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from moat_kernels.models import create_model
from moat_kernels.ops.common.backends import use_backend
from moat_kernels.ops.common.device import planning
from moat_kernels.ops.common.registration import looking_inside
from moat_kernels.ops.triton_support.launching import triton_missing
from moat_kernels.ops.triton_support.traffic import Pass, crossing_of, record_passes
from moat_kernels.plan.autocast import CudaAutocast
from moat_kernels.plan.meter import Meter
from moat_kernels.plan.operators import OperatorPass

# Plain PyTorch, and fused blocks by what they recompute.
BLOCKS = ("stock", "none", "expand", "block")

# By name: whether forward runs under autocast, and in which dtype.
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}

# Float32 numbers that an optimiser keeps for each parameter.
OPTIMIZERS = {"adamw": 2, "sgd-momentum": 1, "sgd": 0}


# Pixels of the image for one of the last map.
MODEL_STRIDE = 32


@dataclass(frozen=True)
class Step:
    """A training step, predicted.

    passes: its kernels in order, those of backward and of the optimiser behind the first `forward`.
    peak: bytes of tensors at most, with those of `state`.
    state: bytes of the parameters, the buffers and what the optimiser keeps.
    saved: bytes alive between forward and backward beyond `state`.
    """

    passes: tuple[Pass, ...]
    forward: int
    peak: int
    state: int
    saved: int


class TrainingStep:
    """A variant at one resolution, ready to be traced at any batch size.

    blocks: one of BLOCKS.
    precision: one of PRECISIONS; parameters are in float32.
    optimizer: one of OPTIMIZERS, as one kernel that updates all parameters (`fused=True` in
        PyTorch).
    architecture: compute capability of the GPU as 10 * major + minor.

    Inputs and weights are in channels_last. Raises ValueError for what it does not know, and
    RuntimeError for fused blocks where Triton is not installed.
    """

    def __init__(
        self,
        model: str,
        resolution: int,
        blocks: str,
        *,
        precision: str = "bfloat16",
        optimizer: str = "adamw",
        architecture: int = 80,
    ) -> None:
        for name, value, known in (
            ("blocks", blocks, BLOCKS),
            ("precision", precision, PRECISIONS),
            ("optimizer", optimizer, OPTIMIZERS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not isinstance(resolution, int) or resolution <= MODEL_STRIDE:
            raise ValueError(
                f"resolution must be more than {MODEL_STRIDE} pixels, for a last map of more than "
                f"one, got {resolution!r}"
            )
        fused = blocks != "stock"
        if fused and triton_missing():
            raise RuntimeError(f"fused blocks cannot be planned: {triton_missing()}")
        self.resolution = resolution
        self.precision = PRECISIONS[precision]
        self.architecture = architecture
        self.backend = "triton" if fused else "reference"
        with torch.device("meta"):
            self.model = create_model(model, fused=fused, recompute=blocks if fused else "auto")
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.parameters = list(self.model.parameters())
            self.optimizer_state = [
                torch.empty_like(parameter, requires_grad=False)
                for parameter in self.parameters
                for _ in range(OPTIMIZERS[optimizer])
            ]

    def trace(self, batch: int) -> Step:
        """The step with `batch` images."""
        self.model.zero_grad(set_to_none=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(planning(self.architecture))
            stack.enter_context(use_backend(self.backend))
            stack.enter_context(looking_inside())
            passes = stack.enter_context(record_passes())
            meter = stack.enter_context(Meter(passes))
            meter.hold((*self.parameters, *self.model.buffers(), *self.optimizer_state))
            state = meter.live
            size = (batch, 3, self.resolution, self.resolution)
            images = torch.empty(size, device="meta", memory_format=torch.channels_last)
            # For backward too, where Python code runs in checkpoints, which compute their forward
            # again, and in this package's ops, which switch autocast off.
            stack.enter_context(self._autocast())
            loss = self._loss(images)
            forward, saved = len(passes), meter.live - state
            _backward(loss)
            peak = meter.peak
        passes.append(self._update())
        return Step(tuple(passes), forward, peak, state, saved)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.precision is None else CudaAutocast(self.precision)

    def _loss(self, images: Tensor) -> Tensor:
        labels = torch.empty(len(images), dtype=torch.int64, device="meta")
        return F.cross_entropy(self.model(images).float(), labels)

    def _update(self) -> Pass:
        """The optimiser: reads parameters, gradients and its state, writes all but the gradients.

        It allocates nothing.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        updated = [*self.parameters, *self.optimizer_state]
        reads = [tensor for tensor in (*updated, *gradients) if tensor is not None]
        crossings = (tuple(crossing_of(tensor) for tensor in side) for side in (reads, updated))
        read, written = crossings
        return OperatorPass("optimizer", read, written, 0, "float32")


def _backward(loss: Tensor) -> None:
    """`loss.backward()`, without its detour by modes of torch functions, which ends the outer one.

    Checkpoints, which compute their forward again, need the autocast of `CudaAutocast`.
    """
    gradient = torch.ones_like(loss)
    _engine_run_backward(
        *((loss,), (gradient,), False, False, ()), allow_unreachable=True, accumulate_grad=True
    )
