"""What PyTorch's own operators move through DRAM and multiply, when each runs by itself.

An operator is a kernel that reads its inputs once and writes its results once, except for those
below that take several passes: PyTorch's and cuDNN's kernels for CUDA devices in eager mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_iter

from moat_kernels.ops.triton_support.launching import multiplies_as_tf32
from moat_kernels.ops.triton_support.traffic import Pass, crossing_of

_ALLOCATES = frozenset(
    {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
)
# In place, without a look at what was there.
_OVERWRITES = frozenset({"copy_", "fill_", "zero_", "uniform_", "normal_"})
# Matrix products: which arguments are multiplied.
_FACTORS = {"mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}


@dataclass(frozen=True)
class OperatorPass(Pass):
    """One launch of a kernel that is not this package's: PyTorch's, cuDNN's, cuBLAS'."""


def operator_passes(
    operator: OpOverload, arguments: Sequence[Any], keywords: dict[str, Any], result: Any
) -> list[Pass]:
    """The kernels of one call; none for views and bare allocations."""
    name = operator._opname
    outputs = list(_tensors(result))
    if name in SEVERAL_PASSES:
        return list(SEVERAL_PASSES[name](arguments, result))
    inputs = list(_tensors((arguments, keywords)))
    owned = {tensor.untyped_storage()._cdata for tensor in inputs}
    writes = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in owned]
    writes += _changed(operator, arguments)
    if not writes or name in _ALLOCATES:
        return []
    if name in _OVERWRITES:
        inputs = [tensor for tensor in inputs if tensor is not arguments[0]]
    if name in _FACTORS:
        left, right = (arguments[index] for index in _FACTORS[name])
        flops = 2 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1)
        return [_pass(name, inputs, writes, flops, _arithmetic(left.dtype, multiplies_as_tf32()))]
    return [_pass(name, inputs, writes)]


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _changed(operator: OpOverload, arguments: Sequence[Any]) -> list[Tensor]:
    """The arguments that the operator changes in place."""
    declared = zip(operator._schema.arguments, arguments, strict=False)
    return [
        tensor
        for declaration, argument in declared
        if declaration.alias_info is not None and declaration.alias_info.is_write
        for tensor in _tensors(argument)
    ]


def _pass(
    name: str,
    reads: Iterable[Tensor | None],
    writes: Iterable[Tensor | None],
    flops: int = 0,
    arithmetic: str = "float32",
) -> Pass:
    """A kernel; None stands for what is not there."""
    crossings = (
        tuple(crossing_of(tensor) for tensor in side if tensor is not None)
        for side in (reads, writes)
    )
    read, written = crossings
    return OperatorPass(name, read, written, flops, arithmetic)


def _arithmetic(dtype: torch.dtype, tf32: bool) -> str:
    return "tf32" if dtype == torch.float32 and tf32 else str(dtype).removeprefix("torch.")


def _convolution(arguments: Sequence[Any], result: Tensor) -> Iterator[Pass]:
    x, weight, bias = arguments[:3]
    yield _pass(_kind(x, weight), (x, weight, bias), (result,), *_products(x, weight, result))


def _convolution_backward(
    arguments: Sequence[Any], result: Sequence[Tensor | None]
) -> Iterator[Pass]:
    """One kernel for each gradient, and each reads the output's gradient."""
    grad, x, weight = arguments[:3]
    kind, products = _kind(x, weight), _products(x, weight, grad)
    grad_x, grad_weight, grad_bias = result
    if grad_x is not None:
        yield _pass(f"{kind}, gradient of the input", (grad, weight), (grad_x,), *products)
    if grad_weight is not None:
        yield _pass(f"{kind}, gradient of the weight", (grad, x), (grad_weight,), *products)
    if grad_bias is not None:
        yield _pass("convolution, gradient of the bias", (grad,), (grad_bias,))


def _kind(x: Tensor, weight: Tensor) -> str:
    size = "x".join(str(length) for length in weight.shape[2:])
    return f"{'depthwise ' if _is_depthwise(x, weight) else ''}convolution {size}"


def _is_depthwise(x: Tensor, weight: Tensor) -> bool:
    return weight.shape[1] == 1 and x.shape[1] > 1


def _products(x: Tensor, weight: Tensor, output: Tensor) -> tuple[int, str]:
    """(FLOPs, arithmetic) of a convolution and of each of its gradients."""
    flops = 2 * output.numel() * weight[0].numel()
    if _is_depthwise(x, weight):
        return flops, "float32"
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return flops, _arithmetic(x.dtype, tf32)


def _batch_norm(arguments: Sequence[Any], result: Sequence[Tensor]) -> Iterator[Pass]:
    """Statistics first, in training; then the norm."""
    x, weight, bias, running_mean, running_variance, training = arguments[:6]
    y, mean, scale = result
    if training:
        yield _pass("batch norm, statistics", (x,), (mean, scale))
        running_mean, running_variance = mean, scale
    yield _pass("batch norm", (x, weight, bias, running_mean, running_variance), (y,))


def _batch_norm_backward(
    arguments: Sequence[Any], result: Sequence[Tensor | None]
) -> Iterator[Pass]:
    grad, x, weight = arguments[:3]
    grad_x, grad_weight, grad_bias = result
    yield _pass("batch norm, sums of the gradient", (grad, x), (grad_weight, grad_bias))
    yield _pass("batch norm, gradient", (grad, x, weight), (grad_x,))


def _layer_norm_backward(
    arguments: Sequence[Any], result: Sequence[Tensor | None]
) -> Iterator[Pass]:
    grad, x, _, mean, scale, weight = arguments[:6]
    grad_x, grad_weight, grad_bias = result
    yield _pass("layer norm, gradient", (grad, x, mean, scale, weight), (grad_x,))
    yield _pass(
        "layer norm, sums of the gradient", (grad, x, mean, scale), (grad_weight, grad_bias)
    )


SEVERAL_PASSES: dict[str, Callable[[Sequence[Any], Any], Iterator[Pass]]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "native_layer_norm_backward": _layer_norm_backward,
}
