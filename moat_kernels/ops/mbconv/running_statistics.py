"""In-place update of the running statistics of an inverted bottleneck's norms."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moat_kernels.ops.common.batch_norm import update_norm
from moat_kernels.ops.mbconv.description import MBConvDescription, MBConvParameters


def values_per_channel(
    name: str, description: MBConvDescription, rows_in: int, rows_out: int
) -> int:
    """How many values per channel the norm called `name` sees: B*H*W before or after the stride."""
    before_stride = {"pre_norm"}
    if description.order == "expand_first":
        before_stride.add("expand_norm")
    return rows_in if name in before_stride else rows_out


def update_running_statistics(
    x: Tensor,
    output: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    moments: Mapping[str, tuple[Tensor, ...]],
) -> None:
    """Update every norm in `moments` (name -> batch mean, biased variance, count over ranks)."""
    rows_in = x.shape[0] * x.shape[2] * x.shape[3]
    rows_out = output.shape[0] * output.shape[2] * output.shape[3]
    for name, (mean, variance, *joined) in moments.items():
        count = joined[0] if joined else values_per_channel(name, description, rows_in, rows_out)
        update_norm(getattr(description, name), getattr(parameters, name), mean, variance, count)
