"""What an inverted bottleneck computes, as one validated description, and its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moat_kernels.ops.common.batch_norm import Norm as Norm
from moat_kernels.ops.common.batch_norm import NormParameters as NormParameters
from moat_kernels.ops.common.checks import check_choice, check_positive_integer
from moat_kernels.ops.common.encoding import decode_fields, encode
from moat_kernels.ops.common.spatial import Padding

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "identity")
NORMS = ("pre_norm", "expand_norm", "depthwise_norm", "project_norm")


def _check_padding(argument: str, padding: object) -> None:
    if padding == "tf_same":
        return
    if (
        not isinstance(padding, tuple)
        or len(padding) != 4
        or not all(isinstance(side, int) and side >= 0 for side in padding)
    ):
        raise ValueError(
            f"{argument} must be 'tf_same' or four integers >= 0 (top, bottom, left, right), "
            f"got {padding!r}"
        )


@dataclass(frozen=True)
class SqueezeExcite:
    """Channel gate: mean over the map, 1x1, `activation`, 1x1, sigmoid, multiply.

    position: on the output of the block's second convolution, "before_norm" or
        "after_activation" (official).
    """

    position: Literal["before_norm", "after_activation"] = "after_activation"
    activation: str = "silu"

    def __post_init__(self) -> None:
        check_choice("position", self.position, ("before_norm", "after_activation"))
        check_choice("activation", self.activation, ACTIVATIONS)


@dataclass(frozen=True)
class Pool:
    """Pool of the shortcut. count_include_pad: whether the mean counts padding as zeros."""

    kind: Literal["average", "max"] = "average"
    kernel_size: int = 2
    stride: int = 2
    padding: Padding = "tf_same"
    count_include_pad: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("average", "max"))
        check_positive_integer("kernel_size", self.kernel_size)
        check_positive_integer("stride", self.stride)
        _check_padding("padding", self.padding)
        if self.padding != "tf_same" and max(self.padding) >= self.kernel_size:
            raise ValueError(
                f"padding of a pool must be smaller than its kernel_size {self.kernel_size}, "
                f"got {self.padding!r}: a window would hold no pixel"
            )


@dataclass(frozen=True)
class MBConvDescription:
    """The inverted bottleneck of MBConv and MOAT blocks (MOAT paper, section 3).

    order "expand_first":
        pre_norm, pre_activation, 1x1 expand, expand_norm, expand_activation,
        depthwise (stride, padding), depthwise_norm, depthwise_activation, 1x1 project, project_norm
    order "depthwise_first": the depthwise and the expand stage change places.

    Any norm may be None. `squeeze_excite` sits at the second of the two stages. Which convolutions
    have biases, and whether the shortcut has a 1x1 convolution, is told by the tensors given.
    With `residual` the result is shortcut + drop_path(bottleneck); the shortcut is the raw input,
    pooled by `pool` if there is one, then through its 1x1 convolution if there is one.
    """

    # Factories, because torch.compile of PyTorch 2.11 cannot take a Norm as a default value.
    stride: int = 1
    padding: Padding = "tf_same"
    pre_norm: Norm | None = field(default_factory=Norm)
    pre_activation: str = "identity"
    expand_norm: Norm | None = field(default_factory=Norm)
    expand_activation: str = "gelu"
    depthwise_norm: Norm | None = field(default_factory=Norm)
    depthwise_activation: str = "gelu"
    project_norm: Norm | None = None
    squeeze_excite: SqueezeExcite | None = None
    residual: bool = True
    pool: Pool | None = None
    order: Literal["expand_first", "depthwise_first"] = "expand_first"

    def __post_init__(self) -> None:
        check_positive_integer("stride", self.stride)
        _check_padding("padding", self.padding)
        for name in ("pre_activation", "expand_activation", "depthwise_activation"):
            check_choice(name, getattr(self, name), ACTIVATIONS)
        check_choice("order", self.order, ("expand_first", "depthwise_first"))
        if self.pool is not None and not self.residual:
            raise ValueError("pool is set but residual is False: there is no shortcut to pool")

    @property
    def synchronized(self) -> bool:
        """Whether any norm measures its batch together with other ranks."""
        norms = (self.pre_norm, self.expand_norm, self.depthwise_norm, self.project_norm)
        return any(norm is not None and norm.process_group is not None for norm in norms)

    def encode(self) -> str:
        """The description as text, for operator schemas; `decode` is its inverse."""
        return encode(self)

    @staticmethod
    def decode(text: str) -> MBConvDescription:
        return _decode(text)


@cache
def _decode(text: str) -> MBConvDescription:
    fields = decode_fields(text)
    for name in NORMS:
        fields[name] = fields[name] and Norm(**fields[name])
    if fields["squeeze_excite"]:
        fields["squeeze_excite"] = SqueezeExcite(**fields["squeeze_excite"])
    if fields["pool"]:
        fields["pool"] = Pool(**fields["pool"])
    return MBConvDescription(**fields)


class MBConvParameters(NamedTuple):
    """Tensors of an inverted bottleneck: C_in -> E -> C_out channels, kernel K.

    The 1x1 convolutions take [out, in] or [out, in, 1, 1]. With order "depthwise_first" the
    depthwise convolution works on C_in channels, otherwise on E.
    """

    expand_weight: Tensor  # [E, C_in]
    depthwise_weight: Tensor  # [E or C_in, 1, K, K]
    project_weight: Tensor  # [C_out, E]
    expand_bias: Tensor | None = None  # [E]
    depthwise_bias: Tensor | None = None  # [E or C_in]
    project_bias: Tensor | None = None  # [C_out]
    pre_norm: NormParameters = NormParameters()
    expand_norm: NormParameters = NormParameters()
    depthwise_norm: NormParameters = NormParameters()
    project_norm: NormParameters = NormParameters()
    se_reduce_weight: Tensor | None = None  # [R, E]
    se_reduce_bias: Tensor | None = None  # [R]
    se_expand_weight: Tensor | None = None  # [E, R]
    se_expand_bias: Tensor | None = None  # [E]
    shortcut_weight: Tensor | None = None  # [C_out, C_in]
    shortcut_bias: Tensor | None = None  # [C_out]


# The tensors of MBConvParameters that are not a norm's, in their order.
WEIGHTS = tuple(name for name in MBConvParameters._fields if name not in NORMS)

# The differentiable tensors in the order of `flatten`.
PARAMETER_NAMES = WEIGHTS + tuple(f"{norm}_{part}" for norm in NORMS for part in ("weight", "bias"))


def flatten(parameters: MBConvParameters) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """(differentiable tensors in the order of PARAMETER_NAMES, running mean and var per norm)."""
    tensors = [getattr(parameters, name) for name in WEIGHTS]
    running = []
    for name in NORMS:
        norm = getattr(parameters, name)
        tensors += [norm.weight, norm.bias]
        running += [norm.running_mean, norm.running_var]
    return tensors, running


def unflatten(
    tensors: Sequence[Tensor | None], running: Sequence[Tensor | None]
) -> MBConvParameters:
    """The inverse of `flatten`."""
    fields: dict[str, Any] = dict(zip(WEIGHTS, tensors, strict=False))
    for index, name in enumerate(NORMS):
        affine = tensors[len(WEIGHTS) + 2 * index : len(WEIGHTS) + 2 * index + 2]
        fields[name] = NormParameters(*affine, *running[2 * index : 2 * index + 2])
    return MBConvParameters(**fields)


def cast_weights(
    parameters: MBConvParameters, dtype: torch.dtype | None, names: Sequence[str] = WEIGHTS
) -> MBConvParameters:
    """The same with these, or all but the norms' tensors, in `dtype`; as they are if it is None."""
    if dtype is None:
        return parameters
    weights: dict[str, Any] = {
        name: tensor.to(dtype)
        for name in names
        if (tensor := getattr(parameters, name)) is not None
    }
    return parameters._replace(**weights)


def needs_gradient(x: Tensor, parameters: MBConvParameters) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *flatten(parameters)[0])
    )
