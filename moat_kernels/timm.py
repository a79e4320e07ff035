"""The MOAT family in timm's registry: `timm.create_model("moat_0")` after this import.

The models are those of `moat_kernels.create_model`, of the same class, with the same names of
parameters. All its arguments may be given, and those of timm that have a meaning here. With
`features_only` there is no wrapper, but the model itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moat_kernels.checkpoints import load_checkpoint
from moat_kernels.models import MOAT, check_global_pool, create_model
from moat_kernels.preprocessing import known_preprocessing_of
from moat_kernels.variants import VARIANTS, get_preprocessing, get_pretrained_cfg

try:
    from timm.models import (
        FeatureInfo,
        build_model_with_cfg,
        generate_default_cfgs,
        register_model,
        resolve_pretrained_cfg,
    )
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "timm":
        raise
    raise ImportError("moat_kernels.timm needs timm, which is missing: pip install timm") from error

_LEVELS = (0, 1, 2, 3, 4)  # timm's own choice where out_indices says nothing
_AVERAGES = ("state_dict_ema", "model_ema")  # what timm prefers in the files of its train.py
_HEAD = ("final_layer_norm.", "logits_head.")

default_cfgs = generate_default_cfgs(
    {name: get_pretrained_cfg(name, get_preprocessing(name)) for name in VARIANTS}
)


def _create(
    name: str,
    pretrained: bool = False,
    *,
    features_only: bool = False,
    out_indices: int | Sequence[int] = _LEVELS,
    feature_cls: str | None = None,
    global_pool: str | None = None,
    drop_rate: float = 0.0,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **options: Any,
) -> MOAT:
    """The model as timm wants it: with the weights and the description of its configuration."""
    check_global_pool(global_pool)
    if drop_rate:
        raise ValueError(f"drop_rate must be 0: MOAT has no dropout, got {drop_rate!r}")
    if feature_cls not in (None, "getter"):
        raise ValueError(
            f"feature_cls must be None: features_only gives the model itself, got {feature_cls!r}"
        )
    source = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
    if pretrained and not (source.has_weights or source.state_dict):
        raise RuntimeError(
            f"there are no weights of {name} to download: leave pretrained=True out, or give it a "
            "file: pretrained_cfg_overlay={'file': PATH}; or load one by checkpoint_path=PATH"
        )
    # That of `timm.models.save_for_hf` is timm's to read.
    file = source.file if pretrained and source.source != "local-dir" else None
    levels: Any = out_indices
    if type(out_indices) is int and 0 < out_indices <= len(_LEVELS):
        levels = _LEVELS[-out_indices:]  # the last ones

    def build(
        *, num_classes: int, device: Any = None, dtype: torch.dtype | None = None, **arguments: Any
    ) -> MOAT:
        if features_only:
            arguments.update(features_only=True, out_indices=levels)
        else:
            arguments["num_classes"] = num_classes
        with torch.device(device) if device is not None else contextlib.nullcontext():
            return create_model(name, **arguments).to(dtype=dtype)

    model = build_model_with_cfg(
        build,
        name,
        pretrained and not file,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=_weights_of,
        **options,
    )
    if (preprocessing := known_preprocessing_of(model)) is not None:
        in_rgb = replace(preprocessing, channel_order="rgb")  # timm knows no other
        model.describe_images(in_rgb.for_model(model.configuration))
    if file:
        other_classes = model.num_classes != source.num_classes
        load_checkpoint(model, file, prefer=_AVERAGES, fine_tune=other_classes)
        model.pretrained_cfg.update(pretrained_cfg_overlay or {})
    if model.out_indices is not None:
        model.feature_info = FeatureInfo(model.feature_info, model.out_indices)
    return model


def _weights_of(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Those that the model has; timm does not look for missing ones where it leaves out the head.

    Raises RuntimeError for them.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state_dict and not name.startswith(_HEAD)]
    if missing:
        raise RuntimeError(f"the weights lack {len(missing)} tensors of the model: {missing[:3]}")
    built = {name.split(".")[1] for name in own if name.startswith("stages.")}
    return {
        name: tensor
        for name, tensor in state_dict.items()
        if not name.startswith("stages.") or name.split(".")[1] in built
    }


def _entry_point(name: str) -> Callable[..., MOAT]:
    def create(pretrained: bool = False, **options: Any) -> MOAT:
        return _create(name, pretrained, **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"`moat_kernels.create_model({name!r})`, for timm.create_model."
    return create


# timm adds their names to `__all__`.
for _name in VARIANTS:
    globals()[_name] = register_model(_entry_point(_name))
