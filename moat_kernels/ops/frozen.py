"""Sequences of steps whose weights were packed once, by native CPU kernels.

csrc/cpu/host/frozen.cpp has their side.

A step is a stem, an inverted bottleneck, an attention half, an MLP or a classifier with fixed
statistics.
The other ops take plain weights, which they fold and pack in every call; a step keeps what was
folded and packed when it was made, and refers to nothing else. A `FrozenSequence` computes all its
steps in one native call. Between the steps the maps may have another dtype than the model, in which
the steps multiply, too, where the CPU can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from moat_kernels.ops.attention_half import cpu as attention_half
from moat_kernels.ops.common.backends import backend_status
from moat_kernels.ops.common.batch_norm import NormParameters
from moat_kernels.ops.common.spatial import output_size, resolve_padding
from moat_kernels.ops.mbconv.algebra.coverage import KERNEL_SIZE, all_frozen
from moat_kernels.ops.mbconv.cpu import backend as cpu_backend
from moat_kernels.ops.mbconv.cpu.arguments import (
    BlockPadding,
    block_padding,
    block_settings,
    block_tensors,
)
from moat_kernels.ops.mbconv.description import (
    MBConvDescription,
    MBConvParameters,
    Pool,
)
from moat_kernels.ops.stem import cpu as stem
from moat_kernels.ops.window_attention.description import WindowAttentionDescription

Size = tuple[int, int, int]  # C, H, W of a map

# Sizes of images that a sequence remembers; for others it looks its steps up again.
_MOST_SIZES = 16


# Of models that can be frozen, and of the maps between their steps.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_NO_PADDING = BlockPadding()


class Quantization(NamedTuple):
    """Numbers as bytes from 0 to 255: number = (byte - zero) * scale."""

    scale: float
    zero: int


# What turns the two operands of a step's int8 products to bytes; csrc/cpu/host/frozen.h says which.
Quantizations = tuple[Quantization, Quantization]

_NOT_QUANTIZED: Quantizations = (Quantization(0.0, 0), Quantization(0.0, 0))


class CannotFreeze(Exception):
    """Why the weights of a module cannot be packed once and for all."""


@dataclass(frozen=True)
class Placement:
    """What a step for maps of one size needs to know, and the size of its result.

    window: height and width.
    """

    output_size: Size
    padding: BlockPadding = _NO_PADDING
    window: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class FrozenStep:
    """A step for maps of any size.

    kind: of layer.
    int8: whether it multiplies in int8.
    native, packed: the step and its weights as the native ops take them.
    dtype: of the tensors that it was made of.
    reads: the dtype of its input; a stem reads float32 whatever it writes.
    place: (C, H, W) of the maps it reads -> the placement.
    position_table: of an attention half that has one.
    """

    kind: str
    int8: bool
    native: Tensor
    packed: Tensor
    dtype: torch.dtype
    reads: torch.dtype
    place: Callable[[Size], Placement]
    position_table: Tensor | None = None

    def for_maps(self, size: Size) -> tuple[Tensor, list[Tensor], Size]:
        """The native step for maps of one size, the tensors that it reads, its result's size."""
        placement = self.place(size)
        native, table = torch.ops.moat_kernels.cpu_freeze_for_maps.default(
            self.native,
            *size,
            *placement.padding,
            *placement.window,
            self.position_table,
        )
        tables = [] if self.position_table is None else [table]
        return native, [self.packed, *tables], placement.output_size


@torch.no_grad()
def stem_step(
    first: Sequence[Tensor | None],
    norm: NormParameters,
    eps: float,
    second: Sequence[Tensor | None],
    maps: torch.dtype | None = None,
    activation: str = "gelu",
    symmetric: bool = False,
) -> FrozenStep:
    """The stem; arguments as of `stem.stem`. Raises CannotFreeze.

    maps: as of all steps, the dtype of the maps and of products; None: that of the tensors.
    activation: as of `MBConvDescription`.
    symmetric: whether the first convolution pads by a pixel on each side, not as TF's SAME.
    """
    tensors = [*first, *norm[:4], *second]
    dtype = _dtype_of(tensors)
    weight = first[0]
    last = second[0]
    if (
        weight is None
        or last is None
        or weight.dim() != 4
        or not stem.fits(weight.shape[1], first, norm, second)
    ):
        raise CannotFreeze("a stem that the native kernel does not cover")
    channels = last.shape[0]
    native, packed = torch.ops.moat_kernels.cpu_freeze_stem.default(
        *tensors, activation, symmetric, eps, maps or dtype
    )
    return FrozenStep(
        "stem",
        False,
        native,
        packed,
        dtype,
        torch.float32,
        lambda size: Placement((channels, (size[1] + 1) // 2, (size[2] + 1) // 2)),
    )


@torch.no_grad()
def mbconv_step(
    parameters: MBConvParameters,
    description: MBConvDescription,
    maps: torch.dtype | None = None,
    quantizations: Quantizations = _NOT_QUANTIZED,
) -> FrozenStep:
    """The inverted bottleneck; arguments as of `mbconv`. Raises CannotFreeze.

    quantizations: if given, it multiplies in int8, for which `maps` must be bfloat16.
    """
    tensors = block_tensors(parameters)
    dtype = _dtype_of(tensors)
    if not all_frozen(description):
        raise CannotFreeze("a batch norm that measures its batch")
    reason = cpu_backend.unsupported(parameters.expand_weight.new_empty(0), parameters, description)
    if reason:
        raise CannotFreeze(reason)
    native, packed = torch.ops.moat_kernels.cpu_freeze_mbconv.default(
        *tensors,
        *block_settings(description),
        maps or dtype,
        *quantizations[0],
        *quantizations[1],
    )
    channels = parameters.project_weight.shape[0]

    def place(size: Size) -> Placement:
        _, height, width = size
        padding = block_padding(description, height, width)
        vertical = (padding.padding_top, padding.padding_bottom)
        horizontal = (padding.padding_left, padding.padding_right)
        output = (
            channels,
            output_size(height, *vertical, KERNEL_SIZE[0], description.stride),
            output_size(width, *horizontal, KERNEL_SIZE[1], description.stride),
        )
        return Placement(output, padding)

    int8 = quantizations is not _NOT_QUANTIZED
    kind = "inverted bottleneck"
    return FrozenStep(kind, int8, native, packed, dtype, maps or dtype, place)


@torch.no_grad()
def attention_half_step(
    tensors: Sequence[Tensor | None],
    eps: float,
    description: WindowAttentionDescription,
    maps: torch.dtype | None = None,
    quantizations: Quantizations = _NOT_QUANTIZED,
) -> FrozenStep:
    """The attention half; arguments as of `attention_half.attention_half`. Raises CannotFreeze.

    Its windows may also be those of a grid, which must divide the maps.
    """
    dtype = _dtype_of(tensors)
    *_, proj_weight, _, table = tensors
    channels = 0 if proj_weight is None else proj_weight.shape[0]
    if not attention_half.fits(channels, tensors, replace(description, partition="window")):
        raise CannotFreeze("an attention that the native kernel does not cover")
    native, packed = torch.ops.moat_kernels.cpu_freeze_attention_half.default(
        *tensors,
        description.heads,
        description.head_dim,
        description.scale_or_default(),
        eps,
        description.partition == "grid",
        maps or dtype,
        *quantizations[0],
        *quantizations[1],
    )
    return FrozenStep(
        "attention half",
        quantizations is not _NOT_QUANTIZED,
        native,
        packed,
        dtype,
        maps or dtype,
        lambda size: Placement(size, window=description.window_for(*size[1:])),
        None if table is None else table.float().clone(),
    )


class Shortcut(NamedTuple):
    """Of an attention half that changes the size of maps: x -> weight pool(x) + bias.

    weight: [C, C_in]; None: the pooled map itself.
    """

    pool: Pool
    weight: Tensor | None = None
    bias: Tensor | None = None

    def padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Of the pool, for a map of `height` x `width`."""
        size = (self.pool.kernel_size, self.pool.kernel_size)
        return resolve_padding(self.pool.padding, height, width, size, self.pool.stride)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Of such a map after the pool."""
        top, bottom, left, right = self.padding(height, width)
        size, stride = self.pool.kernel_size, self.pool.stride
        return (
            output_size(height, top, bottom, size, stride),
            output_size(width, left, right, size, stride),
        )


@torch.no_grad()
def pooled_half_step(
    tensors: Sequence[Tensor | None],
    shortcut: Shortcut,
    eps: float,
    description: WindowAttentionDescription,
    maps: torch.dtype | None = None,
) -> FrozenStep:
    """shortcut(x) + proj(attention(qkv(pool(norm(x))))). Raises CannotFreeze.

    tensors: as of `attention_half_step`, for a norm and qkv of C_in channels and proj of C.
    """
    *layers, table = tensors
    qkv_weight, proj_weight = layers[2], layers[4]
    if qkv_weight is None or proj_weight is None or qkv_weight.dim() != 2 or proj_weight.dim() != 2:
        raise CannotFreeze("an attention without weights")
    channels, read = len(proj_weight), qkv_weight.shape[1]
    weight = shortcut.weight
    if weight is None and channels == read:
        weight = torch.eye(channels, dtype=proj_weight.dtype)
    dtype = _dtype_of([*tensors, weight, shortcut.bias])
    inner = description.heads * description.head_dim
    norm, qkv, proj = (read,), (3 * inner, read), (channels, inner)
    shapes = (norm, norm, qkv, qkv[:1], proj, proj[:1], (channels, read), proj[:1])
    given = (*layers, weight, shortcut.bias)
    if (
        weight is None
        or any(t is not None and t.shape != shape for t, shape in zip(given, shapes, strict=True))
        or (table is not None and (table.dim() != 3 or len(table) != description.heads))
        or (description.qkv_layout, description.partition) != ("qkv_heads", "window")
    ):
        raise CannotFreeze("an attention that the native kernel does not cover")
    native, packed = torch.ops.moat_kernels.cpu_freeze_pooled_half.default(
        *tensors,
        weight,
        shortcut.bias,
        description.heads,
        description.head_dim,
        description.scale_or_default(),
        eps,
        shortcut.pool.kind,
        shortcut.pool.kernel_size,
        shortcut.pool.stride,
        shortcut.pool.count_include_pad,
        maps or dtype,
    )

    def place(size: Size) -> Placement:
        output = shortcut.output_size(*size[1:])
        padding = BlockPadding(0, 0, 0, 0, *shortcut.padding(*size[1:]))
        return Placement((channels, *output), padding, description.window_for(*output))

    kind, kept = "attention half", None if table is None else table.float().clone()
    return FrozenStep(kind, False, native, packed, dtype, maps or dtype, place, kept)


@torch.no_grad()
def mlp_step(
    tensors: Sequence[Tensor | None],
    activation: str,
    eps: float,
    maps: torch.dtype | None = None,
    quantizations: Quantizations = _NOT_QUANTIZED,
) -> FrozenStep:
    """y + fc2(activation(fc1(norm(y)))) of each pixel of [B, C, H, W]. Raises CannotFreeze.

    tensors: weight [C] and bias of the norm, weight [hidden, C] and bias of fc1, weight [C, hidden]
        and bias of fc2. Only the last two weights must be given.
    activation: as of `MBConvDescription`.
    quantizations: if given, it multiplies in int8, for which `maps` must be bfloat16.
    """
    dtype = _dtype_of(tensors)
    fc1, fc2 = tensors[2], tensors[4]
    if fc1 is None or fc2 is None or fc1.dim() != 2 or fc2.dim() != 2 or not fc1.numel():
        raise CannotFreeze("an MLP without weights")
    hidden, channels = fc1.shape
    norm, middle, end = (channels,), (hidden,), (channels,)
    shapes = (norm, norm, (hidden, channels), middle, (channels, hidden), end)
    if any(t is not None and t.shape != shape for t, shape in zip(tensors, shapes, strict=True)):
        raise CannotFreeze("an MLP whose layers do not fit together")
    native, packed = torch.ops.moat_kernels.cpu_freeze_mlp.default(
        *tensors, activation, eps, maps or dtype, *quantizations[0], *quantizations[1]
    )
    int8 = quantizations is not _NOT_QUANTIZED
    return FrozenStep("MLP", int8, native, packed, dtype, maps or dtype, Placement)


@torch.no_grad()
def head_step(
    tensors: Sequence[Tensor | None], eps: float, maps: torch.dtype | None = None
) -> FrozenStep:
    """Mean of the pixels, layer norm, linear layer: [B, C, H, W] -> [B, classes].

    tensors: weight [C] and bias of the norm, weight [classes, C] and bias of the linear layer;
        without its weight the norm is the result. Its products and result are in float32.
        Raises CannotFreeze.
    """
    dtype = _dtype_of(tensors)
    if tensors[0] is None:
        raise CannotFreeze("a norm without weights")
    if tensors[2] is not None and not tensors[2].numel():
        raise CannotFreeze("a classifier without classes")
    native, packed = torch.ops.moat_kernels.cpu_freeze_head.default(*tensors, eps)
    return FrozenStep("classifier", False, native, packed, dtype, maps or dtype, Placement)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether steps with maps in `dtype` multiply in it on this CPU, and not in float32."""
    return torch.ops.moat_kernels.cpu_multiplies.default(dtype)


class FrozenSequence:
    """Steps one after the other. Copies share it, as it never changes; it cannot be pickled.

    dtype: of its input and results, that of the tensors that the steps were made of.
    """

    def __init__(self, steps: Sequence[FrozenStep]) -> None:
        self._steps = tuple(steps)
        self.dtype, self._reads = steps[0].dtype, steps[0].reads
        if any(step.dtype != self.dtype for step in steps):
            raise CannotFreeze("tensors of several dtypes")
        # By C, H, W of x: the native steps, and the tensors that they read.
        self._plans: dict[tuple[int, ...], tuple[Tensor, list[Tensor]]] = {}

    @property
    def steps(self) -> tuple[FrozenStep, ...]:
        return self._steps

    @property
    def bytes(self) -> int:
        """Of the packed weights."""
        return sum(step.packed.nbytes for step in self._steps)

    def part(self, begin: int, end: int | None) -> FrozenSequence:
        """Some of the steps, which are not copied."""
        return FrozenSequence(self._steps[begin:end])

    def leads_to(self, other: FrozenSequence) -> bool:
        """Whether one sequence of the steps of both gives the same bits as one after the other.

        That is where nothing is lost of the maps between.
        """
        exact = self.dtype == torch.float32 or other._reads == self.dtype
        return exact and other.dtype == self.dtype and other._steps[0].kind != "stem"

    def followed_by(self, others: Iterable[FrozenSequence]) -> FrozenSequence:
        """The steps of all, which are not copied."""
        return FrozenSequence([*self._steps, *(step for other in others for step in other._steps)])

    def result(self, x: Tensor) -> Tensor:
        """That of the last step, as of `outputs`."""
        return self.outputs(x, [len(self._steps) - 1])[0]

    def outputs(self, x: Tensor, kept: Sequence[int]) -> list[Tensor]:
        """The results of the steps that `kept` names, in ascending order; maps in channels_last.

        x: [B, C, H, W] in the sequence's dtype, on the CPU. Raises TypeError, ValueError or
        RuntimeError.
        """
        try:
            plan = self._plans.get(x.shape[1:])
            fits = x.dtype == self.dtype and x.is_cpu
            fits = fits and not (x.requires_grad and torch.is_grad_enabled())
        except AttributeError:
            fits = False
        if not fits:
            self._refuse(x)
        if plan is None:
            plan = self._plan(x)
        results = torch.ops.moat_kernels.cpu_frozen_forward.default(x.to(self._reads), *plan, kept)
        return [result.to(self.dtype) for result in results]

    def _plan(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if x.dim() != 4:
            raise ValueError(f"x must be [B, C, H, W], got {tuple(x.shape)}")
        if len(self._plans) >= _MOST_SIZES:
            self._plans.clear()
        size: Size = (x.shape[1], x.shape[2], x.shape[3])
        natives, tensors = [], []
        for step in self._steps:
            native, needed, size = step.for_maps(size)
            natives.append(native)
            tensors += needed
        plan = self._plans[x.shape[1:]] = (torch.cat(natives), tensors)
        return plan

    def _refuse(self, x: object) -> NoReturn:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "x requires grad, which a frozen model has none to give for; call it under "
                "torch.no_grad() or torch.inference_mode(), or use the model that was frozen"
            )
        raise TypeError(
            f"x must be {self.dtype} on the CPU, as the model that was frozen, "
            f"got {x.dtype} on {x.device}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenSequence:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a frozen model cannot be pickled: its weights are laid out for this process; save the "
            "model that was frozen, and freeze it again where it is loaded"
        )


def _dtype_of(tensors: Sequence[Tensor | None]) -> torch.dtype:
    """The dtype of plain CPU tensors. Raises CannotFreeze unless all have the same of DTYPES."""
    status = backend_status()["cpu"]
    if not status.usable:
        raise CannotFreeze(status.reason)
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if type(tensor) not in (Tensor, Parameter):
            raise CannotFreeze(f"a {type(tensor).__name__} among its tensors")
        if tensor.device.type != "cpu":
            raise CannotFreeze(f"tensors on {tensor.device}")
        if tensor.dtype not in DTYPES:
            raise CannotFreeze(f"tensors of {tensor.dtype}")
    if len({tensor.dtype for tensor in given}) > 1:
        raise CannotFreeze("tensors of several dtypes")
    return given[0].dtype
