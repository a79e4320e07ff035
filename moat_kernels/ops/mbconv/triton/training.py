"""Evaluation and training of the inverted bottleneck by Triton passes over wide tensors.

Training, of rows in units of the map and E-wide tensors in capitals:

    Z1 = rows Wf^T + bf                     expand, norms folded in (expand.py)
    Z2 = depthwise(act(y1)),                y1 = Z1, or Z1 scale1 + shift1
    output = (gate * act(y2)) W2^T + ...    y2 = Z2 scale2 + shift2, depthwise_norm

    gW2, ggate from grad and Z2             dY2 from grad, W2 and Z2
    dY1, dtaps from dY2, Z2 and Z1          gWf from dY1 and rows; dx from dY1, Wf and rows

Whatever is not E-wide (shortcut, gates, norms' algebra, sums of partial sums) is stock PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.mbconv.algebra.affine import Affine, make_affine
from moat_kernels.ops.mbconv.algebra.geometry import Stencil
from moat_kernels.ops.mbconv.algebra.shortcut import shortcut, shortcut_backward
from moat_kernels.ops.mbconv.algebra.squeeze_excite import Excitation
from moat_kernels.ops.mbconv.contract import Forward
from moat_kernels.ops.mbconv.description import MBConvDescription, MBConvParameters
from moat_kernels.ops.mbconv.triton import passes
from moat_kernels.ops.mbconv.triton.expand import Expand, make_expand
from moat_kernels.ops.mbconv.triton.kernels.covariance import covariance
from moat_kernels.ops.mbconv.triton.kernels.expand import expand as expand_rows
from moat_kernels.ops.mbconv.triton.kernels.project import pool, project
from moat_kernels.ops.mbconv.triton.kernels.project_backward import project_input, project_weight


class Call:
    """One call's tensors as rows and its geometry, shared by forward and backward."""

    def __init__(
        self,
        x: Tensor,
        parameters: MBConvParameters,
        description: MBConvDescription,
        drop_path_scale: Tensor | None,
    ) -> None:
        self.x = x.permute(0, 2, 3, 1).contiguous()
        self.parameters = parameters
        self.description = description
        self.drop_path_scale = _as_float(drop_path_scale)
        batch, height, width, channels = self.x.shape
        self.stencil = Stencil.of(batch, height, width, description)
        self.out_pixels = self.stencil.out_pixels
        self.rows_out = batch * self.out_pixels
        self.rows = self.x.view(-1, channels)
        self.project_weight = parameters.project_weight.flatten(1).contiguous()
        self.taps = parameters.depthwise_weight.flatten(1).t().float().contiguous()

    def expand(self) -> Expand:
        return make_expand(self.rows, self.parameters, self.description)

    def convolution(self, measure: bool) -> tuple[Any, ...]:
        """What the depthwise pass takes after its input: z2 of act(y1), unless it is folded."""
        return (
            self.description.expand_activation,
            *(self.taps, None, "identity", self.stencil, measure),
        )

    def fuses_backward(self, expand: Expand) -> bool:
        """Whether the backward pass of the depthwise convolution computes z1 without storing it."""
        convolution = (self.description.expand_activation, self.taps, self.stencil)
        return passes.expand_depthwise_backward.is_cuda(
            None, None, None, *expand.operands, *convolution
        )

    def measures_depthwise(self) -> bool:
        norm = self.description.depthwise_norm
        return norm is not None and not norm.frozen

    def fold_depthwise(self, moments: tuple[Tensor, Tensor]) -> Affine:
        constant = self.parameters.depthwise_bias
        if constant is None:
            constant = self.taps.new_zeros(self.taps.shape[1])
        return make_affine(
            self.description.depthwise_norm, self.parameters.depthwise_norm, moments, constant
        )

    def shortcut(self) -> Tensor | None:
        """What is added to the bottleneck, [M, C_out]."""
        if not self.description.residual:
            return None
        added = shortcut(self.x.permute(0, 3, 1, 2), self.parameters, self.description)
        return added.permute(0, 2, 3, 1).reshape(self.rows_out, -1).contiguous()

    def projection(self) -> tuple[Any, ...]:
        """What `project` takes after the gate."""
        added = self.shortcut()
        dtype = self.project_weight.dtype
        if added is not None:
            dtype = torch.promote_types(dtype, added.dtype)
        bias = _as_float(self.parameters.project_bias)
        return (
            *(self.project_weight, bias, self.drop_path_scale, added),
            *(self.out_pixels, dtype),
        )

    def output_map(self, rows: Tensor) -> Tensor:
        """[M, C_out] as a channels_last [B, C_out, H_out, W_out]."""
        stencil = self.stencil
        maps = rows.view(stencil.batch, stencil.out_height, stencil.out_width, -1)
        return maps.permute(0, 3, 1, 2)

    def excite(self, squeezed: Tensor) -> Excitation:
        gate = self.description.squeeze_excite
        assert gate is not None
        return Excitation.compute(squeezed, self.gate_parameters(), gate.activation)

    def gate_parameters(self) -> MBConvParameters:
        """Those of squeeze-excite in float32: its two products are small."""
        names = ("se_reduce_weight", "se_reduce_bias", "se_expand_weight", "se_expand_bias")
        single: dict[str, Any] = {name: _as_float(getattr(self.parameters, name)) for name in names}
        return self.parameters._replace(**single)


def _as_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _stencil_affine(affine: Affine) -> Tensor:
    """(scale, shift, centre) as the kernels read them, float32 [3, E]."""
    return torch.stack((affine.scale, affine.shift, affine.centre)).float()


def evaluate(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    drop_path_scale: Tensor | None,
) -> Tensor:
    """The block with fixed statistics: every norm folded, every activation computed once."""
    call = Call(x, parameters, description, drop_path_scale)
    expand = call.expand()
    expand.begin()
    zeros = call.taps.new_zeros(call.taps.shape[1])
    norm = call.fold_depthwise((zeros, zeros))
    h2, _ = passes.expand_depthwise(
        *expand.operands,
        description.expand_activation,
        (call.taps * norm.scale).float(),
        norm.shift.float(),
        description.depthwise_activation,
        call.stencil,
        False,
    )
    gate = None
    if description.squeeze_excite is not None:
        gate = call.excite(pool(h2, None, "identity", call.out_pixels)).gate
    return call.output_map(project(h2, None, "identity", gate, *call.projection()))


def forward(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
) -> Forward:
    """Compute the block and save what `recompute` says, beside the statistics."""
    call = Call(x, parameters, description, drop_path_scale)
    expand = call.expand()
    pilot = expand.begin()
    if pilot is not None:
        expand.take_covariance(*covariance(expand.rows, pilot))
    convolution = call.convolution(measure=call.measures_depthwise())
    keep = []
    if recompute != "none" and expand.complete:
        z2, measured = passes.expand_depthwise(*expand.operands, *convolution)
    else:
        z1, z1_moments = expand_rows(*expand.operands, "identity", expand.measures)
        expand.take_moments(z1_moments)
        # Called from here, not by passes.depthwise: a launch is found a few calls below `forward`.
        depthwise = passes.depthwise.choose(z1, expand.affine, *convolution)
        z2, measured = depthwise(z1, expand.affine, *convolution)
        keep = [z1]
    zeros = call.taps.new_zeros(call.taps.shape[1])
    depthwise_moments = (zeros, zeros.clone())
    if measured is not None:
        depthwise_moments = (measured[0].float(), measured[1].float())
    norm = call.fold_depthwise(depthwise_moments)
    affine, activation = _stencil_affine(norm), description.depthwise_activation
    squeezed, gate = zeros.new_empty(0), None
    if description.squeeze_excite is not None:
        squeezed = pool(z2, affine, activation, call.out_pixels)
        gate = call.excite(squeezed).gate
    output = project(z2, affine, activation, gate, *call.projection())
    moments = expand.moments()
    if measured is not None:
        constant = 0.0 if parameters.depthwise_bias is None else parameters.depthwise_bias
        moments["depthwise_norm"] = (depthwise_moments[0] + constant, depthwise_moments[1])
    wide = {"none": [*keep, z2], "expand": [z2], "block": []}[recompute]
    saved = [*expand.statistics, *depthwise_moments, squeezed, *wide]
    return Forward(call.output_map(output), moments, saved)


def backward(
    grad: Tensor,
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
    saved: list[Tensor],
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients by name, of "x" and of the parameters in `needed` (and of some others)."""
    call = Call(x, parameters, description, drop_path_scale)
    expand = call.expand()
    count = expand.statistics_count
    expand.restore(tuple(saved[:count]))
    (mean, variance, squeezed), wide = saved[count : count + 3], saved[count + 3 :]
    z1 = wide[0] if len(wide) == 2 else None
    z2 = wide[-1] if wide else None
    convolution = call.convolution(measure=False)
    # Where nothing else needs z1, the last pass that does computes it.
    if z1 is None and not (expand.complete and (z2 is not None or call.fuses_backward(expand))):
        z1, _ = expand_rows(*expand.operands, "identity", False)
    if z2 is None:
        z2, _ = (
            passes.expand_depthwise(*expand.operands, *convolution)
            if z1 is None
            else passes.depthwise(z1, expand.affine, *convolution)
        )
    norm = call.fold_depthwise((mean, variance))
    affine = _stencil_affine(norm)
    activation = description.depthwise_activation

    grad_rows = grad.permute(0, 2, 3, 1).reshape(call.rows_out, -1)
    shortcut_grad, gradients = _shortcut_backward(call, grad, needed)
    if call.drop_path_scale is not None:
        scale = call.drop_path_scale.repeat_interleave(call.out_pixels)
        grad_rows = grad_rows * scale[:, None]
    grad_rows = grad_rows.to(call.project_weight.dtype).contiguous()
    gradients["project_bias"] = grad_rows.sum(0, dtype=torch.float32)

    excite, gate, grad_mean = None, None, None
    if description.squeeze_excite is not None:
        excite = call.excite(squeezed)
        gate = excite.gate
    grad_gate = None
    if excite is not None or "project_weight" in needed:
        gradients["project_weight"], grad_gate = project_weight(
            grad_rows, z2, affine, activation, gate, call.project_weight, call.out_pixels
        )
    if excite is not None:
        assert grad_gate is not None and description.squeeze_excite is not None
        grad_mean, excite_gradients = excite.backward(
            grad_gate, call.gate_parameters(), description.squeeze_excite.activation
        )
        gradients.update(excite_gradients)
        grad_mean = grad_mean / call.out_pixels
    dy2, sums = project_input(
        grad_rows, call.project_weight, z2, affine, activation, gate, grad_mean, call.out_pixels
    )
    total, product = sums
    grad_scale, factors, grad_bias = norm.gradients(
        total, product + norm.centre * total, call.rows_out
    )
    gradients["depthwise_norm_weight"] = grad_scale
    gradients["depthwise_norm_bias"] = total
    gradients["depthwise_bias"] = grad_bias
    grad_norm = (dy2, z2, torch.stack(factors).float())
    stencil = (description.expand_activation, call.taps, call.stencil)
    if z1 is None:
        dy1, sums = passes.expand_depthwise_backward(*grad_norm, *expand.operands, *stencil)
    else:
        dy1, sums = passes.depthwise_backward(*grad_norm, z1, expand.affine, *stencil)
    gradients["depthwise_weight"] = sums[:9].t()
    gradients |= expand.backward(dy1, z1, sums[9], sums[10], shortcut_grad, needed)
    if "x" in needed:
        gradients["x"] = gradients["x"].view(call.x.shape).permute(0, 3, 1, 2)
    return gradients


def _shortcut_backward(
    call: Call, grad: Tensor, needed: frozenset[str]
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(gradient of x [N, C] through the shortcut if it is needed, those of its parameters)."""
    if not call.description.residual:
        return None, {}
    grad_x, gradients = shortcut_backward(
        grad.contiguous(memory_format=torch.channels_last),
        call.x.permute(0, 3, 1, 2),
        call.parameters,
        call.description,
        needed,
    )
    if grad_x is None:
        return None, gradients
    return grad_x.permute(0, 2, 3, 1).reshape(call.rows.shape).contiguous(), gradients
