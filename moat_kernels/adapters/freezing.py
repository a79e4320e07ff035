"""What of other people's models `freeze` packs: bottlenecks, attention halves, MLPs and stems.

A frozen step computes attention with the norm before and the sum after it, which lie in the block
around: a `HalfReader` knows such a block, and says what it is made of. As it is known by names
alone, `freeze` tries it out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moat_kernels.adapters.base import AttentionReading
from moat_kernels.adapters.reading import (
    Bottleneck,
    DropPathReading,
    NotCovered,
    check_pointwise,
    class_name,
    read_activation,
    read_convolution,
    read_drop_path,
    read_norm,
    read_pointwise,
)
from moat_kernels.drop_path import DropPath
from moat_kernels.inspection import are_plain_tensors, is_plain_tensor
from moat_kernels.normalization import norm_tensors
from moat_kernels.ops.common.symbols import settled
from moat_kernels.ops.frozen import (
    CannotFreeze,
    FrozenStep,
    Placement,
    Quantizations,
    Shortcut,
    Size,
    attention_half_step,
    mbconv_step,
    mlp_step,
    pooled_half_step,
    stem_step,
)
from moat_kernels.ops.mbconv.description import Pool
from moat_kernels.ops.mbconv.dispatch import resolve_frozen
from moat_kernels.ops.window_attention import WindowAttentionDescription
from moat_kernels.tensor_access import tensor_of

_LAYER = ("weight", "bias")

# The two modules whose inputs are the operands of a step's int8 products.
Operands = tuple[nn.Module, nn.Module]


def bottleneck_step(
    bottleneck: Bottleneck, maps: torch.dtype | None, *quantizations: Quantizations
) -> FrozenStep:
    """An inverted bottleneck, its weights packed as they are now. Raises CannotFreeze.

    maps, quantizations: as of `mbconv_step`; none: it multiplies in `maps`.
    """
    if bottleneck.drop_path is not None:
        raise CannotFreeze("its drop path drops")
    parameters = bottleneck.parameters
    description = resolve_frozen(bottleneck.description, parameters, training=True)
    return mbconv_step(parameters, description, maps, *quantizations)


def check_normalized_shape(norm: nn.LayerNorm, channels: int) -> None:
    """Raise CannotFreeze where a call of the norm would raise."""
    if norm.normalized_shape != (channels,):
        raise CannotFreeze(f"a layer norm over {norm.normalized_shape}")


def refuse_drop_path(module: nn.Module) -> None:
    """Raise NotCovered if a drop path drops anything now."""
    if read_drop_path(module) is not None:
        raise NotCovered("its drop path drops")


@dataclass(frozen=True, kw_only=True)
class TransformerPart(ABC):
    """What of a transformer block, or of one half of it, steps compute, and what they do not.

    rows: whether the block reads [.., H, W, C]; else it reads [B, C, H, W].
    branch: names of the block's children that make the branch of y + branch(y), where y is the
        steps' result, in turn; none: y is the block's result.
    branch_rows: whether they read [B, H, W, C]; else they read [B, C, H, W].
    """

    rows: bool = False
    branch: tuple[str, ...] = ()
    branch_rows: bool = False

    @abstractmethod
    def steps(
        self, maps: torch.dtype | None, quantizations: Sequence[Quantizations] = ()
    ) -> list[FrozenStep]:
        """The steps, their weights packed as they are now. Raises CannotFreeze or NotCovered.

        maps: as of `attention_half_step`. quantizations: of each, if they are to multiply in int8.
        """

    @abstractmethod
    def operands(self) -> list[Operands]:
        """Of each step."""

    @abstractmethod
    def example(self, leading: tuple[int, ...]) -> Tensor:
        """A small input of the block. leading: the sizes before those of a map or of rows."""

    def _example(self, leading: tuple[int, ...], height: int, width: int, like: Tensor) -> Tensor:
        """like: a tensor of as many rows as the maps that it reads have channels."""
        channels = len(like)
        size = (height, width, channels) if self.rows else (channels, height, width)
        x = torch.randn(*leading, *size, generator=torch.Generator().manual_seed(0), device="cpu")
        return x.to(like.dtype)


@dataclass(frozen=True)
class Mlp(TransformerPart):
    """y + layer_scale(fc2(activation(fc1(norm(y))))).

    norm: a layer norm over the channels. fc1, fc2: linear layers or 1x1 convolutions.
    """

    norm: nn.Module
    fc1: nn.Module
    activation: nn.Module
    fc2: nn.Module
    layer_scale: nn.Module | None = None

    @torch.no_grad()
    def steps(
        self, maps: torch.dtype | None, quantizations: Sequence[Quantizations] = ()
    ) -> list[FrozenStep]:
        activation = read_activation(self.activation)
        norm = _check_layer_norm(self.norm, "MLP")
        fc1, fc2 = _read_plain(self.fc1), _scaled(self.fc2, self.layer_scale, "MLP")
        check_normalized_shape(norm, len(fc2[0]))
        tensors = [tensor_of(norm, "weight"), tensor_of(norm, "bias"), *fc1, *fc2]
        return [mlp_step(tensors, activation, norm.eps, maps, *quantizations)]

    def operands(self) -> list[Operands]:
        return [(self.fc1, self.fc2)]

    def example(self, leading: tuple[int, ...]) -> Tensor:
        return self._example(leading, 3, 4, tensor_of(self.fc2, "weight"))


class HalfLayers(NamedTuple):
    """The modules that hold an attention half's tensors but for the bias table."""

    norm: nn.Module
    qkv: nn.Module
    proj: nn.Module
    layer_scale: nn.Module | None


def layer_tensors(
    norm: nn.Module, qkv: nn.Module, proj: nn.Module, layer_scale: nn.Module | None
) -> list[Tensor | None]:
    """The six that ops/attention_half takes, of layers that were checked. Raises NotCovered."""
    tensors = [tensor_of(layer, name) for layer in (norm, qkv, proj) for name in _LAYER]
    _refuse_subclasses(*tensors)
    tensors[2], tensors[4] = _flat(tensors[2]), _flat(tensors[4])
    if layer_scale is not None:
        tensors[4:] = _scaled_by(layer_scale, *tensors[4:])
    return tensors


@dataclass(frozen=True)
class AttentionHalf(TransformerPart):
    """y = x + layer_scale(proj(attention(qkv(norm(x))))) of a block, and maybe the MLP after it.

    norm: a layer norm over the channels. qkv, proj: linear layers or 1x1 convolutions.
    drop_path: what drops now, of the attention's branch; None where nothing does.
    map_size: of the only maps that attention takes; None: of all that its windows divide.
    pool: if given, in place of x and norm(x) are expand(pool(x)) and pool(norm(x)).
    expand: a 1x1 convolution; None: it changes nothing.
    mlp: where a step computes it; else it is the branch.
    """

    norm: nn.Module
    qkv: nn.Module
    proj: nn.Module
    attention: AttentionReading
    layer_scale: nn.Module | None = None
    drop_path: DropPathReading | DropPath | None = None
    map_size: tuple[int, int] | None = None
    pool: Pool | None = None
    expand: nn.Module | None = None
    mlp: Mlp | None = None

    def steps(
        self, maps: torch.dtype | None, quantizations: Sequence[Quantizations] = ()
    ) -> list[FrozenStep]:
        mlp = self.mlp.steps(maps, quantizations[1:]) if self.mlp else []
        return [self._attention_step(maps, *quantizations[:1]), *mlp]

    def operands(self) -> list[Operands]:
        return [(self.qkv, self.proj), *(self.mlp.operands() if self.mlp else [])]

    @torch.no_grad()
    def _attention_step(
        self, maps: torch.dtype | None, *quantizations: Quantizations
    ) -> FrozenStep:
        if self.drop_path is not None:
            raise NotCovered("its drop path drops")
        norm, description = _check_layer_norm(self.norm, "attention"), self.attention.description
        tensors = self.tensors()
        tensors[2:4] = qkv = _parts_first(tensors[2:4], description)
        assert qkv[0] is not None
        check_normalized_shape(norm, qkv[0].shape[1])
        layout = replace(description, qkv_layout="qkv_heads")
        if self.pool is None:
            step = attention_half_step(tensors, norm.eps, layout, maps, *quantizations)
            return replace(step, place=_checked_place(step, description.window_size, self.map_size))
        expand = (None, None) if self.expand is None else _read_plain(self.expand)
        step = pooled_half_step(tensors, Shortcut(self.pool, *expand), norm.eps, layout, maps)
        place = _checked_place(step, description.window_size, self.map_size, pooled=True)
        return replace(step, place=place)

    @property
    def eps(self) -> float:
        return float(settled(_check_layer_norm(self.norm, "attention").eps))

    def tensors(self) -> list[Tensor | None]:
        """As ops/attention_half takes them, qkv as the description says. Raises NotCovered."""
        layers = self.check_layers()
        return [*layer_tensors(*layers), self.attention.bias_table]

    def check_layers(self) -> HalfLayers:
        """The modules that hold the tensors, if their classes are known. Raises NotCovered."""
        return HalfLayers(
            _check_layer_norm(self.norm, "attention"),
            check_pointwise(self.qkv),
            check_pointwise(self.proj),
            _check_layer_scale(self.layer_scale, "attention"),
        )

    def with_mlp(self, mlp: Mlp) -> AttentionHalf:
        """The same block without a branch."""
        return replace(self, mlp=mlp, branch=())

    def example(self, leading: tuple[int, ...]) -> Tensor:
        window = self.attention.description.window_size
        height, width = self.map_size or ((2 * window[0], 3 * window[1]) if window else (3, 4))
        if self.pool is None:
            return self._example(leading, height, width, tensor_of(self.proj, "weight"))
        height, width = _size_before(self.pool, height), _size_before(self.pool, width)
        return self._example(leading, height, width, _read_plain(self.qkv)[0][0])


@dataclass(frozen=True)
class StemPart:
    """second(activation(norm(first(x)))) with 3x3 convolutions, the first of stride 2.

    norm: a batch norm, which may apply the activation; else `activation` is given.
    """

    first: nn.Module
    norm: nn.Module
    second: nn.Module
    activation: nn.Module | None = None

    @torch.no_grad()
    def steps(self, maps: torch.dtype | None) -> list[FrozenStep]:
        """The step, its weights packed as they are now. Raises CannotFreeze or NotCovered."""
        reading = read_norm(self.norm)
        activation = reading.activation
        if self.activation is not None:
            activation = read_activation(self.activation)
        symmetric = _stem_padding(self.first, 2) == "symmetric"
        _stem_padding(self.second, 1)  # with stride 1 both are the same
        if reading.norm is None or not reading.norm.frozen:
            raise CannotFreeze("a stem without a norm that has statistics")
        tensors = [
            [tensor_of(conv, name) for name in ("weight", "bias")]
            for conv in (self.first, self.second)
        ]
        norm = norm_tensors(self.norm)
        _refuse_subclasses(*tensors[0], *norm[:4], *tensors[1])
        return [
            stem_step(tensors[0], norm, reading.norm.eps, tensors[1], maps, activation, symmetric)
        ]

    def example(self) -> Tensor:
        """Small images of odd sides."""
        weight = tensor_of(self.first, "weight")
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, weight.shape[1], 9, 13, generator=generator, device="cpu")
        return x.to(weight.dtype)


class StemReader(ABC):
    """Reads stems of one class. class_name, children: as of a `HalfReader`."""

    class_name: str
    children: tuple[str, ...]

    @abstractmethod
    def read(self, stem: Any) -> StemPart:
        """The stem as it is now. Raises NotCovered."""


class HalfReader(ABC):
    """Reads the attention half of blocks of one class, whose attention was fused by an adapter.

    class_name, children: of the blocks, all that they have. adapter_key: of the adapter.
    attention: the name of the fused child; empty: the block itself is fused.
    leading: the sizes before those of a map or of rows in what the block reads, for a trial.
    """

    class_name: str
    children: tuple[str, ...]
    adapter_key: str
    attention: str = ""
    leading: tuple[int, ...] = (1,)

    @abstractmethod
    def read(self, block: Any) -> AttentionHalf:
        """The half as it is now, without the MLP. Raises NotCovered."""

    def read_mlp(self, block: Any) -> Mlp:
        """What the branch of such a block computes, as it is now. Raises NotCovered."""
        raise NotCovered("a block without an MLP")


class MlpReader(ABC):
    """Reads blocks of one class that are an MLP with the sum around it.

    class_name, children, leading: as of a `HalfReader`.
    """

    class_name: str
    children: tuple[str, ...]
    leading: tuple[int, ...] = (1,)

    @abstractmethod
    def read(self, block: Any) -> Mlp:
        """The MLP as it is now. Raises NotCovered."""


def _stem_padding(conv: nn.Module, stride: int) -> Literal["tf_same", "symmetric"]:
    """That of a stem's convolution. Raises NotCovered."""
    reading = read_convolution(conv)
    if (reading.kernel_size, reading.stride) == (3, stride):
        if reading.padding == "tf_same":
            return "tf_same"
        if reading.padding == (1, 1, 1, 1):
            return "symmetric"
    raise NotCovered(f"a stem's convolution of {reading}")


def _size_before(pool: Pool, size: int) -> int:
    """Of a side that has `size` pixels after the pool."""
    if pool.padding == "tf_same":
        return size * pool.stride
    return (size - 1) * pool.stride + pool.kernel_size - 2 * pool.padding[0]


def _checked_place(
    step: FrozenStep,
    window: tuple[int, int] | None,
    map_size: tuple[int, int] | None,
    pooled: bool = False,
) -> Callable[[Size], Placement]:
    """As the step's own, which knows nothing of what maps the block refuses.

    pooled: whether these are of the size that the step's result has.
    """
    what = "x, once pooled," if pooled else "x"

    def place(size: Size) -> Placement:
        placement = step.place(size)
        _, height, width = placement.output_size
        if map_size is not None and (height, width) != map_size:
            expected = " x ".join(map(str, map_size))
            raise ValueError(f"{what} must be a map of {expected}, got {height} x {width}")
        if window is not None and (height % window[0] or width % window[1]):
            raise ValueError(
                f"{what} must be a map that windows of {window[0]} x {window[1]} divide, "
                f"got {height} x {width}"
            )
        return placement

    return place


def _check_layer_norm(norm: nn.Module, before: str) -> nn.LayerNorm:
    """The norm, if it is one over channels. Raises NotCovered."""
    # Those of timm are subclasses of nn.LayerNorm of the same name, or for [B, C, H, W].
    if not isinstance(norm, nn.LayerNorm) or class_name(norm) not in ("LayerNorm", "LayerNorm2d"):
        raise NotCovered(f"{class_name(norm)} before its {before}")
    return norm


def _refuse_subclasses(*tensors: Tensor | None) -> None:
    """Raise NotCovered for tensors whose sums and views may be of another class than they."""
    if are_plain_tensors(tensors):
        return
    for tensor in tensors:
        if not is_plain_tensor(tensor):
            raise NotCovered(f"a {type(tensor).__name__} among its tensors")


def _read_plain(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear layer or a 1x1 convolution. Raises NotCovered."""
    weight, bias = read_pointwise(module)
    _refuse_subclasses(weight, bias)
    return _flat(weight), bias


def _parts_first(
    qkv: Sequence[Tensor | None], description: WindowAttentionDescription
) -> list[Tensor | None]:
    """Weight and bias with their rows in the order of "qkv_heads". Raises NotCovered."""
    heads, head_dim = description.heads, description.head_dim
    assert qkv[0] is not None
    if len(qkv[0]) != 3 * heads * head_dim:
        raise NotCovered(f"qkv of {len(qkv[0])} channels for {heads} heads of {head_dim}")
    if description.qkv_layout == "qkv_heads":
        return list(qkv)
    return [
        None
        if tensor is None
        else tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        for tensor in qkv
    ]


def _flat(weight: Tensor) -> Tensor:
    """[out, in] of a linear layer's weight or a 1x1 convolution's."""
    return weight if weight.dim() == 2 else weight.flatten(1)


def _check_layer_scale(module: nn.Module | None, what: str) -> nn.Module | None:
    """The layer scale, if there is one; None of the identity. Raises NotCovered."""
    if module is None or class_name(module) == "Identity":
        return None
    if class_name(module) not in ("LayerScale", "LayerScale2d"):
        raise NotCovered(f"{class_name(module)} after its {what}")
    return module


def _scaled_by(
    layer_scale: nn.Module, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a last layer and of the scale after it. Raises NotCovered."""
    factor = tensor_of(layer_scale, "gamma")
    _refuse_subclasses(factor)
    if factor.shape != weight.shape[:1]:
        raise NotCovered(f"a layer scale {tuple(factor.shape)} of {len(weight)} channels")
    return factor[:, None] * weight, None if bias is None else factor * bias


def _scaled(
    module: nn.Module, layer_scale: nn.Module | None, what: str
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the last layer of `what`, and of the scale after it. Raises NotCovered."""
    weight, bias = _read_plain(module)
    scale = _check_layer_scale(layer_scale, what)
    return (weight, bias) if scale is None else _scaled_by(scale, weight, bias)
