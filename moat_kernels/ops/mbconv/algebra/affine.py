"""A batch norm as one scale and shift per channel, and the way back from sums over the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moat_kernels.ops.mbconv.description import Norm, NormParameters


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


def scale_and_bias(parameters: NormParameters, inverse_std: Tensor) -> tuple[Tensor, Tensor]:
    """(weight / std, bias) of a norm [C] in the dtype of inverse_std; its defaults are 1 and 0."""
    scale = inverse_std if parameters.weight is None else inverse_std * parameters.weight
    if parameters.bias is None:
        return scale, torch.zeros_like(inverse_std)
    return scale, parameters.bias.to(inverse_std.dtype)


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
    scale, bias = scale_and_bias(parameters, inverse_std)
    return Affine(centre, inverse_std, scale, bias - centre * scale, not norm.frozen)
