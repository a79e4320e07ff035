"""Sums over the ranks of a process group: what synchronised batch norm needs of torch.distributed.

Groups travel as their names: operator schemas carry strings, and torch.compile follows them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_name() -> str | None:
    """The name of the group of all ranks; None where there is no other rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return group_name(dist.group.WORLD)


def group_name(group: Any) -> str | None:
    """The name of a ProcessGroup; None where it has no other rank."""
    return group.group_name if group.size() > 1 else None


def all_reduce(tensor: Tensor, group: str) -> Tensor:
    """The sum of every rank's `tensor`, on every rank; not differentiable."""
    reduced = torch.ops._c10d_functional.all_reduce(tensor.contiguous(), "sum", group)
    return torch.ops._c10d_functional.wait_tensor(reduced)


class _DifferentiableAllReduce(torch.autograd.Function):
    """Every rank's loss depends on every rank's summand: gradients are summed over ranks too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str) -> Tensor:
        ctx.group = group
        return all_reduce(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return differentiable_all_reduce(grad, ctx.group), None


def differentiable_all_reduce(tensor: Tensor, group: str) -> Tensor:
    """`all_reduce` with the gradient of the sum of all ranks' losses, any number of times."""
    return _DifferentiableAllReduce.apply(tensor, group)


def combine_moments(
    count: int, mean: Tensor, scatter: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(count [], mean [C], scatter) of all ranks' rows from those of each rank: one all-reduce.

    scatter: the sum over rows of (row - mean) squared [C], or times itself transposed [C, C].
    mean: finite (say 0) where count is 0.

        scatter = sum_r scatter_r + count_r (mean_r - mean) (mean_r - mean)^T

    Counts and means go into a table with one row for each rank, zeros in the others' rows: its sum
    gathers them unrounded, and nothing of the size of a squared mean is ever subtracted.
    """
    process_group = _resolve(group)
    table = mean.new_zeros(process_group.size(), 1 + mean.shape[0])
    own = table[process_group.rank()]
    own[0] = count
    own[1:] = mean
    reduced = all_reduce(torch.cat([table.flatten(), scatter.flatten()]), group)
    table, scatter = (
        reduced[: table.numel()].view_as(table),
        reduced[table.numel() :].view_as(scatter),
    )
    counts, means = table[:, :1], table[:, 1:]
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp(min=1)
    deviation = (means - mean) * counts.sqrt()
    between = deviation.t() @ deviation if scatter.dim() == 2 else deviation.square().sum(0)
    return total, mean, scatter + between


def _resolve(group: str) -> Any:
    try:
        return torch._C._distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise ValueError(
            f"process_group must name a group of torch.distributed in this process, got {group!r}"
        ) from error
