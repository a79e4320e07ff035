"""The shortcut of an inverted bottleneck in stock PyTorch operations: a pool, a 1x1 convolution."""

from __future__ import annotations

from torch import Tensor

from moat_kernels.ops.mbconv.algebra.chain import Chain
from moat_kernels.ops.mbconv.algebra.stages import Linear, PoolStage, Stage
from moat_kernels.ops.mbconv.description import MBConvDescription, MBConvParameters


def _chain(parameters: MBConvParameters, description: MBConvDescription) -> Chain:
    """The stages of the shortcut; none for the identity."""
    stages: list[Stage] = []
    if description.pool is not None:
        stages.append(PoolStage(description.pool))
    if parameters.shortcut_weight is not None:
        stages.append(Linear("shortcut", parameters.shortcut_weight, parameters.shortcut_bias))
    return Chain(stages, [])


def shortcut(x: Tensor, parameters: MBConvParameters, description: MBConvDescription) -> Tensor:
    """What is added to the bottleneck's output: [B, C_out, H_out, W_out], in channels_last if x is.

    The dtype is x's, or that of the shortcut's weight if there is one.
    """
    return _chain(parameters, description).forward(x)[0]


def shortcut_backward(
    grad: Tensor,
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    needed: frozenset[str],
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(gradient of x through the shortcut if "x" is needed, those of its parameters by name).

    grad: of the block's output. Both maps in channels_last.
    """
    if parameters.shortcut_weight is not None:
        grad = grad.to(parameters.shortcut_weight.dtype)
    return _chain(parameters, description).backward(grad, x, [], needed)


def scale_samples(maps: Tensor, drop_path_scale: Tensor | None) -> Tensor:
    """Each of maps [B, ...] times its element of drop_path_scale [B], in the maps' dtype."""
    if drop_path_scale is None:
        return maps
    return maps * drop_path_scale.to(maps.dtype).view(-1, *(1,) * (maps.dim() - 1))
