"""Squeeze-excite behind its pool: two small products on the mean of every map, and back.

    gate = sigmoid(W2 act(W1 mean + b1) + b2)

Weights are read in their own dtype and multiplied in float32. A program holds one image's vectors;
the gradients of the weights are summed over the batch by another kernel, in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.mbconv.description import MBConvParameters
from moat_kernels.ops.mbconv.triton.kernels.moments import Sums
from moat_kernels.ops.mbconv.triton.kernels.norm_parameters import optional
from moat_kernels.ops.triton_support.activations import activate, activation_derivative
from moat_kernels.ops.triton_support.launching import launch

# Elements of a weight that a program holds at a time.
_TILE, _BACKWARD_TILE = 4096, 2048
_BLOCK_BATCH = 32
_SMALLEST = 16


class Excitation(NamedTuple):
    """Squeeze-excite of one batch, float32: mean [B, E], the reduced vector [B, R], gate [B, E]."""

    mean: Tensor
    reduced: Tensor
    gate: Tensor


@triton.jit
def _sum_parts(source_ptr, image, parts, wide, column, valid):
    """The sum of an image's parts, of some columns of [B, parts, wide]."""
    total = tl.zeros(column.shape, tl.float32)
    for part in tl.range(0, parts):
        source = source_ptr + (image * parts + part) * wide
        total += tl.load(source + column, mask=valid, other=0.0)
    return total


@triton.jit
def excite_kernel(
    sums_ptr,  # [B, parts, E] float32
    reduce_weight_ptr,  # [R, E]
    reduce_bias_ptr,  # [R], or None
    expand_weight_ptr,  # [E, R]
    expand_bias_ptr,  # [E], or None
    mean_ptr,  # [B, E] float32
    reduced_ptr,  # [B, R] float32
    gate_ptr,  # [B, E] float32
    parts, pixels, wide, small,
    ACTIVATION: tl.constexpr, BLOCK_WIDE: tl.constexpr, BLOCK_SMALL: tl.constexpr,
):  # fmt: skip
    """mean = sum of parts / pixels; reduced = W1 mean + b1; gate. One program: an image."""
    image = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BLOCK_SMALL)
    valid_inner = inner < small
    reduced = optional(reduce_bias_ptr, inner, valid_inner, 0.0)
    for start in tl.range(0, wide, BLOCK_WIDE):
        column = start + tl.arange(0, BLOCK_WIDE)
        valid = column < wide
        mean = _sum_parts(sums_ptr, image, parts, wide, column, valid) / pixels
        tl.store(mean_ptr + image * wide + column, mean, mask=valid)
        mask = valid_inner[:, None] & valid[None, :]
        offset = inner[:, None] * wide + column[None, :]
        weight = tl.load(reduce_weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        reduced += tl.sum(weight * mean[None, :], 1)
    tl.store(reduced_ptr + image * small + inner, reduced, mask=valid_inner)
    activated = tl.where(valid_inner, activate(reduced, ACTIVATION), 0.0)
    for start in tl.range(0, wide, BLOCK_WIDE):
        column = start + tl.arange(0, BLOCK_WIDE)
        valid = column < wide
        mask = valid[:, None] & valid_inner[None, :]
        offset = column[:, None] * small + inner[None, :]
        weight = tl.load(expand_weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        logit = tl.sum(weight * activated[None, :], 1)
        logit += optional(expand_bias_ptr, column, valid, 0.0)
        tl.store(gate_ptr + image * wide + column, 1.0 / (1.0 + tl.exp(-logit)), mask=valid)


def _weights(parameters: MBConvParameters) -> tuple[Tensor, Tensor]:
    """W1 [R, E] and W2 [E, R], contiguous."""
    assert parameters.se_reduce_weight is not None and parameters.se_expand_weight is not None
    return (
        parameters.se_reduce_weight.flatten(1).contiguous(),
        parameters.se_expand_weight.flatten(1).contiguous(),
    )


def _blocks(wide: int, small: int, tile: int) -> dict[str, int]:
    """The tile of a weight: all of its shorter axis."""
    inner = max(_SMALLEST, 1 << (small - 1).bit_length())
    outer = max(_SMALLEST, min(tile // inner, 1 << (wide - 1).bit_length()))
    return {"BLOCK_WIDE": outer, "BLOCK_SMALL": inner}


def excite(pooled: Sums, pixels: int, parameters: MBConvParameters, activation: str) -> Excitation:
    """Of the sums [B, parts, E] over parts of maps of `pixels`."""
    sums = pooled.values
    batch, parts, wide = sums.shape
    reduce_weight, expand_weight = _weights(parameters)
    small = reduce_weight.shape[0]
    mean, gate = sums.new_empty((batch, wide)), sums.new_empty((batch, wide))
    reduced = sums.new_empty((batch, small))
    reads = (
        *(sums, reduce_weight, parameters.se_reduce_bias),
        *(expand_weight, parameters.se_expand_bias),
    )
    launch(
        excite_kernel,
        (batch,),
        *(*reads, mean, reduced, gate, parts, pixels, wide, small),
        ACTIVATION=activation,
        **_blocks(wide, small, _TILE),
        num_warps=8,
        num_stages=1,
        reads=reads,
        writes=(mean, reduced, gate),
    )
    return Excitation(mean, reduced, gate)


@triton.jit
def excite_backward_kernel(
    grad_gate_ptr,  # [B, parts, E] float32
    gate_ptr,  # [B, E] float32
    reduced_ptr,  # [B, R] float32
    reduce_weight_ptr,  # [R, E]
    expand_weight_ptr,  # [E, R]
    grad_logit_ptr,  # [B, E] float32
    grad_reduced_ptr,  # [B, R] float32
    grad_mean_ptr,  # [B, E] float32
    parts, pixels, wide, small,
    ACTIVATION: tl.constexpr, BLOCK_WIDE: tl.constexpr, BLOCK_SMALL: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits, of `reduced` and of every pixel through the mean. As `excite`."""
    image = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BLOCK_SMALL)
    valid_inner = inner < small
    grad_activated = tl.zeros([BLOCK_SMALL], tl.float32)
    for start in tl.range(0, wide, BLOCK_WIDE):
        column = start + tl.arange(0, BLOCK_WIDE)
        valid = column < wide
        grad = _sum_parts(grad_gate_ptr, image, parts, wide, column, valid)
        gate = tl.load(gate_ptr + image * wide + column, mask=valid, other=0.0)
        grad *= gate * (1.0 - gate)
        tl.store(grad_logit_ptr + image * wide + column, grad, mask=valid)
        mask = valid[:, None] & valid_inner[None, :]
        offset = column[:, None] * small + inner[None, :]
        weight = tl.load(expand_weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad_activated += tl.sum(weight * grad[:, None], 0)
    reduced = tl.load(reduced_ptr + image * small + inner, mask=valid_inner, other=0.0)
    grad_reduced = grad_activated * activation_derivative(reduced, ACTIVATION)
    grad_reduced = tl.where(valid_inner, grad_reduced, 0.0)
    tl.store(grad_reduced_ptr + image * small + inner, grad_reduced, mask=valid_inner)
    for start in tl.range(0, wide, BLOCK_WIDE):
        column = start + tl.arange(0, BLOCK_WIDE)
        valid = column < wide
        mask = valid_inner[:, None] & valid[None, :]
        offset = inner[:, None] * wide + column[None, :]
        weight = tl.load(reduce_weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.sum(weight * grad_reduced[:, None], 0) / pixels
        tl.store(grad_mean_ptr + image * wide + column, grad, mask=valid)


@triton.jit
def excite_weight_kernel(
    grad_logit_ptr,  # [B, E] float32
    grad_reduced_ptr,  # [B, R] float32
    mean_ptr,  # [B, E] float32
    reduced_ptr,  # [B, R] float32
    grad_reduce_weight_ptr,  # [R, E]
    grad_reduce_bias_ptr,  # [R], or None
    grad_expand_weight_ptr,  # [E, R]
    grad_expand_bias_ptr,  # [E], or None
    batch, wide, small,
    ACTIVATION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr, BLOCK_WIDE: tl.constexpr, BLOCK_SMALL: tl.constexpr,
):  # fmt: skip
    """dW2 = grad_logit^T act(reduced), dW1 = grad_reduced^T mean, and the sums of both gradients.

    One program: a block of E.
    """
    column = tl.program_id(0) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    inner = tl.arange(0, BLOCK_SMALL)
    valid, valid_inner = column < wide, inner < small
    expand_weight = tl.zeros([BLOCK_WIDE, BLOCK_SMALL], tl.float32)
    reduce_weight = tl.zeros([BLOCK_WIDE, BLOCK_SMALL], tl.float32)
    expand_bias = tl.zeros([BLOCK_WIDE], tl.float32)
    reduce_bias = tl.zeros([BLOCK_SMALL], tl.float32)
    for start in tl.range(0, batch, BLOCK_BATCH):
        image = start + tl.arange(0, BLOCK_BATCH)
        inside = (image < batch)[:, None]
        wide_offset = image.to(tl.int64)[:, None] * wide + column[None, :]
        small_offset = image.to(tl.int64)[:, None] * small + inner[None, :]
        wide_mask, small_mask = inside & valid[None, :], inside & valid_inner[None, :]
        grad_logit = tl.load(grad_logit_ptr + wide_offset, mask=wide_mask, other=0.0)
        mean = tl.load(mean_ptr + wide_offset, mask=wide_mask, other=0.0)
        grad_reduced = tl.load(grad_reduced_ptr + small_offset, mask=small_mask, other=0.0)
        reduced = tl.load(reduced_ptr + small_offset, mask=small_mask, other=0.0)
        activated = tl.where(small_mask, activate(reduced, ACTIVATION), 0.0)
        expand_weight = tl.dot(
            tl.trans(grad_logit), activated, expand_weight, input_precision="ieee"
        )
        reduce_weight = tl.dot(tl.trans(mean), grad_reduced, reduce_weight, input_precision="ieee")
        expand_bias += tl.sum(grad_logit, 0)
        reduce_bias += tl.sum(grad_reduced, 0)
    mask = valid[:, None] & valid_inner[None, :]
    tl.store(
        grad_expand_weight_ptr + column[:, None] * small + inner[None, :],
        expand_weight.to(grad_expand_weight_ptr.dtype.element_ty),
        mask=mask,
    )
    tl.store(
        grad_reduce_weight_ptr + inner[None, :] * wide + column[:, None],
        reduce_weight.to(grad_reduce_weight_ptr.dtype.element_ty),
        mask=mask,
    )
    if grad_expand_bias_ptr is not None:
        wide_target = grad_expand_bias_ptr + column
        tl.store(wide_target, expand_bias.to(grad_expand_bias_ptr.dtype.element_ty), mask=valid)
    if grad_reduce_bias_ptr is not None:  # noqa: SIM102  decided at compile time
        if tl.program_id(0) == 0:
            small_target = grad_reduce_bias_ptr + inner
            low = reduce_bias.to(grad_reduce_bias_ptr.dtype.element_ty)
            tl.store(small_target, low, mask=valid_inner)


def excite_backward(
    grad_gate: Sums,
    excitation: Excitation,
    pixels: int,
    parameters: MBConvParameters,
    activation: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(gradient of every pixel through the mean of `pixels` [B, E], those of parameters by name).

    grad_gate: float32 [B, parts, E].
    """
    batch, parts, wide = grad_gate.values.shape
    reduce_weight, expand_weight = _weights(parameters)
    small = reduce_weight.shape[0]
    mean, reduced, gate = excitation
    grad_logit, grad_mean = torch.empty_like(gate), torch.empty_like(gate)
    grad_reduced = torch.empty_like(reduced)
    reads = (grad_gate.values, gate, reduced, reduce_weight, expand_weight)
    writes = (grad_logit, grad_reduced, grad_mean)
    blocks = _blocks(wide, small, _BACKWARD_TILE)
    launch(
        excite_backward_kernel,
        (batch,),
        *(*reads, *writes, parts, pixels, wide, small),
        ACTIVATION=activation,
        **blocks,
        num_warps=8,
        num_stages=1,
        reads=reads,
        writes=writes,
    )
    names = ("se_reduce_weight", "se_reduce_bias", "se_expand_weight", "se_expand_bias")
    owners = (reduce_weight, parameters.se_reduce_bias, expand_weight, parameters.se_expand_bias)
    gradients = [None if owner is None else torch.empty_like(owner) for owner in owners]
    blocks["BLOCK_WIDE"] = _SMALLEST
    launch(
        excite_weight_kernel,
        (-(-wide // blocks["BLOCK_WIDE"]),),
        *(grad_logit, grad_reduced, mean, reduced, *gradients, batch, wide, small),
        ACTIVATION=activation,
        BLOCK_BATCH=_BLOCK_BATCH,
        **blocks,
        num_warps=4,
        num_stages=1,
        reads=(grad_logit, grad_reduced, mean, reduced),
        writes=gradients,
        flops=4 * batch * wide * small,
    )
    named = zip(names, gradients, strict=True)
    return grad_mean, {name: gradient for name, gradient in named if gradient is not None}
