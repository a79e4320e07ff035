"""The MOAT family: MOAT-0..4 and tiny-MOAT-0..3, as classifiers or as backbones."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moat_kernels.adapters.freezing import check_normalized_shape
from moat_kernels.backbone import STAGES, Backbone, Window, endpoints, feature_maps
from moat_kernels.checkpoints import CheckpointError
from moat_kernels.checkpoints.architecture import options_of
from moat_kernels.checkpoints.loading import load_checkpoint, load_converted, read_checkpoint
from moat_kernels.configuration import PREPROCESSING_KEY
from moat_kernels.inspection import is_plain, remember_code
from moat_kernels.ops.frozen import CannotFreeze, FrozenStep, head_step
from moat_kernels.preprocessing import Preprocessing, known_preprocessing_of
from moat_kernels.reference import initialize
from moat_kernels.tensor_access import tensor_of
from moat_kernels.tracing import is_traced
from moat_kernels.variants import (
    VARIANTS,
    Variant,
    find_variant,
    get_preprocessing,
    get_pretrained_cfg,
    get_variant,
    list_models,
)

__all__ = ["MOAT", "create_model", "get_preprocessing", "list_models"]


@remember_code
class MOAT(Backbone):
    """MOAT (arXiv 2210.01820): stem, two MBConv stages, two MOAT stages, optional classifier.

    [B, in_chans, H, W] -> logits [B, num_classes]. With `features_only` the maps of `out_indices`,
    each the official endpoint "res", in a list; without `out_indices` an ordered dict of the ten
    official endpoints: "stage1" (stem) .. "stage5", raw, and "res1" .. "res5", each its GELU, at
    strides 2, 4, 8, 16, 32. `create_model` explains the arguments.

    pretrained_cfg: how images are prepared, as timm has it; empty if only `create_model` knows.
    """

    def __init__(
        self,
        stem_width: int,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        if out_indices is not None and not features_only:
            raise ValueError(f"out_indices={out_indices!r} needs features_only=True")
        super().__init__(stem_width, widths, depths, out_indices=out_indices, **options)
        self.features_only = features_only
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        self.num_classes = 0
        self.pretrained_cfg: dict[str, Any] = {}
        self.default_cfg = self.pretrained_cfg  # its older name
        self.final_layer_norm: nn.LayerNorm | None = None
        self.logits_head: nn.Linear | None = None
        if not features_only:
            self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; 0 removes it, and pooled features come out.

        global_pool: "avg" or None, for timm's signature; there is no other pool.
        """
        check_global_pool(global_pool)
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes must be an integer >= 0, got {num_classes!r}")
        if self.features_only:
            raise ValueError("num_classes does not apply: the model was made with features_only")
        like = self.stem.conv_0.weight
        if self.final_layer_norm is None:
            self.final_layer_norm = nn.LayerNorm(
                self.num_features,
                eps=self.configuration["layer_norm_eps"],
                device=like.device,
                dtype=like.dtype,
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

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled, normalised and classified: [B, C, H, W] -> [B, num_classes] (or [B, C]).

        pre_logits: do not classify.
        """
        if self.features_only:
            raise RuntimeError("the model has no head: it was made with features_only")
        x = x.mean((2, 3))
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        return x if pre_logits or self.logits_head is None else self.logits_head(x)

    def forward(self, x: Tensor) -> Tensor | list[Tensor] | OrderedDict[str, Tensor]:
        if not self.features_only:
            return self.forward_head(self.forward_features(x))
        outputs, contiguous = self.forward_stages(x), not is_traced(x) and x.is_contiguous()
        if self.out_indices is None:
            return endpoints(outputs, contiguous)
        return feature_maps(outputs, self.out_indices, contiguous)

    def steps_of_head(self, maps: torch.dtype | None = None) -> list[FrozenStep]:
        """What inference computes in the classifier, if there is one. Raises CannotFreeze."""
        norm, linear = self.final_layer_norm, self.logits_head
        if self.features_only:
            return []
        if norm is None:
            raise CannotFreeze("its final norm was pruned")
        if not is_plain(norm, nn.LayerNorm) or (linear and not is_plain(linear, nn.Linear)):
            raise CannotFreeze("its classifier is hooked or was replaced")
        check_normalized_shape(norm, self.num_features)
        tensors = [
            tensor_of(module, part) for module in (norm, linear) for part in ("weight", "bias")
        ]
        return [head_step(tensors, norm.eps, maps)]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates(x, indices)` does not need; the levels that are kept.

        prune_norm, prune_head: drop the last norm, and the classifier, in any case; both go with
            the last stage. The model itself then gives pooled features.

        Raises ValueError for levels that there are not, and for models made with features_only.
        """
        if self.features_only:
            raise ValueError("made with features_only: give create_model the out_indices")
        levels = self._levels_taken(indices)
        last = max(levels)
        ends_early = last < len(self.stages)
        del self.stages[last:]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or ends_early:
            self.logits_head, self.num_classes = None, 0
        if prune_norm or ends_early:
            self.final_layer_norm = None
        return list(levels)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of names for timm's layer decay: stem, each block (coarse: stage), the rest."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None)]}

    def describe_images(self, preprocessing: Preprocessing) -> None:
        """Make `pretrained_cfg` say how images are prepared, in the model's order of channels."""
        self.pretrained_cfg.update(preprocessing.timm_cfg())

    def description(self) -> dict[str, Any]:
        preprocessing = known_preprocessing_of(self)
        told = {PREPROCESSING_KEY: asdict(preprocessing)} if preprocessing else {}
        return {**super().description(), **told}

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


def check_global_pool(global_pool: str | None) -> None:
    """Raise ValueError for a pool that MOAT has not."""
    if global_pool not in (None, "avg"):
        raise ValueError(f"global_pool must be 'avg', got {global_pool!r}")


def create_model(
    name: str | None = None,
    *,
    num_classes: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    in_chans: int | None = None,
    output_stride: int | None = None,
    window_size: Sequence[Window] | None = None,
    global_attention_at_end: bool | None = None,
    pool_size: int | None = None,
    position_embedding: bool | None = None,
    se_activation: str | None = None,
    layer_norm_eps: float | None = None,
    pixel_scaling: bool | None = None,
    channel_order: str | None = None,
    drop_path_rate: float | None = None,
    fused: bool = True,
    recompute: str = "auto",
    checkpoint: str | Path | None = None,
    stem_width: int | None = None,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
) -> MOAT:
    """A MOAT by name, "moat_0" .. "moat_4", "tiny_moat_0" .. "tiny_moat_3", or by its checkpoint.

    What is None is as in official MOAT or, without a name, as the checkpoint was made for; a
    warning tells what its file does not say and is assumed.

    num_classes: outputs of the classifier; 0: normalised pooled features. Official: 1000.
    features_only: return maps for dense prediction instead; there is no head.
    out_indices: with features_only, which levels: 0 is the stem (stride 2), 1 to 4 the stages
        (strides 4, 8, 16, 32). The model returns a list of the official endpoints "res" of these
        levels, and has no stages behind the last one. None: the dict of all ten endpoints.
    in_chans: channels of the images. Official: 3.
    output_stride: 32 (official), or 16 or 8, beyond which stages keep their map's size (official
        code's `stage_stride`; nothing is dilated).
    window_size: one entry per stage, None (the whole map), an integer or (height, width) in
        tokens; the first two stages have no attention, their entries must be None. Official: the
        whole map everywhere.
    global_attention_at_end: the last block of each MOAT stage attends to the whole map.
    pool_size: kernel of the shortcuts' pool, 2 (official classification) or 3 (downstream tasks,
        and Keras' MOATs).
    position_embedding: whether attention has relative position bias. Keras' MOATs have none.
    se_activation: inside squeeze-and-excitation, "silu" (official) or "gelu" (Keras' MOATs), say.
    layer_norm_eps: of all layer norms, 1e-5 (official) or 1e-3 (Keras' MOATs), say.
    pixel_scaling: images are pixels of 0..255, also in uint8, which the model scales to -1..1
        itself, as Keras' MOATs do.
    channel_order: of the images that the weights read, "rgb" (official) or "bgr".
    drop_path_rate: 1 minus the official survival probability; None: the variant's own.
    fused: fused blocks, or the plain PyTorch reference; the state_dict is the same.
    recompute: what the backward pass of fused blocks recomputes, see FusedMBConv; with "expand" and
        "block" also the stem's GELU.
    checkpoint: path of a .safetensors file, a PyTorch state_dict, a TensorFlow checkpoint or a
        Keras SavedModel to load; see `moat_kernels.checkpoints.load_checkpoint`.
    stem_width, widths, depths: override the variant's own; four entries each for the last two.

    >>> model = create_model("tiny_moat_0", num_classes=10)
    >>> model(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    >>> backbone = create_model("tiny_moat_0", features_only=True, out_indices=(1, 4))
    >>> backbone.channels(), backbone.strides()
    ([32, 256], [4, 32])

    Raises ValueError naming the argument, and CheckpointError for a checkpoint that cannot be read
    or does not fit.
    """
    given = {
        "stem_width": stem_width,
        "widths": widths,
        "depths": depths,
        "num_classes": num_classes,
        "in_chans": in_chans,
        "output_stride": output_stride,
        "window_size": window_size,
        "global_attention_at_end": global_attention_at_end,
        "pool_size": pool_size,
        "position_embedding": position_embedding,
        "se_activation": se_activation,
        "layer_norm_eps": layer_norm_eps,
        "pixel_scaling": pixel_scaling,
        "channel_order": channel_order,
        "drop_path_rate": drop_path_rate,
    }
    options: dict[str, Any] = {
        option: value for option, value in given.items() if value is not None
    }
    source = None
    if name is None:
        if checkpoint is None:
            raise ValueError("name must be given, or a checkpoint that tells what it is for")
        source = read_checkpoint(checkpoint)
        if source.report.assumed:
            told = "; ".join(source.report.assumed)
            warnings.warn(f"{source.report.origin}: assumed: {told}", stacklevel=2)
        options = {**options_of(source), **options}
        name = find_variant(options)
    else:
        options = {**_sizes_of(get_variant(name)), **options}
    options.setdefault("drop_path_rate", VARIANTS[name].drop_path_rate if name else 0.0)
    try:
        model = MOAT(
            **options,
            features_only=features_only,
            out_indices=out_indices,
            fused=fused,
            recompute=recompute,
        )
    except (TypeError, ValueError) as error:
        if source is None:
            raise
        raise CheckpointError(f"{source.report.origin}: {error}") from error
    if name is not None:
        preprocessing = get_preprocessing(name).for_model(model.configuration)
        model.pretrained_cfg = model.default_cfg = get_pretrained_cfg(name, preprocessing)
    if source is not None:
        load_converted(model, source)
    elif checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def _sizes_of(variant: Variant) -> dict[str, Any]:
    return {
        "stem_width": variant.stem_width,
        "widths": variant.widths,
        "depths": variant.depths,
    }
