"""The MOAT family: MOAT-0..4 and tiny-MOAT-0..3, as classifiers or as backbones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moat_kernels.adapters.freezing import check_normalized_shape
from moat_kernels.adapters.reading import NotCovered, read_norm
from moat_kernels.inspection import (
    interception,
    interceptions,
    is_plain,
    is_plain_tensor,
    remember_code,
)
from moat_kernels.modules import (
    FusedInvertedBottleneck,
    FusedMBConv,
    FusedMOATBlock,
    check_runs_as_made,
)
from moat_kernels.normalization import BatchNorm2d, norm_tensors
from moat_kernels.ops.common.backends import warn_once
from moat_kernels.ops.common.batch_norm import Norm, NormParameters
from moat_kernels.ops.common.checks import (
    check_devices,
    check_positive_integer,
    check_positive_integers,
)
from moat_kernels.ops.frozen import (
    CannotFreeze,
    FrozenStep,
    Quantizations,
    head_step,
    stem_step,
)
from moat_kernels.ops.stem import api as stem
from moat_kernels.reference import MBConvBlock, MOATBlock, SameConv2d, initialize
from moat_kernels.tensor_access import child, is_parametrized, tensor_of
from moat_kernels.tracing import is_traced, record_call
from moat_kernels.variants import get_preprocessing, get_variant, list_models

__all__ = ["MOAT", "create_model", "get_preprocessing", "list_models"]

STAGES = 4
ATTENTION_STAGES = (2, 3)  # the last two stages are MOAT blocks, the first two MBConv blocks
POSITION_SIZES = {
    2: 14,
    3: 7,
}  # of the bias tables, whatever the resolution: 224 px at stride 16, 32
HEAD_DIM = 32

Window = int | tuple[int, int] | None


class Stem(nn.Module):
    """3x3 stride 2, BN, GELU, 3x3: [B, 3, H, W] -> [B, width, ceil(H/2), ceil(W/2)].

    The second convolution is neither normalised nor activated.
    """

    def __init__(self, width: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv_0 = SameConv2d(in_channels, width, 3, 2)
        self.norm_0 = BatchNorm2d(width)
        self.conv_1 = SameConv2d(width, width, 3)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_1(F.gelu(self.norm_0(self.conv_0(x))))


@remember_code
class FusedStem(Stem):
    """`Stem` by native kernels where they cover the call; the output is in channels_last.

    Eval is one pass. In training batch norm and GELU are one op, and two maps of `width` channels
    are kept for the backward pass (stock: three); with `recompute` one, and GELU is computed again.
    """

    def __init__(self, width: int, in_channels: int = 3, *, recompute: bool = False) -> None:
        super().__init__(width, in_channels)
        self.recompute = recompute

    def frozen_steps(
        self, maps: torch.dtype | None = None, quantizations: Sequence[Quantizations] = ()
    ) -> list[FrozenStep]:
        """What inference computes, its weights packed as they are now. Raises CannotFreeze.

        maps: the dtype of the output and of products; None: that of the weights. A stem has no
            products in int8.
        """
        check_runs_as_made(self, (FusedStem,))
        try:
            first, norm, tensors, second = self.read()
        except NotCovered as obstacle:
            raise CannotFreeze(str(obstacle)) from obstacle
        if not norm.frozen:
            raise CannotFreeze("a norm that measures the batch")
        return [stem_step(first, tensors, norm.eps, second, maps)]

    def read(self) -> tuple[list[Tensor | None], Norm, NormParameters, list[Tensor | None]]:
        """Weight and bias of the first convolution, the norm, those of the second. Or NotCovered.

        Raised before any tensor is read.
        """
        if reason := interceptions(self, ("conv_0", "norm_0", "conv_1")):
            raise NotCovered(reason)
        convolutions = (child(self, "conv_0"), child(self, "conv_1"))
        for conv, stride in zip(convolutions, ((2, 2), (1, 1)), strict=True):
            if not is_plain(conv, SameConv2d):
                raise NotCovered(f"{type(conv).__name__} in place of a convolution")
            if (conv.stride, conv.dilation, conv.groups) != (stride, (1, 1), 1):
                raise NotCovered("other strides, dilation or groups")
            if conv.padding_mode != "zeros":
                raise NotCovered(f"padding_mode {conv.padding_mode!r}")
        norm = child(self, "norm_0")
        reading = read_norm(norm)
        if reading.norm is None or reading.activation != "identity":
            raise NotCovered(f"{type(norm).__name__} in place of a batch norm")
        first, second = (
            [tensor_of(conv, part) for part in ("weight", "bias")] for conv in convolutions
        )
        tensors = norm_tensors(norm)
        if not all(map(is_plain_tensor, (*first, *tensors, *second))):
            raise NotCovered("a subclass among its tensors")
        return first, reading.norm, tensors, second

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x):
            return record_call(self, x)
        try:
            if is_parametrized(self.conv_0) or is_parametrized(self.conv_1):
                # What computes the weights must do so once in a call.
                raise NotCovered("parametrized weights")
            first, norm, tensors, second = self.read()
        except NotCovered as obstacle:
            warn_once(f"{type(self).__name__}: {obstacle}; running unfused")
        else:
            if norm.frozen and stem.covers(x, first, tensors, second):
                return stem.stem(x, first, tensors, norm.eps, second)
            if stem.covers_training(x, first, norm, tensors, second):
                z = self.conv_0(x.contiguous(memory_format=torch.channels_last))
                return stem.norm_gelu_conv(z, norm, tensors, second, self.recompute)
            names = ("conv_0.weight", "conv_0.bias", "conv_1.weight", "conv_1.bias")
            check_devices("stem", x, dict(zip(names, (*first, *second), strict=True)))
        # The blocks that follow would each convert to channels_last and back.
        return super().forward(x.contiguous(memory_format=torch.channels_last))


@remember_code
class MOAT(nn.Module):
    """MOAT (arXiv 2210.01820): stem, two MBConv stages, two MOAT stages, optional classifier.

    [B, 3, H, W] -> logits [B, num_classes]; with `features_only` an ordered dict of the ten
    official endpoints: "stage1" (stem) .. "stage5", raw, and "res1" .. "res5", each its GELU, at
    strides 2, 4, 8, 16, 32. `create_model` explains the arguments.
    """

    def __init__(
        self,
        stem_width: int,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        features_only: bool = False,
        window_size: Sequence[Window] | None = None,
        global_attention_at_end: bool = False,
        pool_size: int = 2,
        position_embedding: bool = True,
        drop_path_rate: float = 0.0,
        fused: bool = True,
        recompute: str = "auto",
    ) -> None:
        super().__init__()
        check_positive_integers(stem_width=stem_width, pool_size=pool_size)
        _check_per_stage("widths", widths)
        _check_per_stage("depths", depths)
        windows = _windows_per_stage(window_size)
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be within [0, 1), got {drop_path_rate!r}")
        self.fused = fused
        self.features_only = features_only
        self.num_features = widths[-1]
        recomputes = recompute in ("expand", "block")
        self.stem = FusedStem(stem_width, recompute=recomputes) if fused else Stem(stem_width)
        self.stages = nn.ModuleList()
        # Block i of n survives with 1 - rate * i / n: the first always, the last never quite at
        # the full rate (official code divides by n, not n - 1).
        blocks, index, channels = sum(depths), 0, stem_width
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            stage_blocks = nn.ModuleList()
            for position in range(depth):
                options: dict[str, Any] = {
                    "stride": 2 if position == 0 else 1,
                    "pool_size": pool_size,
                    "drop_path": drop_path_rate * index / blocks,
                }
                if fused:
                    options["recompute"] = recompute
                if stage in ATTENTION_STAGES:
                    whole_map = global_attention_at_end and position == depth - 1
                    options["window_size"] = None if whole_map else windows[stage]
                    options["position_size"] = POSITION_SIZES[stage] if position_embedding else None
                    options["head_dim"] = HEAD_DIM
                stage_blocks.append(_block_class(stage, fused)(channels, width, **options))
                channels, index = width, index + 1
            self.stages.append(stage_blocks)
        self.final_layer_norm: nn.LayerNorm | None = None
        self.logits_head: nn.Linear | None = None
        if not features_only:
            self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one; 0 removes it, and pooled features come out."""
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes must be an integer >= 0, got {num_classes!r}")
        if self.features_only:
            raise ValueError("num_classes does not apply: the model was made with features_only")
        like = self.stem.conv_0.weight
        if self.final_layer_norm is None:
            self.final_layer_norm = nn.LayerNorm(
                self.num_features, eps=1e-5, device=like.device, dtype=like.dtype
            )
        self.num_classes = num_classes
        self.logits_head = None
        if num_classes:
            self.logits_head = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            )
            initialize(self.logits_head)

    def get_classifier(self) -> nn.Linear | None:
        """The classifier, if there is one."""
        return self.logits_head

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The raw outputs of the stem and the four stages, at strides 2, 4, 8, 16, 32.

        With fused blocks they are in channels_last, whatever x is.
        """
        if not is_traced(x) and (not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != 3):
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be [B, 3, H, W], got {found}")
        outputs = [self.stem(x)]
        for stage in self.stages:
            x = outputs[-1]
            for block in stage if isinstance(stage, nn.ModuleList) else (stage,):
                x = block(x)
            outputs.append(x)
        return outputs

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's raw map [B, C, ceil(H/32), ceil(W/32)]."""
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor) -> Tensor:
        """Pooled, normalised and classified: [B, C, H, W] -> [B, num_classes] (or [B, C])."""
        assert self.final_layer_norm is not None
        x = self.final_layer_norm(x.mean((2, 3)))
        return x if self.logits_head is None else self.logits_head(x)

    def forward(self, x: Tensor) -> Tensor | OrderedDict[str, Tensor]:
        if not self.features_only:
            return self.forward_head(self.forward_features(x))
        return endpoints(self.forward_stages(x), not is_traced(x) and x.is_contiguous())

    def frozen_stages(
        self,
        maps: torch.dtype | None = None,
        quantizations: Callable[[nn.Module], Sequence[Quantizations]] = lambda _: (),
    ) -> list[list[FrozenStep]]:
        """What inference computes in the stem and each stage, its weights packed as they are now.

        maps: the dtype of the maps and of products; None: that of the weights.
        quantizations: of the steps of a block, if they are to multiply in int8.
        Raises CannotFreeze.
        """
        check_runs_as_made(self, (MOAT,))
        steps: list[list[FrozenStep]] = []
        for stage in (self.stem, *self.stages):
            steps.append([])
            for block in _blocks_of(stage):
                if not isinstance(block, FusedStem | FusedInvertedBottleneck):
                    raise CannotFreeze(f"a {type(block).__name__} among its blocks")
                steps[-1] += block.frozen_steps(maps, quantizations(block))
        return steps

    def frozen_head(self, maps: torch.dtype | None = None) -> list[FrozenStep]:
        """The same of the classifier; no step for a backbone. Raises CannotFreeze."""
        norm, linear = self.final_layer_norm, self.logits_head
        if norm is None:
            return []
        if not is_plain(norm, nn.LayerNorm) or (linear and not is_plain(linear, nn.Linear)):
            raise CannotFreeze("its classifier is hooked or was replaced")
        check_normalized_shape(norm, self.num_features)
        tensors = [
            tensor_of(module, part) for module in (norm, linear) for part in ("weight", "bias")
        ]
        return [head_step(tensors, norm.eps, maps)]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone.

        Norms, biases and position bias tables, as is usual for this family.
        """
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.dim() <= 1 or name.endswith("relative_position_embedding")
        }

    def parameter_groups(
        self, *, lr: float, weight_decay: float = 0.0, layer_decay: float = 1.0
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser: one per depth and kind of decay, each with its learning rate.

        layer_decay: factor of the learning rate per depth from the head down: head 1, stage 5's
            blocks `layer_decay`, ..., the stem `layer_decay ** 5`.

        Raises ValueError for a layer_decay outside of (0, 1].
        """
        if not 0.0 < layer_decay <= 1.0:
            raise ValueError(f"layer_decay must be within (0, 1], got {layer_decay!r}")
        undecayed = self.no_weight_decay()
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            depth, decays = self._depth(name), name not in undecayed
            group = groups.setdefault(
                (depth, decays),
                {
                    "params": [],
                    "names": [],
                    "lr": lr * layer_decay ** (STAGES + 1 - depth),
                    "weight_decay": weight_decay if decays else 0.0,
                },
            )
            group["params"].append(parameter)
            group["names"].append(name)
        return [groups[key] for key in sorted(groups)]

    def _depth(self, name: str) -> int:
        """0 for the stem, 1..4 for the stages, 5 for the head."""
        parts = name.split(".")
        if parts[0] == "stem":
            return 0
        return int(parts[1]) + 1 if parts[0] == "stages" else STAGES + 1


def _blocks_of(stage: nn.Module) -> list[nn.Module]:
    """What runs, one after the other, in a stage; itself if it is none. Raises CannotFreeze."""
    if type(stage) is nn.Sequential and (reason := interception(stage, "a stage")):
        raise CannotFreeze(reason)
    if type(stage) in (nn.Sequential, nn.ModuleList):
        return list(stage)  # type: ignore[call-overload]
    return [stage]


def endpoints(outputs: Sequence[Tensor], contiguous: bool) -> OrderedDict[str, Tensor]:
    """The ten official endpoints: raw outputs of the stem and the stages, and each one's GELU."""
    named: OrderedDict[str, Tensor] = OrderedDict()
    for number, output in enumerate(outputs, start=1):
        output = output.contiguous() if contiguous else output
        named[f"stage{number}"] = output
        named[f"res{number}"] = F.gelu(output)
    return named


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    features_only: bool = False,
    window_size: Sequence[Window] | None = None,
    global_attention_at_end: bool = False,
    pool_size: int = 2,
    position_embedding: bool = True,
    drop_path_rate: float | None = None,
    fused: bool = True,
    recompute: str = "auto",
    checkpoint: str | Path | None = None,
    stem_width: int | None = None,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
) -> MOAT:
    """A MOAT by name: "moat_0" .. "moat_4", "tiny_moat_0" .. "tiny_moat_3".

    num_classes: outputs of the classifier; 0: normalised pooled features.
    features_only: return the ten official endpoints instead; there is no head.
    window_size: one entry per stage, None (the whole map), an integer or (height, width) in
        tokens; the first two stages have no attention, their entries must be None.
    global_attention_at_end: the last block of each MOAT stage attends to the whole map.
    pool_size: kernel of the shortcuts' pool, 2 (classification) or 3 (downstream tasks).
    position_embedding: whether attention has relative position bias.
    drop_path_rate: 1 minus the official survival probability; None: the variant's own.
    fused: fused blocks, or the plain PyTorch reference; the state_dict is the same.
    recompute: what the backward pass of fused blocks recomputes, see FusedMBConv; with "expand" and
        "block" also the stem's GELU.
    checkpoint: path of a .safetensors file, a PyTorch state_dict or an official TensorFlow
        checkpoint to load; see `moat_kernels.checkpoints.load_checkpoint`.
    stem_width, widths, depths: override the variant's own; four entries each for the last two.

    >>> model = create_model("tiny_moat_0", num_classes=10)
    >>> model(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])

    Raises ValueError naming the argument, and CheckpointError for a checkpoint that cannot be read
    or does not fit.
    """
    variant = get_variant(name)
    model = MOAT(
        variant.stem_width if stem_width is None else stem_width,
        variant.widths if widths is None else widths,
        variant.depths if depths is None else depths,
        num_classes=num_classes,
        features_only=features_only,
        window_size=window_size,
        global_attention_at_end=global_attention_at_end,
        pool_size=pool_size,
        position_embedding=position_embedding,
        drop_path_rate=variant.drop_path_rate if drop_path_rate is None else drop_path_rate,
        fused=fused,
        recompute=recompute,
    )
    if checkpoint is not None:
        from moat_kernels.checkpoints import load_checkpoint

        load_checkpoint(model, checkpoint)
    return model


def _block_class(stage: int, fused: bool) -> type[MBConvBlock]:
    if stage in ATTENTION_STAGES:
        return FusedMOATBlock if fused else MOATBlock
    return FusedMBConv if fused else MBConvBlock


def _check_per_stage(argument: str, values: Sequence[int]) -> None:
    if len(values) != STAGES:
        raise ValueError(f"{argument} must have {STAGES} entries, got {values!r}")
    for value in values:
        check_positive_integer(argument, value)


def _windows_per_stage(window_size: Sequence[Window] | None) -> Sequence[Window]:
    if window_size is None:
        return (None,) * STAGES
    if isinstance(window_size, int) or len(window_size) != STAGES:
        raise ValueError(
            f"window_size must be None or have one entry per stage ({STAGES}), got {window_size!r}"
        )
    for stage, window in enumerate(window_size):
        if window is not None and stage not in ATTENTION_STAGES:
            raise ValueError(
                f"window_size[{stage}] must be None, got {window!r}: stages 0 and 1 are MBConv "
                "blocks without attention"
            )
    return window_size
