"""The shortcut beside the Triton kernels, as rows: its pool by a kernel, its convolution by BLAS.

Pools other than the average of 2x2 pixels of maps of even sizes are stock PyTorch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.spatial import may_pad, resolve_padding
from moat_kernels.ops.mbconv.algebra.geometry import Stencil
from moat_kernels.ops.mbconv.algebra.stages import PoolStage, as_rows
from moat_kernels.ops.mbconv.description import Pool
from moat_kernels.ops.mbconv.triton.kernels.fold import Ready, Weights
from moat_kernels.ops.mbconv.triton.kernels.shortcut import pool_rows
from moat_kernels.ops.triton_support.products import weight_gradient


class Shortcut:
    """Of one call.

    x: [B, H, W, C], contiguous. stencil: of the block, which tells the size of the output. weights:
    as they are given; ready: as the products take them.
    """

    def __init__(
        self, x: Tensor, stencil: Stencil, pool: Pool | None, ready: Ready, weights: Weights
    ) -> None:
        self.x = x
        self.stencil = stencil
        self.pool = pool
        self.weight, self.bias = ready.shortcut, ready.shortcut_bias
        self.weights = weights

    def forward(self) -> Tensor:
        """What is added to the bottleneck: [M, C_out], in the dtype of the weight or of x."""
        rows = self._pooled()
        if self.weight is None:
            return rows
        return F.linear(rows.to(self.weight.dtype), self.weight, self.bias)

    def backward(
        self, grad: Tensor, low_grad: Tensor, needed: frozenset[str]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """(gradient of x [N, C] if it is needed, the weight's by name).

        That of x is [N / 4, C] where 2x2 pixels share each row of it. grad: of the output
        [M, C_out]; low_grad: the same in the dtype of the weight.
        """
        gradients: dict[str, Tensor] = {}
        if self.weight is not None:
            grad = low_grad
            if "shortcut_weight" in needed:
                rows, owner = self._pooled().to(self.weight.dtype), self.weights.shortcut
                assert owner is not None
                gradients["shortcut_weight"] = weight_gradient(grad, rows, owner.dtype)
        if "x" not in needed:
            return None, gradients
        if self.weight is not None:
            grad = grad @ self.weight
        if self.pool is None or self._is_quartered():
            return grad, gradients
        size = (self.stencil.batch, self.stencil.out_height, self.stencil.out_width, -1)
        x = self.x.permute(0, 3, 1, 2).to(grad.dtype)
        spread = PoolStage(self.pool).backward(grad.view(size).permute(0, 3, 1, 2), x, True)
        assert spread is not None
        return as_rows(spread).contiguous(), gradients

    def _pooled(self) -> Tensor:
        """[M, C] in the dtype of x."""
        if self.pool is None:
            return self.x.view(-1, self.x.shape[3])
        if self._is_quartered():
            return pool_rows(self.x.view(-1, self.x.shape[3]), self.x.shape[2])
        return as_rows(PoolStage(self.pool).forward(self.x.permute(0, 3, 1, 2))).contiguous()

    def _is_quartered(self) -> bool:
        """Whether the pool is the mean of 2x2 pixels, none of them outside."""
        pool, (height, width) = self.pool, self.x.shape[1:3]
        if pool is None or (pool.kind, pool.kernel_size, pool.stride) != ("average", 2, 2):
            return False
        padding = resolve_padding(pool.padding, height, width, (2, 2), 2)
        return not may_pad(padding) and height % 2 == 0 and width % 2 == 0
