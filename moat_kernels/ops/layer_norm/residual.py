"""x + scale * branch in one pass each way, by stock operations, on any device.

Of maps of n elements, forward: reads x and branch, writes the sum, where stock modules, which
scale first, write and read n more. Backward: reads the gradient and writes that of the branch in
its own dtype; x's is the gradient itself. Keeps nothing but the scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import without_autocast


def add_branch(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """x + scale * branch, in the wider of their dtypes; x and branch [B, ...], scale [B] or None.

    The gradient does not flow to `scale`. Not differentiable twice.
    """
    return x + branch if scale is None else _AddScaled.apply(x, branch, scale)


def _along(scale: Tensor, x: Tensor) -> Tensor:
    return scale.view(-1, *(1,) * (x.dim() - 1))


@without_autocast  # which would first copy the narrower one to the wider dtype
def _scaled_sum(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(x, branch, _along(scale, branch))


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.branch_dtype = branch.dtype
        return _scaled_sum(x, branch, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        grad_branch = torch.empty_like(grad, dtype=ctx.branch_dtype)
        torch.mul(grad, _along(scale, grad), out=grad_branch)
        return grad, grad_branch, None
