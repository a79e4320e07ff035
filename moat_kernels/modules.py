"""Fused MOAT blocks: the reference's parameters, state_dict and numbers; less time and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moat_kernels import reference
from moat_kernels.inspection import difference, interception, obstacle, runs_as_its_class
from moat_kernels.linear import apply_linear
from moat_kernels.ops.attention_half import api as attention_half
from moat_kernels.ops.common.backends import NO_TORCHSCRIPT, keep_backend, warn_once
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.frozen import (
    CannotFreeze,
    FrozenStep,
    attention_half_step,
    mbconv_step,
)
from moat_kernels.ops.layer_norm import add_branch, branch_layer_norm, covers
from moat_kernels.ops.mbconv import mbconv
from moat_kernels.ops.mbconv.checks import RECOMPUTE_LEVELS
from moat_kernels.ops.mbconv.dispatch import resolve_frozen
from moat_kernels.ops.window_attention import window_attention
from moat_kernels.tensor_access import tensor_of

Result = TypeVar("Result")


def check_is_plain(
    module: nn.Module, classes: tuple[type[nn.Module], ...], children: tuple[str, ...]
) -> None:
    """Raise CannotFreeze unless the module is as it was made, and so are these of its children."""
    if reason := difference(module, classes, children):
        raise CannotFreeze(reason)


def refuse_scripting(module: nn.Module) -> NoReturn:
    """torch.jit.script asks each module for what to script instead of it."""
    raise RuntimeError(f"{type(module).__name__}: {NO_TORCHSCRIPT}")


class FusedInvertedBottleneck(reference.MBConvBlock):
    """What both fused blocks share: the convolutional half through `functional.mbconv`."""

    _fused_children = (
        "pre_norm",
        "expand_conv",
        "expand_norm",
        "depthwise_conv",
        "depthwise_norm",
        "se",
        "shrink_conv",
        "shortcut_conv",
        "drop_path",
    )
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self, in_channels: int, out_channels: int, *, recompute: str = "auto", **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, **options)
        if recompute not in RECOMPUTE_LEVELS:
            raise ValueError(f"recompute must be one of {RECOMPUTE_LEVELS}, got {recompute!r}")
        self.recompute = recompute

    def inverted_bottleneck(self, x: Tensor) -> Tensor:
        reason = obstacle(self, self._fused_children)
        if reason:
            warn_once(f"{type(self).__name__}: {reason}; running unfused")
            return super().inverted_bottleneck(x)
        return mbconv(
            x,
            self.tensors(),
            self.description(),
            training=True,  # which norms measure the batch is told by their own training flags
            recompute=self.recompute,
            drop_path_scale=self.drop_path.scale(x),
        )

    def frozen_steps(self) -> list[FrozenStep]:
        """What inference computes, its weights packed as they are now. Raises CannotFreeze."""
        check_is_plain(self, (FusedMBConv, FusedMOATBlock), self._fused_children)
        if self._drops():
            raise CannotFreeze("its drop path drops")
        tensors = self.tensors()
        return [mbconv_step(tensors, resolve_frozen(self.description(), tensors, training=True))]

    def _drops(self) -> bool:
        return self.drop_path.training and self.drop_path.probability > 0

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

    Raises ValueError naming an argument that is not supported. A block whose inner modules were
    hooked or replaced runs unfused, with a FallbackWarning.
    """


class FusedAttention(reference.Attention):
    """`reference.Attention` through `functional.window_attention`, its linear layers natively.

    [B, H, W, C] -> [B, H, W, C]. The same arguments.
    """

    __prepare_scriptable__ = refuse_scripting

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(self.proj, self.attend(apply_linear(self.qkv, x)))

    def attend(self, qkv: Tensor) -> Tensor:
        table = self.bias_table(qkv.shape[1], qkv.shape[2])
        return window_attention(qkv, table, self.description)


def _is_called_for_its_result_only(attention: nn.Module) -> bool:
    """Whether it is FusedAttention as it was made, so that its tensors say what it computes."""
    return (
        type(attention) is FusedAttention
        and runs_as_its_class(attention)
        and not obstacle(attention, ("qkv", "proj"))
    )


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

    def frozen_steps(self) -> list[FrozenStep]:
        steps = super().frozen_steps()
        if not self._is_one_pass():
            raise CannotFreeze("its attention is hooked or was replaced")
        norm, attention = self.attention_norm, self.attention
        half = attention_half_step(self._attention_tensors(), norm.eps, attention.description)
        return [*steps, half]

    def attention_half(self, y: Tensor) -> Tensor:
        if not self._drops() and self._is_one_pass():
            tensors, description = self._attention_tensors(), self.attention.description
            if attention_half.covers(y, tensors, description):
                eps = self.attention_norm.eps
                output = attention_half.attention_half(y, tensors, eps, description)
                return in_format_of(output, y)
        if self._fuses_branch(y):
            rows, branch = self._keeping_input(self._branch, y.permute(0, 2, 3, 1))
            return add_branch(rows, branch, self.drop_path.scale(branch)).permute(0, 3, 1, 2)
        return super().attention_half(y)

    def self_attention(self, y: Tensor) -> Tensor:
        return self._keeping_input(super().self_attention, y)

    def _is_one_pass(self) -> bool:
        """Whether tensors alone say what this half computes, so that one op may."""
        return not obstacle(
            self, ("attention_norm", "drop_path")
        ) and _is_called_for_its_result_only(self.attention)

    def _attention_tensors(self) -> list[Tensor | None]:
        """As `attention_half` takes them."""
        modules = self.attention._modules
        tensors = [
            tensor_of(module, part)
            for module in (self.attention_norm, modules["qkv"], modules["proj"])
            for part in ("weight", "bias")
        ]
        return [*tensors, tensor_of(self.attention, "relative_position_embedding")]

    def _branch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, attention(layer_norm(rows))); rows are to be used instead of those given."""
        norm = self.attention_norm
        weight, bias = tensor_of(norm, "weight"), tensor_of(norm, "bias")
        normalized, rows = branch_layer_norm(rows, weight, bias, norm.eps)
        return rows, self.attention(normalized)

    def _fuses_branch(self, y: Tensor) -> bool:
        """Whether kernels compute the norm: they cover it, and nobody hooked or replaced it."""
        norm = self.attention_norm
        if not covers(y.permute(0, 2, 3, 1), norm.weight, norm.bias):
            return False
        reason = obstacle(self, ("attention_norm", "drop_path"))
        attention = self.attention
        if not reason:
            reason = interception(attention, "attention")
        if not reason and not isinstance(attention, reference.Attention):
            reason = f"attention was replaced by {type(attention).__name__}"
        if reason:
            warn_once(f"{type(self).__name__}: {reason}; its layer norm runs unfused")
        return not reason

    def _keeping_input(self, function: Callable[[Tensor], Result], y: Tensor) -> Result:
        """function(y); with recompute="block", only y is kept for the backward pass."""
        if self.recompute == "block" and y.requires_grad:
            return checkpoint(keep_backend(function), y, use_reentrant=False)
        return function(y)
