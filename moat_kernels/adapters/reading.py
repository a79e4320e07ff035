"""Reading other people's modules: what they hold as an op needs it, or the reason why not.

Nothing is assumed: a class, a setting or a child that is not known here ends in `NotCovered`. What
follows from classes and settings is kept by these alone (outline.py, block_reading.py), so that it
cannot be stale; tensors are read at every call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from moat_kernels.drop_path import DropPath
from moat_kernels.inspection import are_plain_tensors, interception, is_plain_tensor
from moat_kernels.normalization import (
    BatchNorm2d,
    SyncBatchNorm,
    describe_norm,
    has_activation,
    is_frozen_norm,
    norm_tensors,
)
from moat_kernels.ops.common.batch_norm import Norm
from moat_kernels.ops.common.spatial import Padding
from moat_kernels.ops.mbconv.description import (
    MBConvDescription,
    MBConvParameters,
    Pool,
    SqueezeExcite,
)
from moat_kernels.reference import SameConv2d
from moat_kernels.tensor_access import is_parametrized, plain_class, tensor_of

ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "Swish": "silu",
    "ReLU": "relu",
    "Identity": "identity",
}
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNorm2d, SyncBatchNorm)


class NotCovered(Exception):
    """A module that an adapter recognises computes what no fused op does; the text says what."""


class NotCoveredInTraining(NotCovered):
    """The same, but only while the module is in training mode."""


def class_name(module: nn.Module) -> str:
    """Name of `plain_class`."""
    return plain_class(module).__name__


def child_names(module: nn.Module) -> set[str]:
    """Names of the children that are there."""
    return {name for name, child in module._modules.items() if child is not None}


def tensor_names(module: nn.Module) -> set[str]:
    """Names of the module's own parameters and buffers."""
    own = {**module._parameters, **module._buffers}
    return {name for name, tensor in own.items() if tensor is not None}


def refuse_hooks(modules: Iterable[nn.Module]) -> None:
    """Raise NotCovered if one of the modules, which are not called when fused, must be called."""
    for module in modules:
        if reason := interception(module, f"an inner {class_name(module)}"):
            raise NotCovered(reason)


def refuse_dropout(dropout: nn.Module, what: str) -> None:
    """Raise NotCoveredInTraining if `dropout` drops anything in training."""
    if class_name(dropout) == "Identity":
        return
    if class_name(dropout) != "Dropout" or not isinstance(dropout, nn.Dropout):
        raise NotCovered(f"{class_name(dropout)} in place of the dropout of {what}")
    if dropout.p > 0 and dropout.training:
        raise NotCoveredInTraining(f"dropout of {what}, p={dropout.p:g}")


def read_activation(module: nn.Module) -> str:
    """The name that a description has for an activation module."""
    name = class_name(module)
    if name == "GELU" and getattr(module, "approximate", "none") == "tanh":
        name = "GELUTanh"
    if name not in ACTIVATIONS:
        raise NotCovered(f"activation {name}")
    return ACTIVATIONS[name]


class NormReading(NamedTuple):
    """A batch norm, and the activation that its module applies after it."""

    norm: Norm | None
    activation: str


def is_norm(module: nn.Module) -> bool:
    """Whether `read_norm` knows the class of a module."""
    known = plain_class(module) in (*_NORMS, nn.Identity)
    return known or has_activation(module) or is_frozen_norm(module)


def read_norm(module: nn.Module | None) -> NormReading:
    """A batch norm of maps: torch.nn's, ours, timm's with an activation, or one that is frozen.

    It may be synchronised. None and nn.Identity are no norm.
    """
    if module is None or plain_class(module) is nn.Identity:
        return NormReading(None, "identity")
    if not is_norm(module):
        raise NotCovered(f"{class_name(module)} in place of a batch norm")
    activation = "identity"
    if has_activation(module):
        if class_name(module.drop) != "Identity":  # type: ignore[arg-type]
            raise NotCovered(f"{class_name(module.drop)} inside a norm")  # type: ignore[arg-type]
        activation = read_activation(module.act)  # type: ignore[arg-type]
    try:
        return NormReading(describe_norm(module), activation)
    except ValueError as error:
        raise NotCovered(f"a batch norm: {error}") from error


def _pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def _check_convolution(conv: nn.Module) -> nn.Conv2d:
    known = plain_class(conv) is SameConv2d or class_name(conv) in ("Conv2d", "Conv2dSame")
    if not isinstance(conv, nn.Conv2d) or not known:
        raise NotCovered(f"{class_name(conv)} in place of a convolution")
    if conv.dilation != (1, 1):
        raise NotCovered(f"dilation {conv.dilation}")
    if conv.padding_mode != "zeros":
        raise NotCovered(f"padding_mode {conv.padding_mode!r}")
    if not is_parametrized(conv) and tuple(conv.weight.shape[2:]) != tuple(conv.kernel_size):
        raise NotCovered(f"a weight {tuple(conv.weight.shape)} for a kernel of {conv.kernel_size}")
    return conv


class ConvolutionReading(NamedTuple):
    """The settings of a square convolution of all channels."""

    kernel_size: int
    stride: int
    padding: Padding


def read_convolution(conv: nn.Module) -> ConvolutionReading:
    """A convolution without groups; of the classes that `read_depthwise` knows."""
    conv = _check_convolution(conv)
    if conv.groups != 1:
        raise NotCovered(f"a convolution of {conv.groups} groups")
    if conv.kernel_size[0] != conv.kernel_size[1] or conv.stride[0] != conv.stride[1]:
        raise NotCovered(f"a convolution of {conv.kernel_size}, stride {conv.stride}")
    return ConvolutionReading(conv.kernel_size[0], conv.stride[0], _padding(conv))


def check_pointwise(conv: nn.Module) -> nn.Module:
    """The module, if it is a 1x1 convolution or a linear layer; its tensors are not read."""
    if isinstance(conv, nn.Linear) and class_name(conv) == "Linear":
        return conv
    conv = _check_convolution(conv)
    if conv.kernel_size != (1, 1) or conv.groups != 1:
        raise NotCovered(f"a convolution of {conv.kernel_size}, groups {conv.groups}, not 1x1")
    if conv.stride != (1, 1):
        raise NotCovered("a 1x1 convolution with a stride")
    if conv.padding not in ("same", "valid", (0, 0)):
        raise NotCovered(f"a 1x1 convolution with padding {conv.padding}")
    return conv


def read_pointwise(conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight [out, in, ...], bias) of a 1x1 convolution or a linear layer."""
    check_pointwise(conv)
    return tensor_of(conv, "weight"), tensor_of(conv, "bias")


class DepthwiseReading(NamedTuple):
    """The settings of a depthwise convolution."""

    stride: int
    padding: Padding


def read_depthwise(conv: nn.Module) -> DepthwiseReading:
    """A depthwise convolution: nn.Conv2d, or SameConv2d or timm's Conv2dSame, with TF's padding."""
    conv = _check_convolution(conv)
    channels = conv.in_channels
    if conv.groups != channels or conv.out_channels != channels:
        raise NotCovered(f"{conv.groups} groups of a convolution over {channels} channels")
    if conv.stride[0] != conv.stride[1]:
        raise NotCovered(f"stride {conv.stride}")
    return DepthwiseReading(conv.stride[0], _padding(conv))


def _padding(conv: nn.Conv2d) -> Padding:
    if class_name(conv) in ("Conv2dSame", "SameConv2d"):
        return "tf_same"
    if conv.padding == "valid":
        return (0, 0, 0, 0)
    if conv.padding == "same":  # stride 1; the odd pixel goes below and right
        (top, bottom), (left, right) = (
            ((size - 1) // 2, size - 1 - (size - 1) // 2) for size in conv.kernel_size
        )
        return top, bottom, left, right
    vertical, horizontal = _pair(conv.padding)
    return vertical, vertical, horizontal, horizontal


def read_pool(pool: nn.Module | Pool) -> Pool:
    """nn.AvgPool2d, nn.MaxPool2d, or timm's AvgPool2dSame and MaxPool2dSame; or what it returns."""
    if isinstance(pool, Pool):
        return pool
    if not isinstance(pool, nn.Module):
        raise NotCovered(f"a pool {pool!r}")
    name = class_name(pool)
    kinds = {"AvgPool2d": "average", "MaxPool2d": "max"}
    kind = kinds.get(name.removesuffix("Same"))
    if kind is None or not isinstance(pool, nn.AvgPool2d | nn.MaxPool2d):
        raise NotCovered(f"{name} in the shortcut")
    kernel_size, stride, padding = (
        _pair(value) for value in (pool.kernel_size, pool.stride, pool.padding)
    )
    if kernel_size[0] != kernel_size[1] or stride[0] != stride[1]:
        raise NotCovered(f"a pool of {kernel_size}, stride {stride}")
    if pool.ceil_mode or getattr(pool, "divisor_override", None):
        raise NotCovered("a pool with ceil_mode or divisor_override")
    if _pair(getattr(pool, "dilation", 1)) != (1, 1):
        raise NotCovered("a pool with dilation")
    same = name.endswith("Same")
    return Pool(
        "average" if kind == "average" else "max",
        kernel_size[0],
        stride[0],
        "tf_same" if same else (padding[0], padding[0], padding[1], padding[1]),
        # The zeros that AvgPool2dSame pads with are part of the map that it averages.
        kind == "average" and (same or bool(getattr(pool, "count_include_pad", False))),
    )


class Gate(NamedTuple):
    """Squeeze-and-excitation: its first activation and its two 1x1 convolutions."""

    activation: str
    reduce: nn.Module
    expand: nn.Module


def read_gate(
    reduce: nn.Module, activation: nn.Module, expand: nn.Module, gate: nn.Module | None
) -> Gate:
    """Squeeze-and-excitation made of these modules. gate: the last activation; None: sigmoid."""
    if gate is not None and class_name(gate) != "Sigmoid":
        raise NotCovered(f"squeeze-and-excitation with gate {class_name(gate)}")
    return Gate(read_activation(activation), check_pointwise(reduce), check_pointwise(expand))


@dataclass(frozen=True)
class DropPathReading:
    """Stochastic depth of a probability, by sample, as timm's `drop_path` draws it."""

    probability: float

    def draw(self, x: Tensor) -> Tensor:
        """[B]: 0 or 1 for each sample, of the same random numbers that the module draws."""
        return x.new_empty(x.shape[0]).bernoulli_(1.0 - self.probability)

    def scale(self, x: Tensor) -> Tensor:
        """[B]: 0 or 1/p for each sample, p the probability that it survives."""
        survival = 1.0 - self.probability
        kept = self.draw(x)
        return kept.div_(survival) if survival > 0 else kept


def read_drop_path(module: nn.Module) -> DropPathReading | DropPath | None:
    """This package's or timm's DropPath, torchvision's StochasticDepth by rows.

    None where nothing drops. Raises NotCovered.
    """
    if reason := interception(module, "drop_path"):
        raise NotCovered(reason)
    if type(module) is DropPath:
        return module if module.training and module.probability > 0 else None
    name = class_name(module)
    if name == "Identity":
        return None
    if name == "DropPath":
        probability = float(getattr(module, "drop_prob", 0.0) or 0.0)
        if not getattr(module, "scale_by_keep", True):
            raise NotCovered("DropPath without scale_by_keep")
    elif name == "StochasticDepth":
        probability = float(module.p)  # type: ignore[arg-type]
        if module.mode != "row":
            raise NotCovered(f"StochasticDepth by {module.mode}")
    else:
        raise NotCovered(f"{name} in place of stochastic depth")
    return DropPathReading(probability) if module.training and probability > 0 else None


class BottleneckModules(NamedTuple):
    """The modules of an inverted bottleneck that hold its tensors."""

    expand: nn.Module
    depthwise: nn.Module
    project: nn.Module
    pre_norm: nn.Module | None
    expand_norm: nn.Module | None
    depthwise_norm: nn.Module | None
    project_norm: nn.Module | None
    se_reduce: nn.Module | None
    se_expand: nn.Module | None
    shortcut: nn.Module | None


@dataclass(frozen=True)
class Bottleneck:
    """An inverted bottleneck as `functional.mbconv` takes it, and the modules that hold it."""

    description: MBConvDescription
    modules: BottleneckModules
    parameters: MBConvParameters
    drop_path: DropPathReading | DropPath | None = None


def read_tensors(modules: BottleneckModules) -> MBConvParameters:
    """The tensors as they are now, each read once. Raises NotCovered for subclasses of Tensor."""
    parameters = MBConvParameters(
        expand_weight=tensor_of(modules.expand, "weight"),
        expand_bias=tensor_of(modules.expand, "bias"),
        depthwise_weight=tensor_of(modules.depthwise, "weight"),
        depthwise_bias=tensor_of(modules.depthwise, "bias"),
        project_weight=tensor_of(modules.project, "weight"),
        project_bias=tensor_of(modules.project, "bias"),
        pre_norm=norm_tensors(modules.pre_norm),
        expand_norm=norm_tensors(modules.expand_norm),
        depthwise_norm=norm_tensors(modules.depthwise_norm),
        project_norm=norm_tensors(modules.project_norm),
        se_reduce_weight=tensor_of(modules.se_reduce, "weight"),
        se_reduce_bias=tensor_of(modules.se_reduce, "bias"),
        se_expand_weight=tensor_of(modules.se_expand, "weight"),
        se_expand_bias=tensor_of(modules.se_expand, "bias"),
        shortcut_weight=tensor_of(modules.shortcut, "weight"),
        shortcut_bias=tensor_of(modules.shortcut, "bias"),
    )
    tensors = list(chain(parameters[:6], *parameters[6:10], parameters[10:]))
    if not are_plain_tensors(tensors):
        found = next(tensor for tensor in tensors if not is_plain_tensor(tensor))
        raise NotCovered(f"a {type(found).__name__} among its tensors")
    return parameters


def read_bottleneck(
    *,
    expand: nn.Module,
    depthwise: nn.Module,
    project: nn.Module,
    pre_norm: nn.Module | None = None,
    expand_norm: nn.Module | None = None,
    depthwise_norm: nn.Module | None = None,
    project_norm: nn.Module | None = None,
    expand_activation: nn.Module | None = None,
    depthwise_activation: nn.Module | None = None,
    gate: Gate | None = None,
    gate_position: Literal["before_norm", "after_activation"] = "after_activation",
    residual: bool = True,
    pool: nn.Module | Pool | None = None,
    shortcut: nn.Module | None = None,
    drop_path: DropPathReading | DropPath | None = None,
    order: Literal["expand_first", "depthwise_first"] = "expand_first",
) -> Bottleneck:
    """The inverted bottleneck made of these modules; see MBConvDescription for what they are.

    The activations may instead be part of the norms (timm's BatchNormAct2d). Raises NotCovered,
    before any tensor that a parametrization computes is read.
    """
    pre, expanded, filtered, projected = (
        read_norm(norm) for norm in (pre_norm, expand_norm, depthwise_norm, project_norm)
    )
    if projected.activation != "identity":
        raise NotCovered(f"activation {projected.activation} after the project norm")
    convolution = read_depthwise(depthwise)
    for conv in (expand, project, shortcut):
        if conv is not None:
            check_pointwise(conv)
    description = MBConvDescription(
        stride=convolution.stride,
        padding=convolution.padding,
        pre_norm=pre.norm,
        pre_activation=pre.activation,
        expand_norm=expanded.norm,
        expand_activation=_one_activation(expanded, expand_activation),
        depthwise_norm=filtered.norm,
        depthwise_activation=_one_activation(filtered, depthwise_activation),
        project_norm=projected.norm,
        squeeze_excite=SqueezeExcite(gate_position, gate.activation) if gate else None,
        residual=residual,
        pool=None if pool is None else read_pool(pool),
        order=order,
    )
    modules = BottleneckModules(
        expand,
        depthwise,
        project,
        pre_norm,
        expand_norm,
        depthwise_norm,
        project_norm,
        gate.reduce if gate else None,
        gate.expand if gate else None,
        shortcut,
    )
    return Bottleneck(description, modules, read_tensors(modules), drop_path)


def _one_activation(norm: NormReading, activation: nn.Module | None) -> str:
    if activation is None:
        return norm.activation
    if norm.activation != "identity":
        raise NotCovered("a norm with an activation, and another one after it")
    return read_activation(activation)


def read_swin_table(table: Tensor, window: tuple[int, int]) -> Tensor:
    """A table [(2*wh-1) * (2*ww-1), heads] by query - key as window_attention takes it."""
    height, width = 2 * window[0] - 1, 2 * window[1] - 1
    if table.dim() != 2 or table.shape[0] != height * width:
        raise NotCovered(f"a bias table {tuple(table.shape)} for windows of {window}")
    return table.view(height, width, -1).permute(2, 0, 1).flip(1, 2)
