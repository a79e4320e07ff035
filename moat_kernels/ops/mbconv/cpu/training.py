"""Training of the inverted bottleneck by native CPU passes (csrc/cpu/host/mbconv_train*.cpp).

Wide tensors (E channels), and the algebra of the norms between the passes, are the native ops'.
With rows = x - mean, the batch's if pre_norm or expand_norm measures it, else pre_norm's running
one, or 0, so that samples with fixed statistics do not mix:

    z1 = rows W'^T          W' = W1 diag(pre_norm's scale)
    y1 = z1 scale1 + shift1                 expand_norm, and what the centring left out
    z2 = depthwise(act(y1))
    y2 = z2 scale2 + shift2                 depthwise_norm
    output = gate act(y2) W2^T + bias, and the shortcut

Statistics of z1 and z2 are summed by the passes that write them: z1 around 0, which is then its
mean, z2 around one of its values. Sums over all pixels are finished in float64. Every pass adds in
an order that depends on the shape only, so results do not depend on the number of threads;
squeeze-excite's small products and the shortcut, which are stock, may.

z1 and z2 are kept in the dtype of the convolutions' weights, or autocast's. If that is bfloat16 and
the CPU multiplies it, so are the operands of all products and the gradients of wide tensors, and
weights are rounded once, where they are packed; sums, statistics, activations and the depthwise
convolution are in float32, as everything else is elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.mbconv.algebra.geometry import Stencil
from moat_kernels.ops.mbconv.algebra.shortcut import shortcut, shortcut_backward
from moat_kernels.ops.mbconv.algebra.squeeze_excite import Excitation
from moat_kernels.ops.mbconv.contract import Forward
from moat_kernels.ops.mbconv.cpu.arguments import (
    TrainSettings,
    bottleneck_tensors,
    eps_of,
)
from moat_kernels.ops.mbconv.description import (
    NORMS,
    WEIGHTS,
    MBConvDescription,
    MBConvParameters,
    Norm,
    NormParameters,
    cast_weights,
)

# Channels that the kernels keep together; vectors of E channels are padded to a multiple.
WIDE_CHANNELS = 64

# The gradients that cpu_mbconv_train_backward gives, in its order.
GRADIENTS = (
    "x",
    *("expand_weight", "expand_bias"),
    *("depthwise_weight", "depthwise_bias"),
    *("project_weight", "project_bias"),
    *("pre_norm_weight", "pre_norm_bias"),
    *("expand_norm_weight", "expand_norm_bias"),
    *("depthwise_norm_weight", "depthwise_norm_bias"),
)
_PASSED_NORMS = ("pre_norm", "expand_norm", "depthwise_norm")


def padded_wide(channels: int) -> int:
    return -(-channels // WIDE_CHANNELS) * WIDE_CHANNELS


def _in_float(parameters: MBConvParameters) -> MBConvParameters:
    """The same in float32; as they are, if they are that already."""

    def convert(tensor: Tensor | None) -> Tensor | None:
        # `float` would return such a tensor as it is, too, but through the dispatcher.
        if tensor is None or tensor.dtype == torch.float32:
            return tensor
        return tensor.float()

    fields: dict[str, Any] = {name: convert(getattr(parameters, name)) for name in WEIGHTS}
    for name in NORMS:
        fields[name] = NormParameters(*map(convert, getattr(parameters, name)[:4]))
    return MBConvParameters(**fields)


def product_dtype(wide_dtype: torch.dtype) -> torch.dtype:
    """What products are multiplied in, of wide tensors in a dtype."""
    narrow = wide_dtype == torch.bfloat16 and torch.ops.moat_kernels.cpu_multiplies(wide_dtype)
    return torch.bfloat16 if narrow else torch.float32


class Call:
    """One call's tensors and numbers, shared by forward and backward.

    dtype: that of autocast, or None.
    """

    def __init__(
        self,
        x: Tensor,
        parameters: MBConvParameters,
        description: MBConvDescription,
        dtype: torch.dtype | None,
    ) -> None:
        self.x = x.permute(0, 2, 3, 1).contiguous()
        wide_dtype = parameters.expand_weight.dtype if dtype is None else dtype
        self.product_dtype = product_dtype(wide_dtype)
        self.parameters = parameters = _in_float(parameters)
        batch, height, width, channels = self.x.shape
        stencil = Stencil.of(batch, height, width, description)
        self.out_channels, self.wide = parameters.project_weight.shape[:2]
        self.out_pixels = stencil.out_pixels
        settings = TrainSettings(
            batch=batch,
            height=height,
            width=width,
            out_height=stencil.out_height,
            out_width=stencil.out_width,
            stride=stencil.stride,
            padding_top=stencil.top,
            padding_left=stencil.left,
            in_channels=channels,
            wide_channels=self.wide,
            out_channels=self.out_channels,
            expand_activation=description.expand_activation,
            depthwise_activation=description.depthwise_activation,
            pre_norm_eps=eps_of(description.pre_norm),
            expand_norm_eps=eps_of(description.expand_norm),
            depthwise_norm_eps=eps_of(description.depthwise_norm),
            pre_norm_mode=_mode(description.pre_norm),
            expand_norm_mode=_mode(description.expand_norm),
            depthwise_norm_mode=_mode(description.depthwise_norm),
            wide_dtype=wide_dtype,
        )
        tensors = bottleneck_tensors(parameters)
        self.settings = (
            *(None if tensor is None else tensor.contiguous() for tensor in tensors),
            *settings,
        )

    def shortcut_operands(self) -> tuple[Tensor, MBConvParameters]:
        """x as a map, and the parameters: in one dtype if the shortcut has a weight."""
        maps = self.x.permute(0, 3, 1, 2)
        if self.parameters.shortcut_weight is None:
            return maps, self.parameters
        names = [name for name in WEIGHTS if name.startswith("shortcut_")]
        return (
            maps.to(self.product_dtype),
            cast_weights(self.parameters, self.product_dtype, names),
        )


def _mode(norm: Norm | None) -> str:
    if norm is None:
        return "absent"
    return "frozen" if norm.frozen else "measured"


def as_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def unmeasured(x: Tensor, description: MBConvDescription) -> list[Tensor]:
    """What `forward` saves for recompute="block", empty: `backward` then finds all that by itself.

    For whoever computed the output in another way; fixed statistics only.
    """
    names = ["statistics"]
    if description.squeeze_excite is not None:
        names.append("squeezed")
    return [x.new_empty(0) for _ in names]


def _padded(vectors: Tensor) -> Tensor:
    """[B, E] as the kernels read it, [B, padded E]."""
    return F.pad(vectors, (0, padded_wide(vectors.shape[1]) - vectors.shape[1]))


def forward(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
    output_dtype: torch.dtype,
) -> Forward:
    """Compute the block, and save what `recompute` says beside the statistics."""
    native = torch.ops.moat_kernels
    call = Call(x, parameters, description, dtype)
    z1, z2, statistics, measured = native.cpu_mbconv_train_front(
        call.x, None, recompute == "none", *call.settings
    )
    saved, gate = [statistics], None
    if description.squeeze_excite is not None:
        squeezed = native.cpu_mbconv_train_pool(z2, statistics, *call.settings)[:, : call.wide]
        activation = description.squeeze_excite.activation
        gate = _padded(Excitation.compute(squeezed, call.parameters, activation).gate)
        saved.append(squeezed)

    addend = None
    if description.residual:
        added = shortcut(*call.shortcut_operands(), description)
        addend = added.permute(0, 2, 3, 1).contiguous()
    output = native.cpu_mbconv_train_project(
        z2, statistics, gate, drop_path_scale, addend, output_dtype, *call.settings
    )

    channels = call.x.shape[3]
    widths = [channels] * 2 + [call.wide] * 4
    moments = iter(measured.split(widths))
    pairs = {name: (next(moments), next(moments)) for name in _PASSED_NORMS}
    measuring = {
        name: pair
        for name, pair in pairs.items()
        if (norm := getattr(description, name)) is not None and not norm.frozen
    }
    saved += {"none": [z1, z2], "expand": [z2], "block": []}[recompute]
    return Forward(output.permute(0, 3, 1, 2), measuring, saved)


def backward(
    grad: Tensor,
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
    saved: list[Tensor],
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients by name, of "x" and of the parameters in `needed` (and of some others)."""
    native = torch.ops.moat_kernels
    call = Call(x, parameters, description, dtype)
    parameters, excite = call.parameters, description.squeeze_excite
    grad = grad.permute(0, 2, 3, 1).contiguous()
    statistics = saved[0] if saved[0].numel() else None  # see `unmeasured`
    wide_tensors = saved[2 if excite else 1 :]
    z1 = wide_tensors[0] if len(wide_tensors) == 2 else None
    z2 = wide_tensors[-1] if wide_tensors else None

    gradients: dict[str, Tensor] = {}
    gated_gradient, gate, grad_mean = None, None, None
    if excite is not None:
        if z2 is None:
            z1, z2, measured, _ = native.cpu_mbconv_train_front(
                call.x, statistics, True, *call.settings
            )
            statistics = measured if statistics is None else statistics
        squeezed = (
            saved[1]
            if saved[1].numel()
            else native.cpu_mbconv_train_pool(z2, statistics, *call.settings)[:, : call.wide]
        )
        gating = Excitation.compute(squeezed, parameters, excite.activation)
        gate = _padded(gating.gate)
        gated_gradient, grad_weight, grad_bias, grad_gate = native.cpu_mbconv_train_backward_gated(
            grad, z2, statistics, gate, drop_path_scale, *call.settings
        )
        mean, gradients = gating.backward(grad_gate[:, : call.wide], parameters, excite.activation)
        grad_mean = _padded(mean / call.out_pixels)

    shortcut_grad = None
    if description.residual:
        maps, operands = call.shortcut_operands()
        grad_maps = grad.permute(0, 3, 1, 2).to(maps.dtype)
        view, others = shortcut_backward(grad_maps, maps, operands, description, needed)
        gradients |= others
        shortcut_grad = None if view is None else view.permute(0, 2, 3, 1).contiguous()
    results = native.cpu_mbconv_train_backward(
        *(grad, call.x, z1, z2, gated_gradient, gate, grad_mean, statistics),
        *(drop_path_scale, shortcut_grad, "x" in needed),
        *call.settings,
    )
    gradients.update(zip(GRADIENTS, results, strict=True))
    gradients["x"] = gradients["x"].permute(0, 3, 1, 2) if "x" in needed else x.new_empty(0)
    if excite is not None:
        gradients.update(project_weight=grad_weight, project_bias=grad_bias)
    return gradients
