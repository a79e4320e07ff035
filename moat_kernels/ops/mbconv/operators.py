"""The operators of `mbconv`: what compilers, exporters and dispatch modes see of a call.

Schemas carry tensors, numbers and text: the description is encoded, the parameters are two lists.
Eager calls go to the backends without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import without_autocast
from moat_kernels.ops.common.registration import define_op
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.mbconv.contract import Moments
from moat_kernels.ops.mbconv.description import NORMS, PARAMETER_NAMES, MBConvDescription, unflatten
from moat_kernels.ops.mbconv.dispatch import BACKENDS
from moat_kernels.ops.mbconv.flops import described_backward, described_forward


def list_moments(moments: Moments) -> list[Tensor]:
    """The moments of all norms in the order of NORMS."""
    return [tensor for name in NORMS for tensor in moments.get(name, ())]


def name_moments(counts: Mapping[str, int], listed: Iterable[Tensor]) -> Moments:
    """The inverse of `list_moments`, given how many moments each norm measures."""
    remaining = iter(listed)
    return {
        name: tuple(next(remaining) for _ in range(counts[name]))
        for name in NORMS
        if name in counts
    }


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
    drop_path_scale: Tensor | None,
    description: str,
    dtype: torch.dtype | None,
    recompute: str,
    backend: str,
) -> list[Tensor]:
    result = BACKENDS[backend].forward(
        x,
        unflatten(parameters, running),
        MBConvDescription.decode(description),
        recompute,
        drop_path_scale,
        dtype,
        {},
    )
    # An operator's results must not share memory.
    moments = [tensor.clone() for tensor in list_moments(result.moments)]
    return [in_format_of(result.output, x), *moments, *result.saved]


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
# -> [output, the moments of each norm that measures, what backward needs ...]
define_op(
    f"mbconv_forward({_TENSORS}, str description, ScalarType? dtype, str recompute, str backend) "
    "-> Tensor[]",
    forward,
    forward,
    described_forward,
)
# -> the gradients that `needs` asks for
define_op(
    f"mbconv_backward(Tensor grad, {_TENSORS}, Tensor[] saved, str description, "
    "ScalarType? dtype, str recompute, str backend, bool[] needs) -> Tensor[]",
    _backward_operator,
    _fake_backward,
    described_backward,
)
