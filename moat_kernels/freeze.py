"""`freeze`: a model for inference on a CPU, its weights packed once."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moat_kernels.adapters.fused import FusedModule
from moat_kernels.models import MOAT, FusedStem, endpoints
from moat_kernels.modules import FusedInvertedBottleneck
from moat_kernels.ops.common.backends import warn_once
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.frozen import (
    DTYPES,
    CannotFreeze,
    FrozenSequence,
    FrozenStep,
    multiplies,
)

Module = TypeVar("Module", bound="FrozenModule")


def freeze(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `model` for inference on a CPU: the same outputs, up to rounding, in less time.

    Each MOAT inside, or `model` itself, becomes a FrozenMOAT, and fused blocks elsewhere become
    FrozenBlocks. Batch norms are folded into the weights and these laid out as the kernels read
    them, now instead of in every call, and a whole MOAT runs in one native call. The rest of the
    model is copied. The result shares nothing with `model`, which stays as it is: train that, load
    it, save it, and freeze again. Frozen parts have no parameters and an empty state_dict, stay in
    eval mode and in their dtype, give no gradients and cannot be pickled.

    dtype: float32, bfloat16 or float16, in which frozen parts keep what they compute from one layer
    to the next, and in which they multiply where the CPU can: in bfloat16 with AVX512_BF16, and
    everything else in float32. Sums, norms, GELU and softmax stay in float32. Inputs and outputs
    keep the dtype of `model`, which is also what None stands for.

    Blocks that cannot be frozen (hooked, replaced, on another device, of a dtype or a kind that the
    native kernels do not cover, `fuse`d ones of other packages) are copied, and a FallbackWarning
    tells why, as one does where the CPU multiplies in float32 only. Raises ValueError if `model` is
    in training mode or holds nothing that can be frozen, or for another dtype, and TypeError if
    `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in eval mode to be frozen: call model.eval() first")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be None or one of {DTYPES}, got {dtype!r}")
    frozen: dict[int, Any] = {}
    left: dict[str, list[str]] = {}
    _freeze_inside(model, "", dtype, frozen, left)
    reasons = [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
        for reason, paths in left.items()
    ]
    if not frozen:
        found = "; ".join(reasons) or "it has no MOAT or fused block of this package"
        raise ValueError(f"nothing in model can be frozen: {found}")
    for reason in reasons:
        warn_once(f"freeze: {reason}; left as it is")
    for maps in {dtype or part.sequence.dtype for part in frozen.values()}:
        if not multiplies(maps):
            warn_once(
                f"freeze: this CPU does not multiply {maps}, so frozen modules multiply in float32; "
                "dtype=torch.float32 takes less time and more memory"
            )
    return copy.deepcopy(model, frozen)


def _freeze_inside(
    module: nn.Module,
    path: str,
    dtype: torch.dtype | None,
    frozen: dict[int, Any],
    left: dict[str, list[str]],
) -> None:
    """Collect what replaces modules, by id, and by reason the paths of those left."""
    kind: Callable[[Any, torch.dtype | None], FrozenModule] | None = None
    if isinstance(module, MOAT):
        kind = FrozenMOAT
    elif isinstance(module, FusedStem | FusedInvertedBottleneck):
        kind = FrozenBlock
    if kind is not None:
        try:
            frozen[id(module)] = kind(module, dtype)
            return
        except CannotFreeze as obstacle:
            if kind is FrozenBlock:
                left.setdefault(str(obstacle), []).append(path or type(module).__name__)
                return
    elif isinstance(module, FusedModule):
        reason = "a fused module of another package"
        left.setdefault(reason, []).append(path or type(module).__name__)
        return
    for name, child in module.named_children():
        _freeze_inside(child, f"{path}.{name}" if path else name, dtype, frozen, left)


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
    """A FusedMBConv, FusedMOATBlock or stem as it was when frozen; see `freeze`."""

    def __init__(
        self, block: FusedInvertedBottleneck | FusedStem, maps: torch.dtype | None = None
    ) -> None:
        steps = block.frozen_steps(maps)
        super().__init__(steps)
        self._kept = [len(steps) - 1]
        self._keeps_format = not isinstance(block, FusedStem)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        (output,) = self.sequence.outputs(x, self._kept)
        return in_format_of(output, x) if self._keeps_format else output


class FrozenMOAT(FrozenModule):
    """A MOAT as it was when frozen; called like it, with the same results. See `freeze`."""

    def __init__(self, model: MOAT, maps: torch.dtype | None = None) -> None:
        stages, head = model.frozen_stages(maps), model.frozen_head(maps)
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
