"""Evaluation and training of the inverted bottleneck by Triton passes over wide tensors.

Training, of rows in units of the map and E-wide tensors in capitals:

    Z1 = rows Wf^T + bf                     pre_norm folded in (kernels/fold.py)
    Z2 = depthwise(act(y1)),                y1 = Z1 scale1 + shift1, expand_norm
    output = (gate * act(y2)) W2^T + ...    y2 = Z2 scale2 + shift2, depthwise_norm

    dY2, A2 from grad, W2 and Z2            gW2 from grad and A2 = act(y2), by BLAS
    dY1, dtaps from dY2, Z2 and Z1          gW and dx from dY1 and rows (kernels/expand_backward.py)

With a gate gW2 and ggate are made from grad and Z2, before dY2, and there is no A2.

Each pass measures what it writes; one small kernel makes a norm of that, updates its running
statistics, and another one its gradients. The shortcut is in shortcut.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moat_kernels.ops.common.batch_norm import NormParameters, RunningUpdate
from moat_kernels.ops.mbconv.algebra.geometry import Stencil
from moat_kernels.ops.mbconv.contract import Forward
from moat_kernels.ops.mbconv.description import MBConvDescription, MBConvParameters
from moat_kernels.ops.mbconv.triton import passes
from moat_kernels.ops.mbconv.triton.kernels.expand import expand
from moat_kernels.ops.mbconv.triton.kernels.expand_backward import expand_input, expand_products
from moat_kernels.ops.mbconv.triton.kernels.expand_gradient import expand_gradient
from moat_kernels.ops.mbconv.triton.kernels.fold import (
    PILOT,
    Folded,
    FoldedNorm,
    Ready,
    Weights,
    fold,
    fold_evaluation,
)
from moat_kernels.ops.mbconv.triton.kernels.moments import Moments, Sums, row_moments
from moat_kernels.ops.mbconv.triton.kernels.norm import (
    CENTRE,
    VARIANCE,
    fold_norm,
    norm_gradient,
)
from moat_kernels.ops.mbconv.triton.kernels.project import pool, project
from moat_kernels.ops.mbconv.triton.kernels.project_backward import (
    Biases,
    project_input,
    project_weight,
)
from moat_kernels.ops.mbconv.triton.kernels.shortcut import Pooling
from moat_kernels.ops.mbconv.triton.kernels.squeeze_excite import (
    Excitation,
    excite,
    excite_backward,
)
from moat_kernels.ops.mbconv.triton.launch_table import bias_splits
from moat_kernels.ops.mbconv.triton.shortcut import Shortcut
from moat_kernels.ops.triton_support.products import weight_gradient
from moat_kernels.ops.triton_support.replay import replayed

_NO_POOLING = Pooling.of(None, 1, torch.float32)


class Call:
    """One call's tensors as rows and its geometry, shared by forward and backward."""

    def __init__(
        self,
        x: Tensor,
        parameters: MBConvParameters,
        description: MBConvDescription,
        drop_path_scale: Tensor | None,
        dtype: torch.dtype | None,
    ) -> None:
        parameters = _dense(parameters)
        self.x = x.permute(0, 2, 3, 1).contiguous()
        self.parameters = parameters
        self.description = description
        self.drop_path_scale = None if drop_path_scale is None else drop_path_scale.contiguous()
        self.dtype = dtype or parameters.expand_weight.dtype
        batch, height, width, channels = self.x.shape
        self.stencil = Stencil.of(batch, height, width, description)
        self.out_pixels = self.stencil.out_pixels
        self.rows_out = batch * self.out_pixels
        self.x_rows = self.x.view(-1, channels)
        shortcut_weight = parameters.shortcut_weight
        self.weights = Weights(
            parameters.expand_weight.flatten(1).contiguous(),
            parameters.expand_bias,
            parameters.depthwise_weight.flatten(1).contiguous(),
            parameters.project_weight.flatten(1).contiguous(),
            None if shortcut_weight is None else shortcut_weight.flatten(1).contiguous(),
            parameters.shortcut_bias,
        )
        self.measures = tuple(
            norm is not None and not norm.frozen
            for norm in (description.pre_norm, description.expand_norm, description.depthwise_norm)
        )
        self.centred = self.measures[0] or self.measures[1]
        self.shortcut = None
        if description.residual:
            shortcut_dtype = self.x.dtype if self.weights.shortcut is None else self.dtype
            self.shortcut = Shortcut(self.x, self.stencil, description.pool, shortcut_dtype)
        # Whether rows lose their mean before they are rounded, of which not much would be left.
        has_centre = self.centred or description.pre_norm is not None
        self.shifted = has_centre and self.x.dtype != self.dtype

    def rows(self, centre: Tensor | None) -> Tensor:
        """[N, C] as the products take them; less `centre` [C] if they are shifted."""
        if not self.shifted:
            return self.x_rows.to(self.dtype)
        assert centre is not None
        return torch.sub(self.x_rows, centre, out=torch.empty_like(self.x_rows, dtype=self.dtype))

    def fold(self, update: RunningUpdate | None, pre: Tensor | None, pooling: Pooling) -> Folded:
        """pre: what an earlier call gave; else x is measured, where a norm is."""
        moments = row_moments(self.x_rows) if self.centred and pre is None else None
        norm, parameters = self.description.pre_norm, self.parameters.pre_norm
        return fold(
            *(self.weights, self.dtype, norm, parameters, moments, self.shifted, update, pre),
            pooling,
        )

    def pooling(self) -> Pooling:
        return _NO_POOLING if self.shortcut is None else self.shortcut.pooling()

    def projection(self, ready: Ready, pooling: Pooling) -> tuple[Any, ...]:
        """What `project` takes after the gate."""
        added, dtype = None, self.dtype
        if self.shortcut is not None:
            added = self.shortcut.rows(pooling)
            dtype = torch.promote_types(dtype, added.dtype)
        bias = self.parameters.project_bias
        return ready, bias, self.drop_path_scale, added, self.out_pixels, dtype

    def output_map(self, rows: Tensor) -> Tensor:
        """[M, C_out] as a channels_last [B, C_out, H_out, W_out]."""
        stencil = self.stencil
        maps = rows.view(stencil.batch, stencil.out_height, stencil.out_width, -1)
        return maps.permute(0, 3, 1, 2)

    def excite(self, sums: Sums, pixels: int) -> Excitation:
        gate = self.description.squeeze_excite
        assert gate is not None
        return excite(sums, pixels, self.parameters, gate.activation)


def _dense(parameters: MBConvParameters) -> MBConvParameters:
    """The same with vectors that kernels can read: one element behind the other."""
    changed: dict[str, Any] = {}
    for name, value in zip(MBConvParameters._fields, parameters, strict=True):
        if isinstance(value, NormParameters):
            if any(tensor is not None and not tensor.is_contiguous() for tensor in value):
                dense = (None if tensor is None else tensor.contiguous() for tensor in value)
                changed[name] = NormParameters(*dense)
        elif value is not None and value.dim() == 1 and not value.is_contiguous():
            changed[name] = value.contiguous()
    return parameters._replace(**changed) if changed else parameters


@replayed(passes.setting)
def evaluate(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """The block with fixed statistics: every norm folded, every activation computed once."""
    call = Call(x, parameters, description, drop_path_scale, dtype)
    parameters = call.parameters
    norms = (
        FoldedNorm(description.pre_norm, parameters.pre_norm),
        FoldedNorm(description.expand_norm, parameters.expand_norm),
        FoldedNorm(description.depthwise_norm, parameters.depthwise_norm),
    )
    pooling = call.pooling()
    folded = fold_evaluation(
        *(call.weights, parameters.depthwise_bias, call.dtype, norms, call.shifted),
        pooling,
    )
    h2 = passes.expand_depthwise(
        *(call.rows(parameters.pre_norm.running_mean), folded.expand, folded.bias),
        *(description.expand_activation, folded.taps, folded.depthwise_bias),
        *(description.depthwise_activation, call.stencil),
    )
    gate = None
    if description.squeeze_excite is not None:
        gate = call.excite(pool(h2, None, "identity", call.out_pixels), call.out_pixels).gate
    return call.output_map(
        project(h2, None, "identity", gate, *call.projection(folded.ready, pooling))
    )


@replayed(passes.setting)
def forward(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
    updates: Mapping[str, RunningUpdate],
) -> Forward:
    """Compute the block and save what `recompute` says, beside the statistics."""
    call = Call(x, parameters, description, drop_path_scale, dtype)
    parameters = call.parameters
    pooling = call.pooling()
    folded = call.fold(_in_kernel(updates, "pre_norm"), None, pooling)
    z1, moments = expand(
        call.rows(folded.pre[CENTRE]), folded.expand, folded.bias, "identity", call.measures[1]
    )
    expand_norm = _fold_norm(call, "expand_norm", moments, folded.constant, folded.taps, updates)
    convolution = _convolution(call, folded, call.measures[2])
    # Called from here, not by passes.depthwise: a launch is found a few calls below `forward`.
    depthwise = passes.depthwise.choose(z1, expand_norm, *convolution)
    z2, moments = depthwise(z1, expand_norm, *convolution)
    bias = parameters.depthwise_bias
    depthwise_norm = _fold_norm(call, "depthwise_norm", moments, bias, folded.taps, updates)
    activation = description.depthwise_activation
    squeezed, gate = folded.taps.new_empty(0), None
    if description.squeeze_excite is not None:
        excitation = call.excite(
            pool(z2, depthwise_norm, activation, call.out_pixels), call.out_pixels
        )
        squeezed, gate = excitation.mean, excitation.gate
    output = project(z2, depthwise_norm, activation, gate, *call.projection(folded.ready, pooling))
    norms = {
        "pre_norm": (folded.pre, None),
        "expand_norm": (expand_norm, folded.constant),
        "depthwise_norm": (depthwise_norm, bias),
    }
    measured = {
        name: _moments(*norms[name])
        for name, measures in zip(norms, call.measures, strict=True)
        if measures and _in_kernel(updates, name) is None
    }
    wide = {"none": [z1, z2], "expand": [z2], "block": []}[recompute]
    saved = [folded.pre, expand_norm, depthwise_norm, squeezed, *wide]
    return Forward(call.output_map(output), measured, saved)


def _in_kernel(updates: Mapping[str, RunningUpdate], name: str) -> RunningUpdate | None:
    """The update of a norm's running statistics, if kernels make it: dense, at most float32."""
    update = updates.get(name)
    if update is None or update.momentum is None:
        return None
    mean, variance, tracked = update.tensors
    fits = mean.is_contiguous() and variance.is_contiguous()
    fits = fits and torch.float64 not in (mean.dtype, variance.dtype)
    fits = fits and (tracked is None or tracked.device == mean.device)
    return update if fits else None


def _convolution(call: Call, folded: Folded, measure: bool) -> tuple[Any, ...]:
    """What the depthwise pass takes after its input and norm."""
    activation = call.description.expand_activation
    return activation, folded.taps, None, "identity", call.stencil, measure


def _fold_norm(
    call: Call,
    name: str,
    moments: Moments | None,
    constant: Tensor | None,
    like: Tensor,
    updates: Mapping[str, RunningUpdate],
) -> Tensor:
    norm, parameters = getattr(call.description, name), getattr(call.parameters, name)
    return fold_norm(norm, parameters, moments, constant, like, _in_kernel(updates, name))


def _moments(norm: Tensor, constant: Tensor | None) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of what a norm sees, its input and `constant`."""
    mean, variance = norm[CENTRE], norm[VARIANCE]
    return mean if constant is None else mean + constant, variance


@replayed(passes.setting)
def backward(
    grad: Tensor,
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
    saved: list[Tensor],
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients by name, of "x" and of the parameters in `needed` (and of some others)."""
    call = Call(x, parameters, description, drop_path_scale, dtype)
    parameters = call.parameters
    pre, expand_norm, depthwise_norm, squeezed, *wide = saved
    folded = call.fold(None, pre, _NO_POOLING)
    rows = call.rows(pre[CENTRE])
    z1, z2 = wide[0] if len(wide) == 2 else None, wide[-1] if wide else None
    if z1 is None:
        z1, _ = expand(rows, folded.expand, folded.bias, "identity", False)
    if z2 is None:
        z2, _ = passes.depthwise(z1, expand_norm, *_convolution(call, folded, False))
    grad_rows = grad.permute(0, 2, 3, 1).reshape(call.rows_out, -1).contiguous()
    low_grad = grad_rows.to(call.dtype)
    gradients: dict[str, Tensor] = {}
    addend = None
    if call.shortcut is not None and "x" in needed:
        weight = folded.ready.shortcut
        addend = call.shortcut.input_gradient(grad_rows if weight is None else low_grad, weight)
    dy2, sums, parts = _project_backward(
        call, low_grad, z2, depthwise_norm, folded.ready.project, squeezed, needed, gradients
    )
    factors, norm_gradients, _, summed = norm_gradient(
        *(sums, depthwise_norm, parameters.depthwise_norm, parameters.depthwise_bias, None),
        *(call.rows_out, call.measures[2], True, None if parts is None else parts.rows),
        _NO_POOLING,
    )
    _name(gradients, "depthwise_norm", norm_gradients, "depthwise_bias")
    if parts is not None:
        assert summed is not None
        gradients.update(parts.split(summed))
        del parts
    dy1, sums = passes.depthwise_backward(
        *(dy2, z2, factors, z1, expand_norm, description.expand_activation),
        *(folded.taps, call.stencil),
    )
    # Pooled now, not earlier: it would lie in memory where most does.
    wants_shortcut = parameters.shortcut_weight is not None and "shortcut_weight" in needed
    pooling = call.pooling() if wants_shortcut else _NO_POOLING
    factors, norm_gradients, grad_taps, _ = norm_gradient(
        *(sums, expand_norm, parameters.expand_norm, parameters.expand_bias),
        *(call.weights.depthwise, len(rows), call.measures[1], False),
        None,
        pooling,
    )
    _name(gradients, "expand_norm", norm_gradients, "expand_bias")
    assert grad_taps is not None
    gradients["depthwise_weight"] = grad_taps
    shortcut = None
    if call.shortcut is not None and wants_shortcut:
        shortcut = low_grad, call.shortcut.rows(pooling)
    products, grad_shortcut = expand_products(dy1, rows, pre[PILOT], call.measures[1], shortcut)
    del pooling, shortcut  # the pooled rows
    if grad_shortcut is not None:
        gradients["shortcut_weight"] = grad_shortcut
    gradient = expand_gradient(
        *(products, factors, folded, call.weights, parameters.pre_norm),
        *(len(rows), call.measures[:2]),
    )
    gradients["expand_weight"] = gradient.weight
    gradients["pre_norm_weight"] = gradient.pre_weight
    gradients["pre_norm_bias"] = gradient.pre_bias
    if "x" in needed:
        grad_x = expand_input(dy1, gradient, rows, pre[PILOT], addend, x.shape[3], x.dtype)
        gradients["x"] = grad_x.view(call.x.shape).permute(0, 3, 1, 2)
    return gradients


class Parts(NamedTuple):
    """Gradients in parts: float32 `rows`, to be added up, of so many elements each, by name."""

    rows: Tensor
    widths: dict[str, int]

    def split(self, summed: Tensor) -> dict[str, Tensor]:
        """The gradients, from the sum of the rows."""
        return dict(zip(self.widths, summed.split(list(self.widths.values())), strict=True))


def _name(gradients: dict[str, Tensor], norm: str, listed: list[Tensor], constant: str) -> None:
    """Enter those of a norm's weight and bias, and of the constant before it."""
    names = (f"{norm}_weight", f"{norm}_bias", constant)
    gradients.update(zip(names, listed, strict=True))


def _project_backward(
    call: Call,
    grad: Tensor,
    z2: Tensor,
    norm: Tensor,
    weight: Tensor,
    squeezed: Tensor,
    needed: frozenset[str],
    gradients: dict[str, Tensor],
) -> tuple[Tensor, Sums, Parts | None]:
    """Gradient of depthwise_norm's output, its sums, and gradients of project that are in parts.

    Enters those of squeeze-excite, and that of project's weight where it is whole. grad: of the
    output, [M, C_out] in the dtype of the products.
    """
    parameters, activation = call.parameters, call.description.depthwise_activation
    pixels, channels = call.out_pixels, grad.shape[1]
    biases = [
        name
        for name in ("project_bias", "shortcut_bias")
        if name in needed and getattr(parameters, name) is not None
    ]
    columns = channels * len(biases)
    widths: dict[str, int] = dict.fromkeys(biases, channels)
    gate, grad_mean, rows, part = None, None, None, 0
    if call.description.squeeze_excite is not None:
        excitation = call.excite(Sums(squeezed[:, None], 1), 1)
        gate = excitation.gate
        rows, part, grad_gate = project_weight(
            *(grad, z2, norm, activation, call.drop_path_scale, gate, weight, pixels, columns)
        )
        widths = {"project_weight": weight.numel(), **widths}
        grad_mean, excite_gradients = excite_backward(
            *(grad_gate, excitation, pixels, parameters),
            call.description.squeeze_excite.activation,
        )
        gradients.update(excite_gradients)
    elif biases:
        splits, part = bias_splits(len(grad), columns)
        rows = grad.new_empty((splits, columns), dtype=torch.float32)
    sums_of_biases = None if rows is None or not biases else rows[:, -columns:]
    grad_y, activated, sums = project_input(
        *(grad, weight, z2, norm, activation, call.drop_path_scale, gate, grad_mean, pixels),
        gate is None and "project_weight" in needed,
        Biases("project_bias" in biases, "shortcut_bias" in biases, sums_of_biases, part),
    )
    if activated is not None:
        dtype = parameters.project_weight.dtype
        gradients["project_weight"] = weight_gradient(grad, activated, dtype)
    return grad_y, sums, None if rows is None else Parts(rows, widths)
