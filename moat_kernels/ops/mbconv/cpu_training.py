"""Training of the inverted bottleneck by native CPU passes, and the algebra between them.

Wide tensors (E channels) are seen by the native passes only; here are vectors of channels and
weights. With rows = x - mean(x):

    z1 = rows W'^T          W' = W1 diag(pre_norm's scale)
    y1 = z1 scale1 + shift1                 expand_norm, and what the centring left out
    z2 = depthwise(act(y1))
    y2 = z2 scale2 + shift2                 depthwise_norm
    output = gate act(y2) W2^T + bias, and the shortcut

Statistics of z1 and z2 are summed by the passes that write them: z1 around 0, which is its mean, z2
around one of its values. Sums over all pixels are finished in float64. Every pass adds in an order
that depends on the shape only, so results do not depend on the number of threads; squeeze-excite's
small products, which are stock, may.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.activations import activate, activate_backward
from moat_kernels.ops.mbconv.description import (
    MBConvDescription,
    MBConvParameters,
    Norm,
    NormParameters,
)
from moat_kernels.ops.mbconv.torch_backend import Forward, build_shortcut
from moat_kernels.ops.spatial import output_size, resolve_padding

# Channels that the kernels keep together; vectors of E channels are padded to a multiple.
WIDE_CHANNELS = 64
KERNEL_SIZE = (3, 3)


def padded_wide(channels: int) -> int:
    return -(-channels // WIDE_CHANNELS) * WIDE_CHANNELS


def coefficients(*vectors: Tensor) -> Tensor:
    """Vectors [..., E] stacked as the kernels read them: float32 [k, ..., padded E]."""
    stacked = torch.stack(vectors).float()
    return F.pad(stacked, (0, padded_wide(stacked.shape[-1]) - stacked.shape[-1]))


@dataclass(frozen=True)
class Affine:
    """A norm of z + some constant, float64 [C]: (z - centre) / std * weight + bias."""

    centre: Tensor
    inverse_std: Tensor
    scale: Tensor
    shift: Tensor
    measured: bool

    def gradients(
        self, total: Tensor, product: Tensor, count: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        """From sum(dy) and sum(dy z): (dweight, (a, b, c) of dz = a dy + b z + c, sum(dz))."""
        grad_weight = (product - self.centre * total) * self.inverse_std
        zeros = torch.zeros_like(total)
        if not self.measured:
            return grad_weight, (self.scale, zeros, zeros), self.scale * total
        slope = -self.scale * self.inverse_std * grad_weight / count
        constant = -self.scale * total / count - slope * self.centre
        return grad_weight, (self.scale, slope, constant), zeros


def make_affine(
    norm: Norm | None,
    parameters: NormParameters,
    moments: tuple[Tensor, Tensor],
    constant: Tensor,
) -> Affine:
    """The norm of z + constant, given the batch's (mean, variance) of z if it measures them."""
    constant = constant.double()
    ones = torch.ones_like(constant)
    if norm is None:
        return Affine(-constant, ones, ones, constant, False)
    if norm.frozen:
        assert parameters.running_mean is not None and parameters.running_var is not None
        centre = parameters.running_mean.double() - constant
        variance = parameters.running_var.double()
    else:
        centre, variance = (moment.double() for moment in moments)
    inverse_std = torch.rsqrt(variance + norm.eps)
    scale = inverse_std if parameters.weight is None else inverse_std * parameters.weight
    shift = -centre * scale
    if parameters.bias is not None:
        shift = shift + parameters.bias
    return Affine(centre, inverse_std, scale, shift, not norm.frozen)


class Call:
    """One call's tensors and numbers, shared by forward and backward."""

    def __init__(
        self, x: Tensor, parameters: MBConvParameters, description: MBConvDescription
    ) -> None:
        self.x = x.permute(0, 2, 3, 1).contiguous()
        self.parameters = parameters
        self.description = description
        batch, height, width, channels = self.x.shape
        stride = description.stride
        top, bottom, left, right = resolve_padding(
            description.padding, height, width, KERNEL_SIZE, stride
        )
        out_height = output_size(height, top, bottom, KERNEL_SIZE[0], stride)
        out_width = output_size(width, left, right, KERNEL_SIZE[1], stride)
        self.expand_weight = parameters.expand_weight.flatten(1).contiguous()
        self.project_weight = parameters.project_weight.flatten(1).contiguous()
        self.wide, self.out_channels = self.expand_weight.shape[0], self.project_weight.shape[0]
        self.rows_in = batch * height * width
        self.rows_out = batch * out_height * out_width
        self.out_pixels = out_height * out_width
        self.depthwise_weight = coefficients(
            *parameters.depthwise_weight.flatten(1).t().contiguous().unbind()
        )
        self.settings = (
            [
                *(batch, height, width, out_height, out_width),
                *(stride, top, left, channels, self.wide, self.out_channels),
            ],
            [description.expand_activation, description.depthwise_activation],
        )

    def measure(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of x, [C]."""
        moments = torch.ops.moat_kernels.cpu_mbconv_moments(self.x)
        mean, variance = merge_moments(moments, self.rows_in)
        return mean.float(), variance.float()

    def rows(self, mean: Tensor) -> Tensor:
        return torch.ops.moat_kernels.cpu_mbconv_rows(self.x, mean, None)

    def fold_pre(self, mean: Tensor, variance: Tensor) -> tuple[Affine, Tensor]:
        """pre_norm of rows + mean, and W' [E, C]."""
        norm, parameters = self.description.pre_norm, self.parameters.pre_norm
        affine = make_affine(norm, parameters, (torch.zeros_like(mean), variance), mean)
        return affine, self.expand_weight * affine.scale.float()

    def fold_expand(self, pre: Affine, moments: tuple[Tensor, Tensor]) -> Affine:
        return make_affine(
            self.description.expand_norm,
            self.parameters.expand_norm,
            moments,
            self.expand_constant(pre),
        )

    def expand_constant(self, pre: Affine) -> Tensor:
        """What z1 lacks: the expand convolution at the mean row, [E]."""
        constant = self.expand_weight @ pre.shift.float()
        bias = self.parameters.expand_bias
        return constant if bias is None else constant + bias

    def fold_depthwise(self, moments: tuple[Tensor, Tensor]) -> Affine:
        constant = self.parameters.depthwise_bias
        if constant is None:
            constant = self.x.new_zeros(self.wide)
        return make_affine(
            self.description.depthwise_norm, self.parameters.depthwise_norm, moments, constant
        )

    def measures(self, name: str) -> bool:
        norm = getattr(self.description, name)
        return norm is not None and not norm.frozen

    def expand(self, rows: Tensor, weight: Tensor, measures: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.moat_kernels.cpu_mbconv_expand(rows, weight, measures, *self.settings)

    def depthwise(self, z1: Tensor, affine: Affine, measures: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.moat_kernels.cpu_mbconv_depthwise(
            z1,
            coefficients(affine.scale, affine.shift),
            self.depthwise_weight,
            measures,
            *self.settings,
        )


@dataclass(frozen=True)
class Gate:
    """Squeeze-excite of one batch: sigmoid(W2 act(W1 mean + b1) + b2), [B, E]."""

    mean: Tensor
    reduced: Tensor
    activated: Tensor
    gate: Tensor

    @staticmethod
    def compute(mean: Tensor, parameters: MBConvParameters, activation: str) -> Gate:
        assert parameters.se_reduce_weight is not None and parameters.se_expand_weight is not None
        reduced = F.linear(mean, parameters.se_reduce_weight.flatten(1), parameters.se_reduce_bias)
        activated = activate(activation, reduced)
        logit = F.linear(
            activated, parameters.se_expand_weight.flatten(1), parameters.se_expand_bias
        )
        return Gate(mean, reduced, activated, torch.sigmoid(logit))

    def backward(
        self, grad: Tensor, parameters: MBConvParameters, activation: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(gradient of the mean, gradients of the parameters) from the gradient of the gate."""
        assert parameters.se_reduce_weight is not None and parameters.se_expand_weight is not None
        grad_logit = torch.ops.aten.sigmoid_backward(grad, self.gate)
        grad_activated = grad_logit @ parameters.se_expand_weight.flatten(1)
        grad_reduced = activate_backward(activation, grad_activated, self.reduced)
        return grad_reduced @ parameters.se_reduce_weight.flatten(1), {
            "se_expand_weight": grad_logit.t() @ self.activated,
            "se_expand_bias": grad_logit.sum(0),
            "se_reduce_weight": grad_reduced.t() @ self.mean,
            "se_reduce_bias": grad_reduced.sum(0),
        }


def sum_of_groups(partial: Tensor) -> Tensor:
    """Partial sums [groups, ...] added up; often there is one, which needs no copy."""
    return partial[0] if len(partial) == 1 else partial.sum(0)


def merge_moments(moments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) from each image's mean and squared deviations [B, 2, E], float64."""
    if not len(moments):  # the norm measures nothing
        return moments.new_zeros(moments.shape[2]), moments.new_zeros(moments.shape[2])
    means, deviations = moments.unbind(1)
    mean = means.mean(0)
    total = deviations.sum(0) + (count / len(moments)) * (means - mean).square().sum(0)
    return mean, total / count


def forward(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
) -> Forward:
    """Compute the block and save what `recompute` says, beside the statistics."""
    call = Call(x, parameters, description)
    wide = call.wide
    mean, variance = call.measure()
    pre, weight = call.fold_pre(mean, variance)
    rows = call.rows(mean)

    z1, sums = call.expand(rows, weight, call.measures("expand_norm"))
    total, squares = sums.sum(0)[:, :wide] / call.rows_in  # zeros if it does not measure
    expand_moments = (total, (squares - total.square()).clamp_(min=0))
    expand = call.fold_expand(pre, expand_moments)

    z2, image_moments = call.depthwise(z1, expand, call.measures("depthwise_norm"))
    depthwise_moments = merge_moments(image_moments[:, :, :wide], call.rows_out)
    depthwise = call.fold_depthwise(depthwise_moments)
    stencil = coefficients(depthwise.scale, depthwise.shift)

    squeezed = x.new_empty(0)
    gate = None
    if description.squeeze_excite is not None:
        squeezed = torch.ops.moat_kernels.cpu_mbconv_pool(z2, stencil, *call.settings)[:, :wide]
        activation = description.squeeze_excite.activation
        gate = coefficients(*Gate.compute(squeezed, parameters, activation).gate.unbind())

    addend = None
    if description.residual:
        shortcut, _ = build_shortcut(parameters, description).forward(call.x.permute(0, 3, 1, 2))
        addend = shortcut.permute(0, 2, 3, 1).contiguous()
    output = torch.ops.moat_kernels.cpu_mbconv_project(
        z2,
        stencil,
        gate,
        call.project_weight,
        parameters.project_bias,
        drop_path_scale,
        addend,
        *call.settings,
    )

    moments = {}
    if call.measures("pre_norm"):
        moments["pre_norm"] = (mean, variance)
    if call.measures("expand_norm"):
        moments["expand_norm"] = (total + call.expand_constant(pre), expand_moments[1])
    if call.measures("depthwise_norm"):
        constant = 0.0 if parameters.depthwise_bias is None else parameters.depthwise_bias
        moments["depthwise_norm"] = (depthwise_moments[0] + constant, depthwise_moments[1])
    moments = {name: (first.float(), second.float()) for name, (first, second) in moments.items()}
    wide_tensors = {"none": [z1, z2], "expand": [z2], "block": []}[recompute]
    statistics = [mean, variance, *expand_moments, *depthwise_moments, squeezed]
    return Forward(output.permute(0, 3, 1, 2), moments, [*statistics, *wide_tensors])


def backward(
    grad: Tensor,
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    drop_path_scale: Tensor | None,
    saved: list[Tensor],
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients by name, of "x" and of the parameters in `needed` (and of some others)."""
    native = torch.ops.moat_kernels
    call = Call(x, parameters, description)
    wide = call.wide
    # The kernel for fixed statistics saves nothing.
    empty = x.new_empty(0)
    mean, variance, *moments, squeezed = saved[:7] or [*call.measure(), *[empty] * 5]
    pre, weight = call.fold_pre(mean, variance)
    expand = call.fold_expand(pre, (moments[0], moments[1]))
    depthwise = call.fold_depthwise((moments[2], moments[3]))
    rows = call.rows(mean)
    wide_tensors = saved[7:]
    z1 = wide_tensors[0] if len(wide_tensors) == 2 else call.expand(rows, weight, False)[0]
    z2 = wide_tensors[-1] if wide_tensors else call.depthwise(z1, expand, False)[0]
    stencil = coefficients(depthwise.scale, depthwise.shift)

    grad = grad.permute(0, 2, 3, 1).contiguous()
    grad_rows = native.cpu_mbconv_rows(grad, None, drop_path_scale)
    gradients = {"project_bias": grad_rows.sum(0)[: call.out_channels]}

    excite, gate = None, None
    if description.squeeze_excite is not None:
        activation = description.squeeze_excite.activation
        if not saved:
            squeezed = native.cpu_mbconv_pool(z2, stencil, *call.settings)[:, :wide]
        excite = Gate.compute(squeezed, parameters, activation)
        gate = coefficients(*excite.gate.unbind())
    dy2, grad_weight, sums, grad_gate = native.cpu_mbconv_backward_project(
        grad_rows, z2, stencil, gate, call.project_weight, *call.settings
    )
    gradients["project_weight"] = sum_of_groups(grad_weight)[:wide, : call.out_channels].t()
    if excite is not None:
        grad_mean, excite_gradients = excite.backward(grad_gate[:, :wide], parameters, activation)
        gradients.update(excite_gradients)
        grad_mean = coefficients(*(grad_mean / call.out_pixels).unbind())
        sums = native.cpu_mbconv_backward_gate(dy2, z2, stencil, gate, grad_mean, *call.settings)

    total, product = sums.sum(0)[:, :wide]
    grad_scale, factors, grad_bias = depthwise.gradients(total, product, call.rows_out)
    gradients["depthwise_norm_weight"] = grad_scale
    gradients["depthwise_norm_bias"] = total
    gradients["depthwise_bias"] = grad_bias
    dpre, sums, grad_taps = native.cpu_mbconv_backward_depthwise(
        dy2,
        z2,
        z1,
        coefficients(*factors, expand.scale, expand.shift),
        call.depthwise_weight,
        *call.settings,
    )
    gradients["depthwise_weight"] = grad_taps.sum(0)[:, :wide].t()

    total, product = sums.sum(0)[:, :wide]
    grad_scale, factors, grad_constant = expand.gradients(total, product, call.rows_in)
    gradients["expand_norm_weight"] = grad_scale
    gradients["expand_norm_bias"] = total
    gradients["expand_bias"] = grad_constant
    expand_factors = coefficients(*factors)
    grad_weight = native.cpu_mbconv_backward_expand_weight(
        dpre, z1, expand_factors, rows, *call.settings
    )
    grad_folded = sum_of_groups(grad_weight)[:wide, : x.shape[1]]
    grad_expand = grad_folded * pre.scale.float()
    # Sums over all rows of pre_norm's output gradient, and of it times rows.
    total = torch.zeros_like(pre.shift)
    if not expand.measured:
        grad_expand.addr_(grad_constant.float(), pre.shift.float())
        total = (grad_constant.float() @ call.expand_weight).double()
    product = (call.expand_weight * grad_folded).sum(0).double()
    gradients["expand_weight"] = grad_expand
    grad_scale, (_, slope, constant), _ = pre.gradients(total, product, call.rows_in)
    gradients["pre_norm_weight"] = grad_scale
    gradients["pre_norm_bias"] = total

    shortcut_grad = None
    if description.residual:
        shortcut = build_shortcut(parameters, description)
        for stage in shortcut.stages:
            stage.needed = needed
        view = shortcut.backward(
            grad.permute(0, 3, 1, 2), call.x.permute(0, 3, 1, 2), [], "x" in needed
        )
        shortcut_grad = None if view is None else view.permute(0, 2, 3, 1).contiguous()
        for stage in shortcut.stages:
            gradients.update(stage.gradients)
    if "x" in needed:
        grad_x = native.cpu_mbconv_backward_expand_input(
            dpre,
            z1,
            expand_factors,
            weight,
            rows,
            slope.float(),
            constant.float(),
            shortcut_grad,
            *call.settings,
        )
        gradients["x"] = grad_x.permute(0, 3, 1, 2)
    return gradients
