"""The shortcut beside the Triton kernels, as rows.

Its pool is made beside other launches (kernels/fold.py, kernels/norm.py), its convolution is a part
of `project`, the gradient of its weight of `expand_products`; what is left is one product. Pools
other than the average of 2x2 pixels of maps of even sizes are stock PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moat_kernels.ops.common.spatial import may_pad, resolve_padding
from moat_kernels.ops.mbconv.algebra.geometry import Stencil
from moat_kernels.ops.mbconv.algebra.stages import PoolStage, as_rows
from moat_kernels.ops.mbconv.description import Pool
from moat_kernels.ops.mbconv.triton.kernels.shortcut import Pooling


class Shortcut:
    """Of one call.

    x: [B, H, W, C], contiguous. stencil: of the block, which tells the size of the output. dtype:
    of the products if it is projected, else of x.
    """

    def __init__(self, x: Tensor, stencil: Stencil, pool: Pool | None, dtype: torch.dtype) -> None:
        self.x = x
        self.x_rows = x.view(-1, x.shape[3])
        self.stencil = stencil
        self.pool = pool
        self.dtype = dtype

    def pooling(self) -> Pooling:
        """The pool for a kernel, where that makes it."""
        rows = self.x_rows if self._is_quartered() else None
        return Pooling.of(rows, self.x.shape[2], self.dtype)

    def rows(self, pooling: Pooling) -> Tensor:
        """Pooled x [M, C]. pooling: what `pooling` gave, once a kernel has made it."""
        if pooling.pooled is not None:
            return pooling.pooled
        if self.pool is None:
            return self.x_rows.to(self.dtype)
        pooled = PoolStage(self.pool).forward(self.x.permute(0, 3, 1, 2))
        return as_rows(pooled).to(self.dtype).contiguous()

    def input_gradient(self, grad: Tensor, weight: Tensor | None) -> Tensor:
        """Gradient of x from the output's [M, C_out]: [N, C].

        It is [N / 4, C] where 2x2 pixels share each row of it. weight: [C_out, C], in the dtype
        of grad.
        """
        if weight is not None:
            grad = grad @ weight
        if self.pool is None or self._is_quartered():
            return grad
        size = (self.stencil.batch, self.stencil.out_height, self.stencil.out_width, -1)
        x = self.x.permute(0, 3, 1, 2).to(grad.dtype)
        spread = PoolStage(self.pool).backward(grad.view(size).permute(0, 3, 1, 2), x, True)
        assert spread is not None
        return as_rows(spread).contiguous()

    def _is_quartered(self) -> bool:
        """Whether the pool is the mean of 2x2 pixels, none of them outside."""
        pool, (height, width) = self.pool, self.x.shape[1:3]
        if pool is None or (pool.kind, pool.kernel_size, pool.stride) != ("average", 2, 2):
            return False
        padding = resolve_padding(pool.padding, height, width, (2, 2), 2)
        return not may_pad(padding) and height % 2 == 0 and width % 2 == 0
