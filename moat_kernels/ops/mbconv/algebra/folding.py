"""Batch norm folded into the expand convolution, in training mode too.

The statistics of a linear map of x follow from the mean and the covariance of x:

    mu = mean(x),  S = (x - mu)^T (x - mu) / N             over the N = B*H*W rows, [C] and [C, C]
    a0 = g0 / sqrt(diag S + eps0),  W' = W diag(a0)        pre_norm folded
    v1 = diag(W' S W'^T)                                   the variance that expand_norm measures
    a1 = g1 / sqrt(v1 + eps1)
    pre = (x - mu) (diag(a1) W')^T + b1                    all three in one GEMM

so that no E-wide tensor is read for a statistic, neither here nor in the backward pass, where the
chain through v1 and S is C x C algebra plus one [N, C] x [C, C] product.

Rows are shifted by a pilot mean before they are multiplied: a raw x^T x loses everything for
|mean| >> std. Statistics are of these rows before they are rounded to the dtype of the GEMM: a
running mean would be off by what the rounding adds up to. Products of a tile of rows are summed in
float32, tiles and the quadratic form v1 in float64: channels that cancel in a row of W' lose least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moat_kernels.ops.mbconv.algebra.affine import scale_and_bias
from moat_kernels.ops.mbconv.algebra.stages import (
    Stage,
    as_map,
    as_rows,
    pointwise,
    pointwise_backward,
    running_moments,
    statistics_dtype,
)
from moat_kernels.ops.mbconv.description import MBConvParameters, Norm

# Rows whose products are summed in float32 before float64 takes over: as fast as one large product
# (two threads, 64 to 512 channels), and small beside the rows themselves.
TILE_ROWS = 512

# Batch statistics come from the covariance of x if there are this many rows per channel. With
# fewer, the C x C work (about 2 C / N of the expand GEMM in float64) outweighs the E-wide passes
# that it saves, and the covariance is no longer small beside x.
FOLDING_ROWS_PER_CHANNEL = 16


def _widest(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def scatter(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of rows [C], sum of row^T row [C, C]) in float64; rows [N, C] are about centred."""
    wide = _widest(rows.device)
    tiled = rows.shape[0] - rows.shape[0] % TILE_ROWS
    tiles, rest = rows[:tiled].view(-1, TILE_ROWS, rows.shape[1]), rows[tiled:]
    products = torch.bmm(tiles.transpose(1, 2), tiles).to(wide).sum(0) + (rest.t() @ rest)
    return tiles.sum(1).to(wide).sum(0) + rest.sum(0), products


def covariance(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [C], biased covariance [C, C]) in float64 of rows [N, C] that are about centred."""
    sums, products = scatter(rows)
    mean = sums / rows.shape[0]
    return mean, torch.addr(products / rows.shape[0], mean, mean, alpha=-1)


def projected_variance(weight: Tensor, covariance: Tensor) -> Tensor:
    """diag(W S W^T) [E] of weight [E, C] and covariance [C, C], clamped at 0."""
    weight = weight.to(covariance.dtype)
    return ((weight @ covariance) * weight).sum(1).clamp_(min=0)


class FoldedExpand(Stage):
    """pre_norm, the expand 1x1 convolution and expand_norm as one GEMM; see the module's text.

    Either norm may be absent (None) or frozen. x [B, C, H, W] -> [B, E, H, W].

    fixed_mean: the running mean [C] that rows are shifted by where no batch is measured and they
        are rounded: not much would be left of channels whose mean is far from 0. Else None.
    """

    # pilot mean [C], mean of the shifted rows [C], covariance [C, C], expand variance [E];
    # empty tensors where no batch is measured.
    statistics_count = 4

    def __init__(
        self, parameters: MBConvParameters, pre_norm: Norm | None, expand_norm: Norm | None
    ) -> None:
        super().__init__()
        self.weight = parameters.expand_weight.flatten(1)
        self.bias = parameters.expand_bias
        self.pre_norm = pre_norm
        self.expand_norm = expand_norm
        self.pre_parameters = parameters.pre_norm
        self.expand_parameters = parameters.expand_norm
        self.dtype = statistics_dtype(self.weight.dtype)
        self.wide_weight = self.weight.to(self.dtype)
        self.measures_pre = pre_norm is not None and not pre_norm.frozen
        self.measures_expand = expand_norm is not None and not expand_norm.frozen
        self.fixed_mean: Tensor | None = None
        if not self.centred and pre_norm is not None and self.weight.dtype != self.dtype:
            assert self.pre_parameters.running_mean is not None
            self.fixed_mean = self.pre_parameters.running_mean.to(self.dtype)

    @property
    def centred(self) -> bool:
        """Whether rows are shifted by the batch mean, to which the output is then invariant."""
        return self.measures_pre or self.measures_expand

    def _rows(self, x: Tensor) -> Tensor:
        """[N, C] input rows in the dtype of the GEMM, less the pilot mean or `fixed_mean`."""
        rows = as_rows(x)
        shift = self.statistics[0] if self.centred else self.fixed_mean
        if shift is not None:
            rows = rows.to(self.dtype) - shift
        return rows.to(self.weight.dtype)

    def _measure(self, x: Tensor) -> None:
        if not self.centred:
            self.statistics = tuple(self.wide_weight.new_empty(0) for _ in range(4))
            return
        pilot = as_rows(x).mean(0, dtype=self.dtype)
        offset, exact = covariance(as_rows(x).to(self.dtype) - pilot)
        offset, matrix = offset.to(self.dtype), exact.to(self.dtype)
        self.statistics = (pilot, offset, matrix, pilot.new_empty(0))
        if self.measures_expand:
            _, scale, _ = self._pre_affine()
            variance = projected_variance(self.wide_weight * scale, exact).to(self.dtype)
            self.statistics = (pilot, offset, matrix, variance)

    def _mean(self) -> Tensor:
        """The row of x [C] that becomes 0: the batch's mean if `centred`, or `fixed_mean`."""
        if self.centred:
            return self.statistics[0] + self.statistics[1]
        if self.fixed_mean is not None:
            return self.fixed_mean
        return self.wide_weight.new_zeros(self.weight.shape[1])

    def _pre_affine(self) -> tuple[Tensor, Tensor, Tensor]:
        """pre_norm as (1/std, scale, shift), each [C]: it maps a row to row * scale + shift.

        `shift` is the normalised value of the row that `_mean` gives.
        """
        mean = self._mean()
        if self.pre_norm is None:
            return torch.ones_like(mean), torch.ones_like(mean), mean
        if self.measures_pre:
            centre, variance = mean, self.statistics[2].diagonal()
        else:
            centre, variance = running_moments(self.pre_parameters, self.dtype)
        inverse_std = torch.rsqrt(variance + self.pre_norm.eps)
        scale, shift = scale_and_bias(self.pre_parameters, inverse_std)
        return inverse_std, scale, (mean - centre) * scale + shift

    def _expand_affine(self) -> tuple[Tensor, Tensor, Tensor]:
        """expand_norm as (1/std, scale, centre), each [E]: (value - centre) * scale + bias."""
        if self.expand_norm is None:
            zeros = self.wide_weight.new_zeros(self.weight.shape[0])
            return torch.ones_like(zeros), torch.ones_like(zeros), zeros
        if self.measures_expand:
            centre, variance = self._expand_mean(), self.statistics[3]
        else:
            centre, variance = running_moments(self.expand_parameters, self.dtype)
        inverse_std = torch.rsqrt(variance + self.expand_norm.eps)
        scale, _ = scale_and_bias(self.expand_parameters, inverse_std)
        return inverse_std, scale, centre

    def _expand_mean(self) -> Tensor:
        """Value of the expand convolution [E] at the row that `_pre_affine` calls `shift`."""
        _, _, pre_shift = self._pre_affine()
        mean = self.wide_weight @ pre_shift
        return mean if self.bias is None else mean + self.bias

    def _fold(self) -> tuple[Tensor, Tensor]:
        """The weight [E, C] and bias [E] that `_rows` go through, in the dtype of the GEMM."""
        _, pre_scale, _ = self._pre_affine()
        _, scale, centre = self._expand_affine()
        weight = scale[:, None] * self.wide_weight * pre_scale
        bias = (self._expand_mean() - centre) * scale
        if self.expand_parameters.bias is not None and self.expand_norm is not None:
            bias = bias + self.expand_parameters.bias
        if self.centred:
            bias = bias - weight @ self.statistics[1]
        return weight.to(self.weight.dtype), bias.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self.statistics:
            self._measure(x)
        weight, bias = self._fold()
        return as_map(pointwise(self._rows(x), weight, bias), x)

    def backward(self, grad: Tensor, x: Tensor, needs_input: bool) -> Tensor | None:
        rows, grad_rows = self._rows(x), as_rows(grad)
        folded, _ = self._fold()
        grad_x, grad_weight = pointwise_backward(grad_rows, rows, folded, needs_input)
        grad_folded = grad_weight.to(self.dtype)  # [E, C]
        grad_bias = grad_rows.sum(0, dtype=self.dtype)  # [E]
        if self.centred:  # the bias holds -folded @ offset
            grad_folded = grad_folded - torch.outer(grad_bias, self.statistics[1])
        correction = self._parameter_gradients(grad_folded, grad_bias)
        if grad_x is None:
            return None
        if correction is not None:
            grad_x, rows = grad_x.to(self.dtype), rows.to(self.dtype)
            grad_x = self._through_statistics(grad_x, rows, correction, grad_bias)
        return as_map(grad_x.to(x.dtype), x)

    def _through_statistics(
        self, grad_x: Tensor, rows: Tensor, grad_covariance: Tensor, grad_bias: Tensor
    ) -> Tensor:
        """grad_x [N, C] and what comes to x through its covariance and its mean."""
        count = rows.shape[0]
        grad_x = torch.addmm(grad_x, rows, grad_covariance, alpha=2 / count)
        # The rows' own mean, `offset`, drops out with the mean of the gradient.
        return grad_x - grad_x.mean(0)

    def _parameter_gradients(self, grad_folded: Tensor, grad_bias: Tensor) -> Tensor | None:
        """Collect the gradients of parameters; return dS [C, C] of the covariance (None: frozen).

        grad_folded is of diag(a1) W diag(a0), grad_bias of the bias beside it.
        """
        pre_inverse_std, pre_scale, pre_shift = self._pre_affine()
        inverse_std, scale, centre = self._expand_affine()
        weight = self.wide_weight
        scaled = weight * pre_scale  # W'
        grad_scaled = scale[:, None] * grad_folded
        grad_scale = (grad_folded * scaled).sum(1)
        grad_covariance = None
        if self.measures_expand:
            # expand_norm removes the mean, so what shifts it has no gradient.
            grad_mean = torch.zeros_like(grad_bias)
            grad_variance = -0.5 * grad_scale * scale * inverse_std**2
            weighted = grad_variance[:, None] * scaled
            grad_covariance = scaled.t() @ weighted
            grad_scaled = grad_scaled + 2 * (weighted @ self.statistics[2])
        else:
            grad_mean = grad_bias * scale
            grad_scale = grad_scale + grad_bias * (self._expand_mean() - centre)
        grad_pre_shift = grad_mean @ weight
        grad_pre_scale = (grad_scaled * weight).sum(0)
        self._collect(
            "expand_weight", lambda: grad_scaled * pre_scale + torch.outer(grad_mean, pre_shift)
        )
        self._collect("expand_bias", lambda: grad_mean)
        self._collect("expand_norm_weight", lambda: grad_scale * inverse_std)
        self._collect("expand_norm_bias", lambda: grad_bias)
        if self.pre_norm is None:
            return grad_covariance
        self._collect("pre_norm_bias", lambda: grad_pre_shift)
        if self.measures_pre:
            grad_pre_variance = -0.5 * grad_pre_scale * pre_scale * pre_inverse_std**2
            diagonal = grad_pre_variance.diag()
            grad_covariance = diagonal if grad_covariance is None else grad_covariance + diagonal
        else:
            running_mean, _ = running_moments(self.pre_parameters, self.dtype)
            grad_pre_scale = grad_pre_scale + grad_pre_shift * (self._mean() - running_mean)
        self._collect("pre_norm_weight", lambda: grad_pre_scale * pre_inverse_std)
        return grad_covariance

    def batch_moments(self) -> dict[str, tuple[Tensor, ...]]:
        moments: dict[str, tuple[Tensor, ...]] = {}
        if self.measures_pre:
            moments["pre_norm"] = (self._mean(), self.statistics[2].diagonal().clone())
        if self.measures_expand:
            moments["expand_norm"] = (self._expand_mean(), self.statistics[3])
        return moments


def joined_pointwise(
    parameters: MBConvParameters, expand_norm: Norm | None
) -> tuple[Tensor, Tensor]:
    """Weight [C_out, C_in] and bias of expand, expand_norm (frozen, if any) and project in one."""
    expand, project = parameters.expand_weight.flatten(1), parameters.project_weight.flatten(1)
    dtype = statistics_dtype(expand.dtype)
    expand, wide_project = expand.to(dtype), project.to(dtype)
    shift = expand.new_zeros(expand.shape[0])
    if parameters.expand_bias is not None:
        shift = parameters.expand_bias.to(dtype)
    if expand_norm is not None:
        mean, variance = running_moments(parameters.expand_norm, dtype)
        scale, bias = scale_and_bias(
            parameters.expand_norm, torch.rsqrt(variance + expand_norm.eps)
        )
        expand, shift = scale[:, None] * expand, (shift - mean) * scale + bias
    bias = wide_project @ shift
    if parameters.project_bias is not None:
        bias = bias + parameters.project_bias
    return (wide_project @ expand).to(project.dtype), bias.to(project.dtype)
