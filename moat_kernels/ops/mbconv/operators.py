"""The operators of `mbconv`: what compilers, exporters and dispatch modes see of a call.

Schemas carry tensors, numbers and text: the description is encoded, the parameters are two lists.
Eager calls go to the backends without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import without_autocast
from moat_kernels.ops.common.registration import define_op
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.mbconv.description import PARAMETER_NAMES, MBConvDescription, unflatten
from moat_kernels.ops.mbconv.dispatch import BACKENDS
from moat_kernels.ops.mbconv.flops import described_backward, described_forward, trained_forward
from moat_kernels.ops.mbconv.running_statistics import (
    count_values,
    finish_updates,
    plan_updates,
    with_updated,
)

# How many tensors `mbconv_forward` returns for backward, empty ones of this shape behind those that
# there are: an operator that changes tensors cannot return a list. All norms synchronised make 15.
_MOST_SAVED, _MISSING = 16, (0, 0)


@without_autocast
def evaluate(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    running: Sequence[Tensor | None],
    drop_path_scale: Tensor | None,
    description: str,
    dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    output = BACKENDS[backend].evaluate(
        x,
        unflatten(parameters, running),
        MBConvDescription.decode(description),
        drop_path_scale,
        dtype,
    )
    return in_format_of(output, x)


@without_autocast
def forward(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    running: Sequence[Tensor | None],
    updated: Sequence[Tensor],
    drop_path_scale: Tensor | None,
    description: str,
    places: Sequence[int],
    dtype: torch.dtype | None,
    recompute: str,
    backend: str,
) -> tuple[Tensor, ...]:
    decoded = MBConvDescription.decode(description)
    named = with_updated(unflatten(parameters, running), updated, places)
    updates = plan_updates(count_values(x, named, decoded), named, decoded)
    output, moments, saved = BACKENDS[backend].forward(
        x, named, decoded, recompute, drop_path_scale, dtype, updates
    )
    finish_updates(named, decoded, updates, moments)
    return in_format_of(output, x), *_fill(saved, x)


def _fake_forward(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    running: Sequence[Tensor | None],
    updated: Sequence[Tensor],
    drop_path_scale: Tensor | None,
    description: str,
    places: Sequence[int],
    *choices: Any,
) -> tuple[Tensor, ...]:
    """The same without the updates, which are no results."""
    return forward(x, parameters, running, (), drop_path_scale, description, (), *choices)


def _fill(saved: list[Tensor], x: Tensor) -> list[Tensor]:
    return saved + [x.new_empty(_MISSING) for _ in range(_MOST_SAVED - len(saved))]


def call_forward(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    running: Sequence[Tensor | None],
    updated: Sequence[Tensor | None],
    drop_path_scale: Tensor | None,
    *choices: Any,
) -> tuple[Tensor, list[Tensor]]:
    """`mbconv_forward`: (the output, what backward needs)."""
    output, *saved = torch.ops.moat_kernels.mbconv_forward(
        x, parameters, running, updated, drop_path_scale, *choices
    )
    return output, [tensor for tensor in saved if tensor.shape != _MISSING]


@without_autocast
def backward(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    running: Sequence[Tensor | None],
    drop_path_scale: Tensor | None,
    saved: list[Tensor],
    description: MBConvDescription,
    dtype: torch.dtype | None,
    recompute: str,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that `needs` (x, then the parameters) asks for, like the tensors themselves."""
    names = ("x", *PARAMETER_NAMES)
    needed = frozenset(name for name, wanted in zip(names, needs, strict=True) if wanted)
    gradients = BACKENDS[backend].backward(
        grad,
        x,
        unflatten(parameters, running),
        description,
        recompute,
        drop_path_scale,
        dtype,
        saved,
        needed,
    )
    results = []
    for name, source in zip(names, (x, *parameters), strict=True):
        if name in needed and source is not None:
            gradient = gradients[name]
            # Asking takes a tenth of what an operator does that has nothing to do.
            if gradient.shape != source.shape or gradient.stride() != source.stride():
                gradient = gradient.reshape(source.shape)
            if gradient.dtype != source.dtype:
                gradient = gradient.to(source.dtype)
            if name == "x":
                gradient = in_format_of(gradient, x)
            elif not gradient.is_contiguous():
                gradient = gradient.contiguous()
            results.append(gradient)
    return results


def _backward_operator(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    running: Sequence[Tensor | None],
    drop_path_scale: Tensor | None,
    saved: list[Tensor],
    description: str,
    dtype: torch.dtype | None,
    recompute: str,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    tensors = (grad, x, parameters, running, drop_path_scale, saved)
    decoded = MBConvDescription.decode(description)
    return backward(*tensors, decoded, dtype, recompute, backend, needs)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    *arguments: Any,
) -> list[Tensor]:
    """What `backward` returns is known without a look at how: a look would ask sizes questions.

    Their answers hold for some sizes alone, and a compiled step for these.
    """
    *_, needs = arguments
    sources = [
        source
        for source, needed in zip((x, *parameters), needs, strict=True)
        if needed and source is not None
    ]
    return [in_format_of(source.new_empty(source.shape), source) for source in sources]


_TENSORS = "Tensor x, Tensor?[] parameters, Tensor?[] running, Tensor? drop_path_scale"

define_op(
    f"mbconv_evaluate({_TENSORS}, str description, ScalarType? dtype, str backend) -> Tensor",
    evaluate,
    evaluate,
    described_forward,
)
# -> (output, what backward needs, and empty tensors behind it); updated: what `with_updated` takes
define_op(
    "mbconv_forward(Tensor x, Tensor?[] parameters, Tensor?[] running, Tensor(a!)[] updated, "
    "Tensor? drop_path_scale, str description, int[] places, ScalarType? dtype, str recompute, "
    f"str backend) -> ({', '.join(['Tensor'] * (1 + _MOST_SAVED))})",
    forward,
    _fake_forward,
    trained_forward,
)
# -> the gradients that `needs` asks for
define_op(
    f"mbconv_backward(Tensor grad, {_TENSORS}, Tensor[] saved, str description, "
    "ScalarType? dtype, str recompute, str backend, bool[] needs) -> Tensor[]",
    _backward_operator,
    _fake_backward,
    described_backward,
)
