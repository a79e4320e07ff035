"""Argument checks of `mbconv`: every error names the argument, what it was, what is supported."""

from __future__ import annotations

from torch import Tensor

from moat_kernels.ops.common.checks import FLOATING, check_tensor
from moat_kernels.ops.common.spatial import output_size, resolve_padding
from moat_kernels.ops.mbconv.description import (
    NORMS,
    MBConvDescription,
    MBConvParameters,
    NormParameters,
)
from moat_kernels.ops.mbconv.running_statistics import values_per_channel

RECOMPUTE_LEVELS = ("auto", "none", "expand", "block")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(tensor).__name__}")
    pointwise = len(shape) == 2 and tensor.shape == (*shape, 1, 1)
    if tensor.shape != shape and not pointwise:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def _check_weights(x: Tensor, parameters: MBConvParameters, description: MBConvDescription) -> None:
    for name in ("expand_weight", "depthwise_weight", "project_weight"):
        if not isinstance(getattr(parameters, name), Tensor):
            raise TypeError(f"parameters.{name} must be a tensor, got {getattr(parameters, name)}")
    channels, wide = x.shape[1], parameters.expand_weight.shape[0]
    out_channels = parameters.project_weight.shape[0]
    middle = wide if description.order == "expand_first" else channels
    depthwise = parameters.depthwise_weight
    if depthwise.dim() != 4 or depthwise.shape[:2] != (middle, 1) or 0 in depthwise.shape:
        raise ValueError(
            f"parameters.depthwise_weight must be [{middle}, 1, K, K] with order "
            f"{description.order!r}, got {tuple(depthwise.shape)}"
        )
    shapes: dict[str, tuple[int, ...]] = {
        "expand_weight": (wide, channels),
        "expand_bias": (wide,),
        "depthwise_bias": (middle,),
        "project_weight": (out_channels, wide),
        "project_bias": (out_channels,),
        "shortcut_weight": (out_channels, channels),
        "shortcut_bias": (out_channels,),
    }
    if parameters.se_reduce_weight is not None:
        reduced = parameters.se_reduce_weight.shape[0]
        shapes["se_reduce_weight"] = (reduced, wide)
        shapes["se_reduce_bias"] = (reduced,)
        shapes["se_expand_weight"] = (wide, reduced)
        shapes["se_expand_bias"] = (wide,)
    for name, shape in shapes.items():
        _check_shape(f"parameters.{name}", getattr(parameters, name), shape, x)
    _check_shape("parameters.depthwise_weight", depthwise, tuple(depthwise.shape), x)
    widths = (channels, wide, middle, out_channels)
    for name, width in zip(NORMS, widths, strict=True):
        for part, tensor in zip(
            NormParameters._fields[:4], getattr(parameters, name), strict=False
        ):
            _check_shape(f"parameters.{name}.{part}", tensor, (width,), x)


def _check_agreement(parameters: MBConvParameters, description: MBConvDescription) -> None:
    """Tensors that the description needs are there, and none that it would ignore."""
    gated = description.squeeze_excite is not None
    for name in ("se_reduce_weight", "se_expand_weight"):
        if gated != (getattr(parameters, name) is not None):
            expected = "a tensor" if gated else "None"
            raise ValueError(
                f"parameters.{name} must be {expected} with "
                f"description.squeeze_excite={description.squeeze_excite}"
            )
    if not description.residual and parameters.shortcut_weight is not None:
        raise ValueError("parameters.shortcut_weight is given but description.residual is False")
    if parameters.shortcut_bias is not None and parameters.shortcut_weight is None:
        raise ValueError("parameters.shortcut_bias is given without shortcut_weight")
    for name in NORMS:
        norm, tensors = getattr(description, name), getattr(parameters, name)
        if norm is None and any(tensor is not None for tensor in tensors):
            raise ValueError(f"parameters.{name} holds tensors but description.{name} is None")
        if (tensors.running_mean is None) != (tensors.running_var is None):
            raise ValueError(
                f"parameters.{name} must have both running_mean and running_var or none"
            )
        if norm is not None and norm.frozen and tensors.running_mean is None:
            raise ValueError(f"description.{name} is frozen but has no running statistics")


def _check_sizes(
    x: Tensor, parameters: MBConvParameters, description: MBConvDescription, training: bool
) -> None:
    kernel_height, kernel_width = parameters.depthwise_weight.shape[2:]
    kernel_size = (kernel_height, kernel_width)
    height, width = x.shape[2:]
    top, bottom, left, right = resolve_padding(
        description.padding, height, width, kernel_size, description.stride
    )
    size = (
        output_size(height, top, bottom, kernel_size[0], description.stride),
        output_size(width, left, right, kernel_size[1], description.stride),
    )
    if min(size) < 1:
        raise ValueError(
            f"x of {height} x {width} is smaller than the depthwise kernel {kernel_size} with "
            f"padding {description.padding}"
        )
    for name in NORMS:
        norm = getattr(description, name)
        measures = norm is not None and training and not norm.frozen and not norm.process_group
        count = values_per_channel(name, x, parameters, description)
        if measures and norm.unbiased and count == 1:
            raise ValueError(
                f"x of shape {tuple(x.shape)} leaves one value per channel: the unbiased variance "
                f"of description.{name} needs at least two"
            )
    if description.residual:
        _check_shortcut(x, parameters, description, size)


def _check_shortcut(
    x: Tensor, parameters: MBConvParameters, description: MBConvDescription, size: tuple[int, int]
) -> None:
    _, channels, height, width = x.shape
    pool = description.pool
    if pool is not None:
        kernel_size = (pool.kernel_size, pool.kernel_size)
        top, bottom, left, right = resolve_padding(
            pool.padding, height, width, kernel_size, pool.stride
        )
        height = output_size(height, top, bottom, pool.kernel_size, pool.stride)
        width = output_size(width, left, right, pool.kernel_size, pool.stride)
    if (height, width) != size:
        raise ValueError(
            f"the shortcut is {height} x {width} but the bottleneck {size[0]} x {size[1]}: "
            f"description.pool={pool} does not fit stride {description.stride} and padding "
            f"{description.padding}"
        )
    out_channels = parameters.project_weight.shape[0]
    if parameters.shortcut_weight is None and channels != out_channels:
        raise ValueError(
            f"parameters.shortcut_weight is needed: x has {channels} channels, the bottleneck "
            f"{out_channels}"
        )


def check_mbconv(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    training: bool,
    recompute: str,
    drop_path_scale: Tensor | None,
) -> None:
    """Raise TypeError or ValueError unless `mbconv` can compute the call."""
    check_tensor("x", x, "[B, C, H, W]")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must have H, W >= 1, got shape {tuple(x.shape)}")
    if not isinstance(description, MBConvDescription):
        raise TypeError(f"description must be an MBConvDescription, got {type(description)}")
    if not isinstance(parameters, MBConvParameters):
        raise TypeError(f"parameters must be MBConvParameters, got {type(parameters)}")
    if recompute not in RECOMPUTE_LEVELS:
        raise ValueError(f"recompute must be one of {RECOMPUTE_LEVELS}, got {recompute!r}")
    _check_weights(x, parameters, description)
    _check_agreement(parameters, description)
    _check_sizes(x, parameters, description, training)
    if drop_path_scale is not None:
        if not description.residual:
            raise ValueError("drop_path_scale is given but description.residual is False")
        _check_shape("drop_path_scale", drop_path_scale, (x.shape[0],), x)
        if drop_path_scale.requires_grad:
            raise ValueError("drop_path_scale must not require grad: it has no gradient here")
