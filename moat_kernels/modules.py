"""Fused MOAT blocks: the reference's parameters, state_dict and numbers; less time and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moat_kernels import reference
from moat_kernels.adapters.freezing import bottleneck_step, check_normalized_shape
from moat_kernels.adapters.reading import NotCovered, read_drop_path
from moat_kernels.block_reading import read_block
from moat_kernels.drop_path import DropPath
from moat_kernels.graphed_model import plain_class_of
from moat_kernels.inspection import (
    interception,
    is_plain,
    is_plain_tensor,
    overridden,
    remember_code,
)
from moat_kernels.linear import apply_linear
from moat_kernels.ops.attention_half import api as attention_half
from moat_kernels.ops.attention_half import training as attention_half_training
from moat_kernels.ops.attention_half.description import Layers
from moat_kernels.ops.attention_half.dispatch import TRAINING, way_to_compute
from moat_kernels.ops.common.backends import NO_TORCHSCRIPT, keep_backend, warn_once
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.common.symbols import settled
from moat_kernels.ops.frozen import (
    CannotFreeze,
    FrozenStep,
    Quantizations,
    attention_half_step,
)
from moat_kernels.ops.layer_norm import add_branch, branch_layer_norm, covers
from moat_kernels.ops.mbconv import mbconv
from moat_kernels.ops.mbconv.checks import RECOMPUTE_LEVELS
from moat_kernels.ops.window_attention import window_attention
from moat_kernels.tensor_access import child, is_parametrized, tensor_of
from moat_kernels.tracing import is_traced, record_call

Result = TypeVar("Result")


def check_runs_as_made(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> None:
    """Raise CannotFreeze if anything but the code of one of `classes` runs when it is called."""
    if plain_class_of(module) not in classes:
        raise CannotFreeze(f"a {type(module).__name__} with code of its own")
    if reason := interception(module, "it"):
        raise CannotFreeze(reason)


def refuse_scripting(module: nn.Module) -> NoReturn:
    """torch.jit.script asks each module for what to script instead of it."""
    raise RuntimeError(f"{type(module).__name__}: {NO_TORCHSCRIPT}")


class FusedInvertedBottleneck(reference.MBConvBlock):
    """What both fused blocks share: the convolutional half through `functional.mbconv`."""

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self, in_channels: int, out_channels: int, *, recompute: str = "auto", **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, **options)
        if recompute not in RECOMPUTE_LEVELS:
            raise ValueError(f"recompute must be one of {RECOMPUTE_LEVELS}, got {recompute!r}")
        self.recompute = recompute

    def inverted_bottleneck(self, x: Tensor) -> Tensor:
        try:
            bottleneck = read_block(self)
        except NotCovered as obstacle:
            warn_once(f"{type(self).__name__}: {obstacle}; running unfused")
            return super().inverted_bottleneck(x)
        drop_path = bottleneck.drop_path
        return mbconv(
            x,
            bottleneck.parameters,
            bottleneck.description,
            training=True,  # which norms measure the batch is told by their own training flags
            recompute=self.recompute,
            drop_path_scale=None if drop_path is None else drop_path.scale(x),
        )

    def frozen_steps(
        self, maps: torch.dtype | None = None, quantizations: Sequence[Quantizations] = ()
    ) -> list[FrozenStep]:
        """What inference computes, its weights packed as they are now. Raises CannotFreeze.

        maps: the dtype of the maps and of products; None: that of the weights.
        quantizations: of each step, if they are to multiply in int8.
        """
        check_runs_as_made(self, (FusedMBConv, FusedMOATBlock))
        if self._drops():
            raise CannotFreeze("its drop path drops")
        try:
            bottleneck = read_block(self)
        except NotCovered as obstacle:
            raise CannotFreeze(str(obstacle)) from obstacle
        return [bottleneck_step(bottleneck, maps, *quantizations[:1])]

    def _drops(self) -> bool:
        """Whether drop path draws, or is replaced by something that might."""
        try:
            return read_drop_path(child(self, "drop_path")) is not None
        except NotCovered:
            return True

    def extra_repr(self) -> str:
        return f"recompute={self.recompute!r}"


class FusedMBConv(FusedInvertedBottleneck):
    """`reference.MBConvBlock` computed by fused kernels; the same arguments, names and numbers.

    [B, C_in, H, W] -> [B, C_out, ceil(H / stride), ceil(W / stride)], in x's memory format.

    recompute: what the backward pass recomputes instead of keeping, in units of C_out channels of
        the map at stride 1: "none" keeps 9 C (x and two wide tensors), "expand" 5 C, "block" 1 C;
        "auto" is the fastest. Stock autograd keeps 26 C.

    >>> block = FusedMBConv(16, 32, stride=2)
    >>> block(torch.zeros(1, 16, 7, 8)).shape
    torch.Size([1, 32, 4, 4])

    Raises ValueError naming an argument that is not supported. What was changed inside a block
    (settings, modules, methods) is computed too, or the block runs unfused, with a FallbackWarning
    that names it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return record_call(self, x) if is_traced(x) else self.inverted_bottleneck(x)


class FusedAttention(reference.Attention):
    """`reference.Attention` through `functional.window_attention`, its linear layers natively.

    [B, H, W, C] -> [B, H, W, C]. The same arguments.
    """

    __prepare_scriptable__ = refuse_scripting

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x):
            return record_call(self, x)
        return apply_linear(self.proj, self.attend(apply_linear(self.qkv, x)))

    def attend(self, qkv: Tensor) -> Tensor:
        kept = self._parameters.get("relative_position_embedding")
        if kept is not None and not (is_plain_tensor(kept) and len(kept) == self.description.heads):
            found = f"a {type(kept).__name__} {tuple(kept.shape)} as table"
            warn_once(f"{type(self).__name__}: {found}; running unfused")
            return super().attend(qkv)
        table = self.bias_table(qkv.shape[1], qkv.shape[2])
        return window_attention(qkv, table, self.description)


_ATTENTION_METHODS = (FusedAttention.forward, FusedAttention.attend, FusedAttention.bias_table)


class FusedMOATBlock(FusedInvertedBottleneck, reference.MOATBlock):
    """`reference.MOATBlock` computed by fused kernels; the same arguments, names and numbers.

    [B, C_in, H, W] -> [B, C_out, ceil(H / stride), ceil(W / stride)], in x's memory format.

    recompute: as in FusedMBConv; with "block" the attention half also keeps only its input.

    >>> block = FusedMOATBlock(32, 64, stride=2, window_size=7)
    >>> block(torch.zeros(1, 32, 28, 28)).shape
    torch.Size([1, 64, 14, 14])

    Raises ValueError naming an argument that is not supported.
    """

    attention_class = FusedAttention

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x):
            return record_call(self, x)
        return self.attention_half(self.inverted_bottleneck(x))

    def frozen_steps(
        self, maps: torch.dtype | None = None, quantizations: Sequence[Quantizations] = ()
    ) -> list[FrozenStep]:
        steps = super().frozen_steps(maps, quantizations)
        if not self._is_one_pass():
            raise CannotFreeze("its attention is hooked or was replaced")
        norm, attention = self.attention_norm, self.attention
        check_normalized_shape(norm, self.shrink_conv.weight.shape[0])
        tensors = self._attention_tensors()
        half = attention_half_step(
            tensors, norm.eps, attention.description, maps, *quantizations[1:]
        )
        return [*steps, half]

    def attention_half(self, y: Tensor) -> Tensor:
        if overridden(self, (_SELF_ATTENTION,)):
            return super().attention_half(y)
        tensors = self.read_attention_half()
        if tensors is not None and child(self, "attention_norm").normalized_shape == y.shape[1:2]:
            description, eps = self.attention.description, settled(self.attention_norm.eps)
            way = way_to_compute(y, tensors, description, self._drops())
            if way in attention_half.BACKENDS:
                output = attention_half.attention_half(y, tensors, eps, description, way)
                return in_format_of(output, y)
            drop_path = child(self, "drop_path")
            if way == TRAINING and is_plain(drop_path, DropPath):
                return self._train_attention_half(y, tensors[:-1], drop_path)
        if self._fuses_branch(y):
            rows, branch = self._keeping_input(self._branch, y.permute(0, 2, 3, 1))
            return add_branch(rows, branch, self.drop_path.scale(branch)).permute(0, 3, 1, 2)
        return super().attention_half(y)

    def _train_attention_half(
        self, y: Tensor, tensors: Sequence[Tensor | None], drop_path: DropPath
    ) -> Tensor:
        attention, eps = self.attention, settled(self.attention_norm.eps)
        layers = Layers(*tensors)  # type: ignore[arg-type]  # none is missing: they are covered
        kept, factor = drop_path.draw(y), 1.0 / (1.0 - drop_path.probability)

        def compute(y: Tensor) -> Tensor:
            table = attention.bias_table(*y.shape[2:])
            return attention_half_training.attention_half(
                *(y, layers, table, eps, attention.description, kept, factor)
            )

        return self._keeping_input(compute, y)

    def self_attention(self, y: Tensor) -> Tensor:
        return self._keeping_input(super().self_attention, y)

    def _attention_modules(self) -> tuple[nn.Module, ...]:
        """The norm, the attention and its two linear layers."""
        attention = child(self, "attention")
        layers = (child(attention, "qkv"), child(attention, "proj"))
        return (child(self, "attention_norm"), attention, *layers)

    def _is_one_pass(self) -> bool:
        """Whether tensors alone say what this half computes, so that one op may."""
        if type(child(self, "attention")) is not FusedAttention:
            return False
        kinds = (nn.LayerNorm, FusedAttention, nn.Linear, nn.Linear)
        modules = self._attention_modules()
        return all(map(is_plain, modules, kinds)) and not overridden(modules[1], _ATTENTION_METHODS)

    def read_attention_half(self) -> list[Tensor | None] | None:
        """Its tensors as `attention_half` takes them; None where they do not say all but drop path.

        What parametrizations compute in training is not read: that must be done once in a call.
        """
        if not self._is_one_pass():
            return None
        for module in self._attention_modules():
            if is_parametrized(module) and (module.training or torch.is_grad_enabled()):
                return None
        return self._attention_tensors()

    def _attention_tensors(self) -> list[Tensor | None]:
        """As `attention_half` takes them."""
        norm, attention, qkv, proj = self._attention_modules()
        layers = [
            tensor_of(module, part) for module in (norm, qkv, proj) for part in ("weight", "bias")
        ]
        return [*layers, tensor_of(attention, "relative_position_embedding")]

    def _branch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, attention(layer_norm(rows))); rows are to be used instead of those given."""
        norm = self.attention_norm
        weight, bias = tensor_of(norm, "weight"), tensor_of(norm, "bias")
        normalized, rows = branch_layer_norm(rows, weight, bias, settled(norm.eps))
        return rows, self.attention(normalized)

    def _fuses_branch(self, y: Tensor) -> bool:
        """Whether kernels compute the norm: they cover it, and nobody hooked or replaced it."""
        norm, attention = child(self, "attention_norm"), child(self, "attention")
        fits = is_plain(norm, nn.LayerNorm) and not is_parametrized(norm)
        fits = fits and norm.normalized_shape == y.shape[1:2]
        if fits and not covers(y.permute(0, 2, 3, 1), norm.weight, norm.bias):
            return False
        reason = interception(attention, "attention")
        if not fits:
            reason = interception(norm, "attention_norm") or "attention_norm was replaced"
        elif not is_plain(child(self, "drop_path"), DropPath):
            reason = "drop_path was replaced"
        elif not reason and not isinstance(attention, reference.Attention):
            reason = f"attention was replaced by {type(attention).__name__}"
        if reason:
            warn_once(f"{type(self).__name__}: {reason}; its layer norm runs unfused")
        return not reason

    def _keeping_input(self, function: Callable[[Tensor], Result], y: Tensor) -> Result:
        """function(y); with recompute="block", only y is kept for the backward pass."""
        if self.recompute == "block" and y.requires_grad:
            return checkpoint(keep_backend(function), y, use_reentrant=False)
        return function(y)


_SELF_ATTENTION = FusedMOATBlock.self_attention
for _kind in (FusedMBConv, FusedMOATBlock, FusedAttention):
    remember_code(_kind)
