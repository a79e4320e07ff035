"""Inverted bottlenecks of every kind that the description allows, with random tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moat_kernels.functional import (
    MBConvDescription,
    MBConvParameters,
    Norm,
    NormParameters,
    Pool,
    SqueezeExcite,
    mbconv,
)
from moat_kernels.ops.mbconv.description import (
    PARAMETER_NAMES,
    flatten,
)


@dataclass(frozen=True)
class Case:
    """A description and the tensors' geometry: C_in -> E -> C_out, kernel K, squeezed to R."""

    description: MBConvDescription = field(default_factory=MBConvDescription)
    in_channels: int = 6
    wide_channels: int = 12
    out_channels: int = 6
    kernel_size: int = 3
    biases: bool = True
    shortcut_conv: bool = False
    squeezed_channels: int = 3


_TO_8 = {"out_channels": 8, "shortcut_conv": True}

# One entry for every choice that users' code makes (MOAT, CoAtNet and MaxViT implementations).
CASES: dict[str, Case] = {
    "stride 1": Case(),
    "no biases": Case(biases=False),
    "stride 2, pool 2, projected": Case(MBConvDescription(stride=2, pool=Pool()), **_TO_8),
    "stride 2, pool 3": Case(MBConvDescription(stride=2, pool=Pool(kernel_size=3))),
    "projected shortcut": Case(**_TO_8),
    "squeeze-excite": Case(MBConvDescription(squeeze_excite=SqueezeExcite())),
    "as Keras has it": Case(
        MBConvDescription(
            stride=2, pool=Pool(kernel_size=3), squeeze_excite=SqueezeExcite(activation="gelu")
        ),
        **_TO_8,
    ),
    "squeeze-excite before norm": Case(
        MBConvDescription(squeeze_excite=SqueezeExcite("before_norm", "relu"))
    ),
    "no pre_norm": Case(MBConvDescription(pre_norm=None)),
    "no expand_norm": Case(MBConvDescription(expand_norm=None)),
    "no depthwise_norm": Case(MBConvDescription(depthwise_norm=None)),
    "no norms": Case(MBConvDescription(pre_norm=None, expand_norm=None, depthwise_norm=None)),
    "project_norm": Case(MBConvDescription(project_norm=Norm(eps=1e-5, momentum=0.1))),
    "eps and momentum per norm": Case(
        MBConvDescription(
            pre_norm=Norm(1e-5, 0.1, True),
            expand_norm=Norm(1e-2, None),
            depthwise_norm=Norm(1e-4, 0.5),
        )
    ),
    "pre_activation": Case(MBConvDescription(pre_activation="silu")),
    "activations": Case(
        MBConvDescription(expand_activation="gelu_tanh", depthwise_activation="relu")
    ),
    "frozen pre_norm": Case(MBConvDescription(pre_norm=Norm(frozen=True))),
    "frozen expand_norm": Case(MBConvDescription(expand_norm=Norm(frozen=True))),
    "frozen depthwise_norm": Case(MBConvDescription(depthwise_norm=Norm(frozen=True))),
    "frozen norms": Case(
        MBConvDescription(
            pre_norm=Norm(frozen=True),
            expand_norm=Norm(frozen=True),
            depthwise_norm=Norm(frozen=True),
        )
    ),
    "frozen pre_norm, no expand_norm": Case(
        MBConvDescription(pre_norm=Norm(frozen=True), expand_norm=None)
    ),
    "depthwise first": Case(
        MBConvDescription(order="depthwise_first", expand_activation="identity")
    ),
    "depthwise first, max pool": Case(
        MBConvDescription(
            order="depthwise_first",
            stride=2,
            pool=Pool("max"),
            squeeze_excite=SqueezeExcite("before_norm"),
        ),
        **_TO_8,
    ),
    "depthwise first, gated": Case(
        MBConvDescription(
            order="depthwise_first", pre_norm=None, squeeze_excite=SqueezeExcite(activation="gelu")
        )
    ),
    "four-sided padding, no residual": Case(
        MBConvDescription(stride=2, padding=(1, 0, 2, 1), residual=False)
    ),
    "symmetric padding, pool counts padding": Case(
        MBConvDescription(
            stride=2,
            padding=(1, 1, 1, 1),
            pool=Pool(kernel_size=3, padding=(1, 1, 1, 1), count_include_pad=True),
        )
    ),
    "padded max pool": Case(
        MBConvDescription(
            stride=2, padding=(1, 1, 1, 1), pool=Pool("max", kernel_size=3, padding=(1, 1, 1, 1))
        )
    ),
    "kernel 5": Case(kernel_size=5),
    "kernel 7, stride 2": Case(MBConvDescription(stride=2, pool=Pool()), kernel_size=7),
}


def make_norm(channels: int, dtype: torch.dtype) -> NormParameters:
    """A norm's tensors, away from the trivial ones."""
    return NormParameters(
        weight=1 + 0.3 * torch.randn(channels, dtype=dtype),
        bias=torch.randn(channels, dtype=dtype),
        running_mean=torch.randn(channels, dtype=dtype),
        running_var=0.5 + torch.rand(channels, dtype=dtype),
        num_batches_tracked=torch.tensor(3),
    )


def make_parameters(case: Case, dtype: torch.dtype = torch.float64) -> MBConvParameters:
    """Random tensors for `case`; convolution weights scaled by their fan-in."""
    description, wide = case.description, case.wide_channels
    expand_first = description.order == "expand_first"
    middle = wide if expand_first else case.in_channels

    def weight(*shape: int) -> Tensor:
        fan_in = torch.Size(shape[1:]).numel()
        return torch.randn(*shape, dtype=dtype) / fan_in**0.5

    def bias(channels: int) -> Tensor | None:
        return torch.randn(channels, dtype=dtype) if case.biases else None

    def norm(name: str, channels: int) -> NormParameters:
        absent = getattr(description, name) is None
        return NormParameters() if absent else make_norm(channels, dtype)

    gated, projected = description.squeeze_excite is not None, case.shortcut_conv
    squeezed = case.squeezed_channels
    return MBConvParameters(
        expand_weight=weight(wide, case.in_channels, 1, 1),
        depthwise_weight=weight(middle, 1, case.kernel_size, case.kernel_size),
        project_weight=weight(case.out_channels, wide, 1, 1),
        expand_bias=bias(wide),
        depthwise_bias=bias(middle),
        project_bias=bias(case.out_channels),
        pre_norm=norm("pre_norm", case.in_channels),
        expand_norm=norm("expand_norm", wide),
        depthwise_norm=norm("depthwise_norm", middle),
        project_norm=norm("project_norm", case.out_channels),
        se_reduce_weight=weight(squeezed, wide) if gated else None,
        se_reduce_bias=bias(squeezed) if gated else None,
        se_expand_weight=weight(wide, squeezed) if gated else None,
        se_expand_bias=bias(wide) if gated else None,
        shortcut_weight=weight(case.out_channels, case.in_channels, 1, 1) if projected else None,
        shortcut_bias=bias(case.out_channels) if projected else None,
    )


def map_tensors(parameters: MBConvParameters, function) -> MBConvParameters:
    """`function` applied to each tensor, norms included."""
    fields = {}
    for name, value in parameters._asdict().items():
        if isinstance(value, NormParameters):
            fields[name] = NormParameters(
                *(tensor if tensor is None else function(tensor) for tensor in value)
            )
        else:
            fields[name] = value if value is None else function(value)
    return MBConvParameters(**fields)


def copy_parameters(
    parameters: MBConvParameters, dtype: torch.dtype | None = None
) -> MBConvParameters:
    """Independent leaves in `dtype` that require grad (running statistics do not)."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype if tensor.is_floating_point() else None, copy=True)

    copied = map_tensors(parameters, copy)
    for tensor in flatten(copied)[0]:
        if tensor is not None:
            tensor.requires_grad_()
    return copied


def run(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    dtype: torch.dtype | None = None,
    cotangent: Tensor | None = None,
    **options,
) -> dict[str, Tensor]:
    """Output, gradients of x and parameters, and running statistics of one training step.

    The arguments are copied, in `dtype`. The cotangent is a fixed random tensor unless given.
    """
    parameters = copy_parameters(parameters, dtype)
    x = x.detach().to(dtype, copy=True).requires_grad_()
    output = mbconv(x, parameters, description, **options)
    if cotangent is None:
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(cotangent.to(output))
    results = {"output": output.detach(), "x": x.grad}
    tensors, running = flatten(parameters)
    for name, tensor in zip(PARAMETER_NAMES, tensors, strict=True):
        if tensor is not None:
            results[name] = tensor.grad
    for index, tensor in enumerate(running):
        if tensor is not None:
            results[f"running {index}"] = tensor
    return results
