"""FLOPs of the inverted bottleneck: its convolutions, their gradients, and what is recomputed.

Squeeze-excite's products, which every backward pass computes again, count once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moat_kernels.ops.common.flops import (
    Shape,
    convolution_flops,
    weight_gradient_flops,
)
from moat_kernels.ops.common.spatial import output_size, resolve_padding
from moat_kernels.ops.mbconv.description import PARAMETER_NAMES, MBConvDescription

# What the backward pass computes again, by `recompute`.
_RECOMPUTED: dict[str, tuple[str, ...]] = {
    "none": (),
    "expand": ("expand",),
    "block": ("expand", "depthwise"),
}


class _Convolution(NamedTuple):
    """in_channels: of its input, weight: [C_out, C_in / groups, K, K], out: [B, C_out, H, W]."""

    in_channels: int
    weight: Shape
    out: Shape


def _convolutions(
    x: Shape, shapes: Mapping[str, Shape | None], description: MBConvDescription
) -> dict[str, _Convolution]:
    """By name; `shapes` by the names of PARAMETER_NAMES."""
    batch, _, height, width = x
    depthwise = shapes["depthwise_weight"]
    assert depthwise is not None
    kernel_size, stride = (depthwise[2], depthwise[3]), description.stride
    padding = resolve_padding(description.padding, height, width, kernel_size, stride)
    top, bottom, left, right = padding
    size = (height, width)
    out_size = (
        output_size(height, top, bottom, kernel_size[0], stride),
        output_size(width, left, right, kernel_size[1], stride),
    )
    expand_size = size if description.order == "expand_first" else out_size
    sizes = {
        "expand": expand_size,
        "depthwise": out_size,
        "se_reduce": (1, 1),
        "se_expand": (1, 1),
        "project": out_size,
        "shortcut": out_size,
    }
    convolutions = {}
    for name, map_size in sizes.items():
        weight = shapes[f"{name}_weight"]
        if weight is not None:
            weight = (*weight, 1, 1)[:4]
            in_channels = weight[0] if name == "depthwise" else weight[1]
            out = (batch, weight[0], *map_size)
            convolutions[name] = _Convolution(in_channels, weight, out)
    return convolutions


def _steps(description: MBConvDescription) -> list[str]:
    """The bottleneck's convolutions and norms, in the order in which they run."""
    order = ["expand", "depthwise"]
    if description.order == "depthwise_first":
        order.reverse()
    gate, second_norm = ["se_reduce", "se_expand"], [f"{order[1]}_norm"]
    squeeze_excite = description.squeeze_excite
    gated_first = squeeze_excite is not None and squeeze_excite.position == "before_norm"
    second = gate + second_norm if gated_first else second_norm + gate
    return ["pre_norm", order[0], f"{order[0]}_norm", order[1], *second, "project"]


def forward_flops(
    x: Shape, parameters: Sequence[Shape | None], description: MBConvDescription
) -> int:
    """parameters: the shapes of the tensors that PARAMETER_NAMES names."""
    shapes = dict(zip(PARAMETER_NAMES, parameters, strict=True))
    convolutions = _convolutions(x, shapes, description).values()
    return sum(convolution_flops(each.weight, each.out) for each in convolutions)


def described_forward(
    x: Shape,
    parameters: Sequence[Shape | None],
    running: Any,
    drop_path_scale: Any,
    description: str,
    *_: Any,
    **__: Any,
) -> int:
    return forward_flops(x, parameters, MBConvDescription.decode(description))


def trained_forward(
    x: Shape,
    parameters: Sequence[Shape | None],
    running: Any,
    updated: Any,
    *arguments: Any,
    **options: Any,
) -> int:
    return described_forward(x, parameters, running, *arguments, **options)


def described_backward(
    grad: Shape,
    x: Shape,
    parameters: Sequence[Shape | None],
    running: Any,
    drop_path_scale: Any,
    saved: Any,
    description: str,
    dtype: Any,
    recompute: str,
    backend: str,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    decoded = MBConvDescription.decode(description)
    shapes = dict(zip(PARAMETER_NAMES, parameters, strict=True))
    needed = dict(zip(("x", *PARAMETER_NAMES), needs, strict=True))
    convolutions = _convolutions(x, shapes, decoded)
    total = sum(
        convolution_flops(convolutions[name].weight, convolutions[name].out)
        for name in _RECOMPUTED[recompute]
    )
    for name, needs_input in _inputs_needed(decoded, needed):
        if name in convolutions:
            in_channels, weight, out = convolutions[name]
            total += convolution_flops(weight, out) * needs_input
            if needed[f"{name}_weight"]:
                total += weight_gradient_flops(in_channels, weight, out)
    return total


def _inputs_needed(
    description: MBConvDescription, needed: Mapping[str, bool]
) -> Iterator[tuple[str, bool]]:
    """(a convolution or norm, whether its input has a gradient), as autograd would find."""
    yield "shortcut", needed["x"]
    needs_input = needed["x"]
    for name in _steps(description):
        yield name, needs_input
        needs_input |= needed[f"{name}_weight"] or needed[f"{name}_bias"]
