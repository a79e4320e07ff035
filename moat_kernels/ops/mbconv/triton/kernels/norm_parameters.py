"""What kernels read of a norm's parameters, and the update of its running statistics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.common.batch_norm import NormParameters, RunningUpdate


@triton.jit
def optional(pointer, channel, valid, DEFAULT: tl.constexpr):
    """A vector's elements in float32, or its default where it is None."""
    if pointer is None:
        return tl.full(channel.shape, DEFAULT, tl.float32)
    else:
        return tl.load(pointer + channel, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def update_running(mean_ptr, variance_ptr, channel, valid, mean, variance, momentum):
    """running += momentum * (batch - running), of some channels."""
    running_mean = tl.load(mean_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    running_variance = tl.load(variance_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    running_mean += momentum * (mean - running_mean)
    running_variance += momentum * (variance - running_variance)
    tl.store(mean_ptr + channel, running_mean.to(mean_ptr.dtype.element_ty), mask=valid)
    tl.store(variance_ptr + channel, running_variance.to(variance_ptr.dtype.element_ty), mask=valid)


@triton.jit
def count_batch(tracked_ptr):
    """num_batches_tracked += 1; by one program."""
    if tracked_ptr is not None:
        tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)


def running_tensors(
    parameters: NormParameters, frozen: bool, update: RunningUpdate | None
) -> tuple[Tensor | None, ...]:
    """Running mean, variance and count of batches that a kernel reads or updates, if any."""
    if frozen:
        return parameters.running_mean, parameters.running_var, None
    return (None, None, None) if update is None else update.tensors
