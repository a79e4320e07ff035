"""`freeze`: a model for inference on a CPU, its weights packed once."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moat_kernels.adapters import timm, torchvision, vit_pytorch
from moat_kernels.adapters.base import Adapter, MBConvAdapter
from moat_kernels.adapters.freezing import AttentionHalf, HalfReader, bottleneck_step
from moat_kernels.adapters.fused import FusedModule, is_changed, stock_class
from moat_kernels.adapters.reading import NotCovered, child_names, refuse_hooks
from moat_kernels.adapters.registry import find_adapter
from moat_kernels.inspection import interception
from moat_kernels.models import MOAT, FusedStem, endpoints
from moat_kernels.modules import FusedInvertedBottleneck
from moat_kernels.ops.common.backends import warn_once
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.frozen import CannotFreeze, FrozenSequence, FrozenStep

Module = TypeVar("Module", bound="FrozenModule")

_HALVES: tuple[HalfReader, ...] = (*timm.HALVES, *torchvision.HALVES, *vit_pytorch.HALVES)
# Of the largest value: rounding of a block, tried out by weights and an input that are given.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def freeze(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference on a CPU: the same outputs, up to rounding, in less time.

    Each MOAT inside, or `model` itself, becomes a FrozenMOAT, fused blocks elsewhere become
    FrozenBlocks, and transformer blocks whose attention `fuse` found FrozenTransformerBlocks. Batch
    norms are folded into the weights and these laid out as the kernels read them, now instead of in
    every call, and a whole MOAT runs in one native call. The rest of the model is copied. The
    result shares nothing with `model`, which stays as it is: train that, load it, save it, and
    freeze again. Frozen parts have no parameters and an empty state_dict, stay in eval mode and in
    their dtype, give no gradients and cannot be pickled.

    Blocks that cannot be frozen (hooked, replaced, on another device, of a dtype or a kind that the
    native kernels do not cover) are copied, and a FallbackWarning tells why. Raises ValueError if
    `model` is in training mode or holds nothing that can be frozen, TypeError if it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in eval mode to be frozen: call model.eval() first")
    frozen: dict[int, Any] = {}
    left: dict[str, list[str]] = {}
    _freeze_inside(model, "", frozen, left)
    reasons = [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
        for reason, paths in left.items()
    ]
    if not frozen:
        found = "; ".join(reasons) or "it has no MOAT or fused block"
        raise ValueError(f"nothing in model can be frozen: {found}")
    for reason in reasons:
        warn_once(f"freeze: {reason}; left as it is")
    for form in list(frozen.values()):
        if isinstance(form, FrozenTransformerBlock):
            form.copy_branch(frozen)
    return copy.deepcopy(model, frozen)


def _freeze_inside(
    module: nn.Module, path: str, frozen: dict[int, Any], left: dict[str, list[str]]
) -> None:
    """Collect what replaces modules, by id, and by reason the paths of those left."""
    try:
        form = _frozen_form(module)
    except (CannotFreeze, NotCovered) as obstacle:
        if not isinstance(module, MOAT):
            left.setdefault(str(obstacle), []).append(path or type(module).__name__)
            return
        form = None
    if form is not None:
        frozen[id(module)] = form
        return
    for name, child in module.named_children():
        _freeze_inside(child, f"{path}.{name}" if path else name, frozen, left)


def _frozen_form(module: nn.Module) -> nn.Module | None:
    """What takes the place of a module; None if only what is inside may be frozen.

    Raises CannotFreeze or NotCovered.
    """
    if isinstance(module, MOAT):
        return FrozenMOAT(module)
    if isinstance(module, FusedStem | FusedInvertedBottleneck):
        return FrozenBlock(module.frozen_steps(), not isinstance(module, FusedStem))
    for reader in _HALVES:
        if (attention := _fused_attention(reader, module)) is not None:
            return _frozen_transformer_block(reader, module, attention)
    if isinstance(module, FusedModule):
        return FrozenBlock([_fused_step(module)])
    return None


def _fused_attention(reader: HalfReader, module: nn.Module) -> FusedModule | None:
    """The attention that `fuse` found, if a module is a block that the reader is for."""
    if stock_class(module).__name__ != reader.class_name:
        return None
    attention = getattr(module, reader.attention, None) if reader.attention else module
    if isinstance(attention, FusedModule) and attention.adapter_key == reader.adapter_key:
        return attention
    return None


def _checked_adapter(module: FusedModule) -> Adapter:
    """The adapter of a module, if that runs as it was fused. Raises CannotFreeze or NotCovered."""
    if is_changed(module):
        raise CannotFreeze(f"it became a {type(module).__name__} after it was fused")
    if reason := interception(module, "it"):
        raise CannotFreeze(reason)
    adapter = find_adapter(module.adapter_key)
    adapter.check_structure(module)
    return adapter


def _fused_step(module: FusedModule) -> FrozenStep:
    adapter = _checked_adapter(module)
    if not isinstance(adapter, MBConvAdapter):
        raise CannotFreeze("an attention without a block around it that is known")
    return bottleneck_step(adapter.read(module))


def _frozen_transformer_block(
    reader: HalfReader, block: nn.Module, attention: FusedModule
) -> FrozenTransformerBlock:
    _checked_adapter(attention)
    if reason := interception(block, "it"):
        raise CannotFreeze(reason)
    if unknown := child_names(block).symmetric_difference(reader.children):
        raise NotCovered(f"unknown or missing {', '.join(sorted(unknown))}")
    refuse_hooks(list(block.modules())[1:])
    half = reader.read(block)
    form = FrozenTransformerBlock(half, block)
    _try_out(form, block, half.example(reader.leading))
    return form


@torch.no_grad()
def _try_out(form: nn.Module, block: nn.Module, x: Tensor) -> None:
    """Raise CannotFreeze unless both give the same: names may be those of changed code."""
    try:
        actual, expected = form(x).double(), block(x).double()
    except Exception as error:
        raise CannotFreeze(f"trying it out failed: {error}") from error
    if actual.shape != expected.shape or not torch.allclose(
        actual, expected, rtol=0.0, atol=_TOLERANCE[x.dtype] * float(expected.abs().max())
    ):
        raise CannotFreeze(
            "its results differ from those of the code that its names are known from"
        )


class FrozenModule(nn.Module):
    """What frozen modules share: steps with packed weights, and nothing that could change."""

    def __init__(self, steps: list[FrozenStep]) -> None:
        super().__init__()
        self.sequence = FrozenSequence(steps)
        self.training = False

    def train(self: Module, mode: bool = True) -> Module:
        """Stays in eval mode, also inside a model that is trained."""
        return self

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        like = torch.empty(0, dtype=self.sequence.dtype)
        moved = fn(like)
        if moved.dtype != like.dtype or moved.device != like.device:
            raise RuntimeError(
                f"a frozen module stays on the CPU in {like.dtype}, got {moved.dtype} on "
                f"{moved.device}: convert the model that was frozen, and freeze it again"
            )
        return self

    def extra_repr(self) -> str:
        return f"{self.sequence.dtype}, {self.sequence.bytes / 2**20:.1f} MiB packed"


class FrozenBlock(FrozenModule):
    """A fused block or stem as it was when frozen; see `freeze`.

    keeps_format: whether results have the memory format of x, or else are in channels_last.
    """

    def __init__(self, steps: list[FrozenStep], keeps_format: bool = True) -> None:
        super().__init__(steps)
        self._kept = [len(steps) - 1]
        self._keeps_format = keeps_format

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        (output,) = self.sequence.outputs(x, self._kept)
        return in_format_of(output, x) if self._keeps_format else output


class FrozenTransformerBlock(nn.Module):
    """Somebody's transformer block whose attention half is frozen; see `freeze`.

    What follows that half are the block's own modules, under their names.
    """

    def __init__(self, half: AttentionHalf, block: nn.Module) -> None:
        super().__init__()
        self.attention_half = FrozenBlock([half.step()], keeps_format=False)
        self._rows, self._branch, self._branch_rows = half.rows, half.branch, half.branch_rows
        for name in half.branch:
            self.add_module(name, getattr(block, name))
        self.training = block.training

    def copy_branch(self, copies: dict[int, Any]) -> None:
        """Share nothing with the block any more. copies: of other modules, by id."""
        for name in self._branch:
            self.add_module(name, copy.deepcopy(getattr(self, name), copies))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_half(self._as_maps(x))
        if self._branch:
            y = y.permute(0, 2, 3, 1) if self._branch_rows else y
            branch = y
            for name in self._branch:
                branch = getattr(self, name)(branch)
            y = y + branch
            y = y.permute(0, 3, 1, 2) if self._branch_rows else y
        return y.permute(0, 2, 3, 1).reshape(x.shape) if self._rows else in_format_of(y, x)

    def _as_maps(self, x: Tensor) -> Tensor:
        if not self._rows or not isinstance(x, Tensor):
            return x
        if x.dim() < 4:
            raise ValueError(f"x must be [B, H, W, C], got {tuple(x.shape)}")
        return x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2)


class FrozenMOAT(FrozenModule):
    """A MOAT as it was when frozen; called like it, with the same results. See `freeze`."""

    def __init__(self, model: MOAT) -> None:
        stages, head = model.frozen_stages(), model.frozen_head()
        super().__init__([step for stage in stages for step in stage] + head)
        self.features_only = model.features_only
        self.num_features = model.num_features
        self.num_classes = None if model.features_only else model.num_classes
        # The steps that the stem and the stages end with, and the last of all.
        self._ends = [end - 1 for end in accumulate(map(len, stages))]
        self._last = [self._ends[-1] + len(head)]
        self._features = FrozenSequence([step for stage in stages for step in stage])
        self._head = FrozenSequence(head) if head else None

    @torch.compiler.disable
    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """As MOAT.forward_stages: the raw outputs of the stem and the four stages."""
        return self._features.outputs(x, self._ends)

    @torch.compiler.disable
    def forward_features(self, x: Tensor) -> Tensor:
        """As MOAT.forward_features: the last stage's raw map."""
        return self._features.outputs(x, self._ends[-1:])[0]

    @torch.compiler.disable
    def forward_head(self, x: Tensor) -> Tensor:
        """As MOAT.forward_head: pooled, normalised and classified."""
        if self._head is None:
            raise RuntimeError("the frozen model has no head: it was made with features_only")
        return self._head.outputs(x, [0])[0]

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor | OrderedDict[str, Tensor]:
        if self.features_only:
            return endpoints(self.forward_stages(x), x.is_contiguous())
        return self.sequence.outputs(x, self._last)[0]
