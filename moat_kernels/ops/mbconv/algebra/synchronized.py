"""Batch norm over the rows of all ranks: the stages whose norms name a process group.

One all-reduce in the forward pass for each stage, and one in the backward pass: pre_norm and
expand_norm share theirs, (count, mean, covariance), as they share the covariance. Parameters get
each rank's own share of their gradients, which sum to those of the joined batch; x gets the
gradient of the sum of all ranks' losses. Ranks may hold different numbers of rows, none included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moat_kernels.ops.common.synchronization import all_reduce, combine_moments
from moat_kernels.ops.mbconv.algebra.folding import FoldedExpand, projected_variance, scatter
from moat_kernels.ops.mbconv.algebra.stages import BatchNorm, as_rows


class SynchronizedExpand(FoldedExpand):
    """FoldedExpand with the mean and covariance of all ranks' rows; its norms name one group.

    Rows are shifted by this rank's own mean, so `offset` is what the mean of all lies beyond it.
    """

    # pilot mean [C] of this rank, offset [C], covariance [C, C], expand variance [E], mean [C],
    # count []
    statistics_count = 6

    @property
    def group(self) -> str:
        """The name of the process group."""
        norm = self.pre_norm if self.measures_pre else self.expand_norm
        assert norm is not None and norm.process_group is not None
        return norm.process_group

    def _measure(self, x: Tensor) -> None:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        pilot = as_rows(x).sum(0, dtype=self.dtype) / max(count, 1)
        sums, products = scatter(as_rows(x).to(self.dtype) - pilot)
        own_mean = sums / max(count, 1)
        total, mean, products = combine_moments(
            count, pilot + own_mean, products - torch.outer(sums, own_mean), self.group
        )
        exact = products / total.clamp(min=1)
        offset, matrix = (mean - pilot).to(self.dtype), exact.to(self.dtype)
        joined = (mean.to(self.dtype), total.to(self.dtype))
        self.statistics = (pilot, offset, matrix, pilot.new_empty(0), *joined)
        if self.measures_expand:
            _, scale, _ = self._pre_affine()
            variance = projected_variance(self.wide_weight * scale, exact).to(self.dtype)
            self.statistics = (pilot, offset, matrix, variance, *joined)

    def _mean(self) -> Tensor:
        # Not from pilot and offset: their rounding would differ between ranks.
        return self.statistics[4]

    def _through_statistics(
        self, grad_x: Tensor, rows: Tensor, grad_covariance: Tensor, grad_bias: Tensor
    ) -> Tensor:
        offset, count = self.statistics[1], self.statistics[5]
        weight, _ = self._fold()
        grad_sum = grad_bias @ weight.to(self.dtype)  # of this rank's rows of grad_x
        shares = torch.cat([grad_covariance, grad_sum[None]])
        shares = all_reduce(shares, self.group) / count.clamp(min=1)
        slope = 2 * shares[:-1]
        # Rows about the mean of all ranks sum to zero, so only grad_x itself has a mean.
        return torch.addmm(grad_x - (offset @ slope + shares[-1]), rows, slope)

    def batch_moments(self) -> dict[str, tuple[Tensor, ...]]:
        count = self.statistics[5]
        return {name: (*moments, count) for name, moments in super().batch_moments().items()}


class SynchronizedBatchNorm(BatchNorm):
    """BatchNorm with the moments of all ranks' values."""

    # mean [C], biased variance [C], count []
    statistics_count = 3

    @property
    def group(self) -> str:
        """The name of the process group."""
        assert self.norm.process_group is not None
        return self.norm.process_group

    def _measure(self, x: Tensor) -> tuple[Tensor, ...]:
        mean, variance = super()._measure(x)
        count = x.shape[0] * x.shape[2] * x.shape[3]
        total, wide_mean, squares = combine_moments(
            count, mean.double(), variance.double() * count, self.group
        )
        wide_variance = squares / total.clamp(min=1)
        return wide_mean.to(mean.dtype), wide_variance.to(mean.dtype), total.to(mean.dtype)

    def backward(self, grad: Tensor, x: Tensor, needs_input: bool) -> Tensor | None:
        mean, variance, count = self.statistics
        inverse_std = torch.rsqrt(variance + self.norm.eps)
        grad, centred = grad.to(mean.dtype), x.to(mean.dtype) - mean[:, None, None]
        grad_bias = grad.sum((0, 2, 3))
        grad_weight = (grad * centred).sum((0, 2, 3)) * inverse_std
        self._collect(f"{self.name}_weight", lambda: grad_weight)
        self._collect(f"{self.name}_bias", lambda: grad_bias)
        if not needs_input:
            return None
        means = all_reduce(torch.stack([grad_bias, grad_weight]), self.group) / count.clamp(min=1)
        mean_grad, slope = means[0], means[1] * inverse_std
        weight, _ = self._affine()
        scale = inverse_std if weight is None else inverse_std * weight
        removed = torch.addcmul(mean_grad[:, None, None], centred, slope[:, None, None])
        return ((grad - removed) * scale[:, None, None]).to(x.dtype)

    def batch_moments(self) -> dict[str, tuple[Tensor, ...]]:
        return {self.name: self.statistics}
