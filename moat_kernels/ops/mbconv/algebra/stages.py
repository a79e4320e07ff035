"""The steps of an inverted bottleneck in stock PyTorch operations, each with its own backward.

A stage maps one [B, C, H, W] tensor in channels_last to the next. `forward` fills `statistics`
(small tensors: batch means, variances, covariance) unless they are already there, so that running
it a second time in the backward pass recomputes the same output without measuring again.
`backward(grad, x, needs_input)` takes the stage's input and returns its gradient (None if not
needed); the gradients of the parameters in `needed` are collected by name in `gradients`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.activations import activate, activate_backward
from moat_kernels.ops.common.spatial import (
    Padding,
    crop_map,
    may_pad,
    pad_map,
    resolve_padding,
    split_padding,
    valid_counts,
)
from moat_kernels.ops.mbconv.algebra.affine import scale_and_bias
from moat_kernels.ops.mbconv.algebra.squeeze_excite import Excitation
from moat_kernels.ops.mbconv.description import MBConvParameters, Norm, NormParameters, Pool


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Means and variances are kept in float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] in channels_last as a [B*H*W, C] view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def as_map(rows: Tensor, like: Tensor) -> Tensor:
    """[B*H*W, C] as a channels_last [B, C, H, W] view with the map of `like`."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def _goes_as_convolution(rows: Tensor) -> bool:
    """Whether oneDNN multiplies faster than torch.mm.

    It uses AVX-512 on every CPU that has it; the BLAS behind torch.mm may not.
    """
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.shape[0] > 0


def _as_pixels(rows: Tensor) -> Tensor:
    """[N, C] as a channels_last map [1, C, N, 1]."""
    return rows.reshape(1, rows.shape[0], 1, rows.shape[1]).permute(0, 3, 1, 2)


def pointwise(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N, C] rows times a weight [E, C], plus a bias [E]: [N, E]."""
    if not _goes_as_convolution(rows):
        return F.linear(rows, weight, bias)
    product = F.conv2d(_as_pixels(rows), weight[:, :, None, None], bias)
    return product.permute(0, 2, 3, 1).reshape(rows.shape[0], -1)


def pointwise_backward(
    grad_rows: Tensor, rows: Tensor, weight: Tensor, needs_rows: bool
) -> tuple[Tensor | None, Tensor]:
    """The gradients [N, C] of `pointwise`'s rows, if needed, and [E, C] of its weight."""
    if not _goes_as_convolution(rows):
        return grad_rows @ weight if needs_rows else None, grad_rows.t() @ rows
    settings = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    grad_pixels, grad_weight, _ = torch.ops.aten.convolution_backward(
        _as_pixels(grad_rows),
        _as_pixels(rows),
        weight[:, :, None, None],
        None,
        *settings,
        [needs_rows, True, False],
    )
    grad_input = grad_pixels.permute(0, 2, 3, 1).reshape(rows.shape) if needs_rows else None
    return grad_input, grad_weight.flatten(1)


class Stage:
    """A differentiable step; see the module's text."""

    # How many tensors `statistics` holds after `forward`.
    statistics_count = 0

    def __init__(self) -> None:
        self.statistics: tuple[Tensor, ...] = ()
        self.gradients: dict[str, Tensor] = {}
        self.needed: frozenset[str] = frozenset()

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def backward(self, grad: Tensor, x: Tensor, needs_input: bool) -> Tensor | None:
        raise NotImplementedError

    def batch_moments(self) -> dict[str, tuple[Tensor, ...]]:
        """(mean, biased variance) of each norm that measured the batch, by the norm's name.

        A synchronised norm adds the count of values per channel over all ranks.
        """
        return {}

    def _collect(self, name: str, gradient: Callable[[], Tensor]) -> None:
        if name in self.needed:
            self.gradients[name] = gradient()


class Activation(Stage):
    """y = kind(x)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return activate(self.kind, x)

    def backward(self, grad: Tensor, x: Tensor, needs_input: bool) -> Tensor | None:
        return activate_backward(self.kind, grad, x)


class Linear(Stage):
    """1x1 convolution: y[b,:,h,w] = W x[b,:,h,w] + bias, in the dtype of W (as autocast would)."""

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.name = name
        self.weight = weight.flatten(1)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = as_rows(x).to(self.weight.dtype)
        return as_map(pointwise(rows, self.weight, self.bias), x)

    def backward(self, grad: Tensor, x: Tensor, needs_input: bool) -> Tensor | None:
        grad_rows = as_rows(grad)
        rows = as_rows(x).to(self.weight.dtype)
        grad_input, grad_weight = pointwise_backward(grad_rows, rows, self.weight, needs_input)
        self._collect(f"{self.name}_weight", lambda: grad_weight)
        self._collect(f"{self.name}_bias", lambda: grad_rows.sum(0))
        return None if grad_input is None else as_map(grad_input, x).to(x.dtype)


class BatchNorm(Stage):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, moments of the batch or running ones."""

    statistics_count = 2

    def __init__(self, name: str, norm: Norm, parameters: NormParameters) -> None:
        super().__init__()
        self.name = name
        self.norm = norm
        self.parameters = parameters

    def _measure(self, x: Tensor) -> tuple[Tensor, ...]:
        dtype = statistics_dtype(x.dtype)
        if self.norm.frozen:
            return running_moments(self.parameters, dtype)
        zeros = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
        if x.numel() == 0 or x.is_meta:  # for which PyTorch does not know the next operator
            return zeros, zeros.clone()
        return torch.ops.aten.batch_norm_update_stats(x, zeros, zeros.clone(), 0.0)

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Dense: PyTorch's backward op reads beyond an expanded weight."""
        dtype = self.statistics[0].dtype
        weight, bias = self.parameters.weight, self.parameters.bias
        return (
            None if weight is None else weight.to(dtype).contiguous(),
            None if bias is None else bias.to(dtype).contiguous(),
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.statistics:
            self.statistics = self._measure(x)
        mean, variance = self.statistics[:2]
        weight, bias = self._affine()
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.norm.eps)

    def backward(self, grad: Tensor, x: Tensor, needs_input: bool) -> Tensor | None:
        mean, variance = self.statistics
        weight, _ = self._affine()
        if x.numel() == 0:  # PyTorch's own backward divides by the number of rows
            for part in ("weight", "bias"):
                self._collect(f"{self.name}_{part}", lambda: torch.zeros_like(mean))
            return grad
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad,
            x,
            weight,
            mean,
            variance,
            mean,
            torch.rsqrt(variance + self.norm.eps),
            not self.norm.frozen,
            self.norm.eps,
            [needs_input, f"{self.name}_weight" in self.needed, f"{self.name}_bias" in self.needed],
        )
        self._collect(f"{self.name}_weight", lambda: grad_weight)
        self._collect(f"{self.name}_bias", lambda: grad_bias)
        return grad_x if needs_input else None

    def batch_moments(self) -> dict[str, tuple[Tensor, ...]]:
        mean, variance = self.statistics
        return {} if self.norm.frozen else {self.name: (mean, variance)}


def running_moments(parameters: NormParameters, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies of the running mean and variance in `dtype`."""
    assert parameters.running_mean is not None and parameters.running_var is not None
    return (
        parameters.running_mean.to(dtype, copy=True),
        parameters.running_var.to(dtype, copy=True),
    )


class Depthwise(Stage):
    """Depthwise convolution, with the frozen batch norm behind it (if given) folded into it."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: Padding,
        norm: Norm | None = None,
        norm_parameters: NormParameters | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.stride = stride
        self.padding = padding
        self.norm = norm
        self.norm_parameters = norm_parameters or NormParameters()

    @property
    def statistics_count(self) -> int:  # type: ignore[override]
        return 0 if self.norm is None else 2

    def _fold(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(weight, bias, scale): the convolution that also normalises, and its factor [C]."""
        if self.norm is None:
            return self.weight, self.bias, None
        dtype = statistics_dtype(self.weight.dtype)
        if not self.statistics:
            self.statistics = running_moments(self.norm_parameters, dtype)
        mean, variance = self.statistics
        scale, norm_bias = scale_and_bias(
            self.norm_parameters, torch.rsqrt(variance + self.norm.eps)
        )
        shift = -mean if self.bias is None else self.bias - mean
        bias = shift * scale + norm_bias
        weight = (self.weight * scale.view(-1, 1, 1, 1)).to(self.weight.dtype)
        return weight, bias.to(self.weight.dtype), scale

    def _geometry(self, x: Tensor) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
        kernel_size = (self.weight.shape[2], self.weight.shape[3])
        return split_padding(
            resolve_padding(self.padding, x.shape[2], x.shape[3], kernel_size, self.stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        border, padding = self._geometry(x)
        weight, bias, _ = self._fold()
        x = pad_map(x.to(weight.dtype), border)
        y = F.conv2d(x, weight, bias, self.stride, padding, groups=weight.shape[0])
        return y.contiguous(memory_format=torch.channels_last)

    def backward(self, grad: Tensor, x: Tensor, needs_input: bool) -> Tensor | None:
        border, padding = self._geometry(x)
        weight, bias, scale = self._fold()
        has_bias = bias is not None
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            pad_map(x.to(weight.dtype), border),
            weight,
            [weight.shape[0]] if has_bias else None,
            [self.stride, self.stride],
            list(padding),
            [1, 1],
            False,
            [0, 0],
            weight.shape[0],
            [needs_input, True, has_bias],
        )
        if scale is None:
            self._collect("depthwise_weight", lambda: grad_weight)
            self._collect("depthwise_bias", lambda: grad_bias)
        else:
            self._unfold(grad_weight, grad_bias, scale)
        if not needs_input:
            return None
        cropped = crop_map(grad_x, border).to(x.dtype)
        return cropped.contiguous(memory_format=torch.channels_last)

    def _unfold(self, grad_weight: Tensor, grad_bias: Tensor, scale: Tensor) -> None:
        """From the gradients of the folded convolution to those of its parts."""
        assert self.norm is not None
        mean, variance = self.statistics
        self._collect("depthwise_weight", lambda: grad_weight * scale.view(-1, 1, 1, 1))
        self._collect("depthwise_bias", lambda: grad_bias * scale)
        self._collect("depthwise_norm_bias", lambda: grad_bias)
        shift = -mean if self.bias is None else self.bias - mean
        inverse_std = torch.rsqrt(variance + self.norm.eps)
        self._collect(
            "depthwise_norm_weight",
            lambda: ((grad_weight * self.weight).sum((1, 2, 3)) + grad_bias * shift) * inverse_std,
        )


class SqueezeExcite(Stage):
    """y = x * sigmoid(W2 act(W1 mean(x) + b1) + b2), the mean taken over each map."""

    # The mean of each map, [B, C].
    statistics_count = 1

    def __init__(self, parameters: MBConvParameters, activation: str) -> None:
        super().__init__()
        self.parameters = parameters
        self.activation = activation

    def _excite(self) -> Excitation:
        (squeezed,) = self.statistics
        assert self.parameters.se_reduce_weight is not None
        squeezed = squeezed.to(self.parameters.se_reduce_weight.dtype)
        return Excitation.compute(squeezed, self.parameters, self.activation)

    def forward(self, x: Tensor) -> Tensor:
        if not self.statistics:
            self.statistics = (x.mean((2, 3)),)
        return x * self._excite().gate[:, :, None, None]

    def backward(self, grad: Tensor, x: Tensor, needs_input: bool) -> Tensor | None:
        excitation = self._excite()
        grad_mean, gradients = excitation.backward(
            (grad * x).sum((2, 3)), self.parameters, self.activation
        )
        for name, gradient in gradients.items():
            if name in self.needed:
                self.gradients[name] = gradient
        grad_mean = grad_mean / (x.shape[2] * x.shape[3])
        gate = excitation.gate[:, :, None, None]
        return torch.addcmul(grad_mean[:, :, None, None], grad, gate)


class PoolStage(Stage):
    """Average or maximum pool of the shortcut, by its description."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def _padding(self, x: Tensor) -> tuple[int, int, int, int]:
        kernel_size = self.pool.kernel_size
        return resolve_padding(
            self.pool.padding,
            x.shape[2],
            x.shape[3],
            (kernel_size, kernel_size),
            self.pool.stride,
        )

    def _divisor(self, x: Tensor, padding: tuple[int, int, int, int]) -> Tensor | int:
        kernel_size, stride = self.pool.kernel_size, self.pool.stride
        if self.pool.count_include_pad or not may_pad(padding):
            return kernel_size * kernel_size
        return valid_counts(x.shape[2], x.shape[3], kernel_size, stride, padding, like=x)

    def forward(self, x: Tensor) -> Tensor:
        padding = self._padding(x)
        kernel_size, stride = self.pool.kernel_size, self.pool.stride
        if self.pool.kind == "max":
            return F.max_pool2d(pad_map(x, padding, value=float("-inf")), kernel_size, stride)
        padded, divisor = pad_map(x, padding), self._divisor(x, padding)
        if isinstance(divisor, int):
            return F.avg_pool2d(padded, kernel_size, stride, divisor_override=divisor)
        return F.avg_pool2d(padded, kernel_size, stride, divisor_override=1) / divisor

    def backward(self, grad: Tensor, x: Tensor, needs_input: bool) -> Tensor | None:
        if not needs_input:
            return None
        padding = self._padding(x)
        kernel_size = [self.pool.kernel_size] * 2
        stride = [self.pool.stride] * 2
        if self.pool.kind == "max":
            padded = pad_map(x, padding, value=float("-inf"))
            _, indices = torch.ops.aten.max_pool2d_with_indices(padded, kernel_size, stride)
            grad_padded = torch.ops.aten.max_pool2d_with_indices_backward(
                grad, padded, kernel_size, stride, [0, 0], [1, 1], False, indices
            )
        else:
            divisor = self._divisor(x, padding)
            if not isinstance(divisor, int):
                grad, divisor = grad / divisor, 1
            grad_padded = torch.ops.aten.avg_pool2d_backward(
                grad,
                pad_map(x, padding),
                kernel_size,
                stride,
                [0, 0],
                False,
                True,
                divisor,
            )
        return crop_map(grad_padded, padding)
