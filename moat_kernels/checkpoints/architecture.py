"""The model that weights are for: sizes as their shapes say, the rest as their file tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from moat_kernels.configuration import OFFICIAL, PREPROCESSING_KEY
from moat_kernels.preprocessing import PIXELS, SCALED, Preprocessing

from .errors import CheckpointError

if TYPE_CHECKING:
    from .conversion import ConvertedCheckpoint

#: A tensor that every MOAT has.
FIRST_CONVOLUTION = "stem.conv_0.weight"
_SECOND_CONVOLUTION = "stem.conv_1.weight"
_CLASSIFIER = "logits_head.weight"
_POSITION_EMBEDDING = "relative_position_embedding"
_STAGES = 4
_EXPANSION = 4
# What shapes do not tell.
_TOLD = ("output_stride", "window_size", "global_attention_at_end", "pool_size", *OFFICIAL)

Tensors = Mapping[str, torch.Tensor]


def options_of(converted: ConvertedCheckpoint) -> dict[str, Any]:
    """The arguments of a MOAT that has these weights; official ones where the file tells nothing.

    Stages that a backbone was made without have the sizes that the file tells.

    Raises:
        CheckpointError: the weights are of no MOAT, or of fewer stages, of which nothing is told.
    """
    state_dict, told = converted.state_dict, converted.configuration or {}
    try:
        sizes = sizes_of(state_dict)
        built = len(sizes["widths"])
        for name in ("widths", "depths"):
            sizes[name] += _rest(told, name, built)
        classes = 0
        if _CLASSIFIER in state_dict:
            classes = _shape(state_dict, _CLASSIFIER, ("classes", sizes["widths"][-1]))[0]
    except CheckpointError as error:
        raise CheckpointError(f"{converted.report.origin}: {error}") from None
    return {
        **sizes,
        "num_classes": classes,
        "position_embedding": has_position_embedding(state_dict),
        **{name: told[name] for name in _TOLD if name in told},
    }


def preprocessing_of(converted: ConvertedCheckpoint) -> Preprocessing | None:
    """How images are prepared for the model that weights were made for, if their file tells.

    Raises:
        CheckpointError: it tells something that cannot be.
    """
    configuration = {**OFFICIAL, **(converted.configuration or {})}
    told = configuration.get(PREPROCESSING_KEY)
    if told is None:
        return None
    normalization = PIXELS if configuration["pixel_scaling"] else SCALED
    try:
        fields = {
            "channel_order": configuration["channel_order"],
            **dict(zip(("mean", "std"), normalization, strict=True)),
            **told,
        }
        return Preprocessing(**fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"how it says that images are prepared cannot be: {error}") from None


def official_configuration(state_dict: Tensors) -> dict[str, Any] | None:
    """What is certain of the model of an official checkpoint; None for a single block."""
    if FIRST_CONVOLUTION not in state_dict:
        return None
    return {
        **sizes_of(state_dict),
        "position_embedding": has_position_embedding(state_dict),
        "se_activation": OFFICIAL["se_activation"],
        "layer_norm_eps": OFFICIAL["layer_norm_eps"],
    }


def has_position_embedding(state_dict: Tensors) -> bool:
    return any(name.endswith(_POSITION_EMBEDDING) for name in state_dict)


def sizes_of(state_dict: Tensors) -> dict[str, Any]:
    """stem_width, in_chans, and widths and depths of the stages up to the first that is not there.

    Blocks are counted one by one: a model made by these sizes is not much larger than the tensors.

    Raises:
        CheckpointError: these are not the tensors of a whole MOAT.
    """
    stem_width, in_chans, *_ = _shape(state_dict, FIRST_CONVOLUTION, ("width", "channels", 3, 3))
    _shape(state_dict, _SECOND_CONVOLUTION, (stem_width, stem_width, 3, 3))
    widths: list[int] = []
    depths: list[int] = []
    for stage in range(_STAGES):
        depth = 0
        while (name := f"stages.{stage}.{depth}.shrink_conv.weight") in state_dict:
            width = state_dict[name].shape[:1].numel()
            _shape(state_dict, name, (width, _EXPANSION * width, 1, 1))
            depth += 1
        if not depth:
            break
        widths.append(width)
        depths.append(depth)
    return {
        "stem_width": stem_width,
        "in_chans": in_chans,
        "widths": tuple(widths),
        "depths": tuple(depths),
    }


def _rest(told: Mapping[str, Any], name: str, built: int) -> tuple[int, ...]:
    """The sizes of the stages after those that are there, as the file tells."""
    if built == _STAGES:
        return ()
    sizes = told.get(name)
    if not isinstance(sizes, list | tuple) or len(sizes) != _STAGES:
        raise CheckpointError(
            f"has {built} of a MOAT's {_STAGES} stages and tells no {name} of the others: give "
            "create_model the name of the variant"
        )
    return tuple(sizes[built:])


def _shape(state_dict: Tensors, name: str, expected: tuple[int | str, ...]) -> tuple[int, ...]:
    """That of a tensor, as expected; words stand for any size. Raises CheckpointError."""
    shape = tuple(state_dict[name].shape) if name in state_dict else ()
    fits = len(shape) == len(expected) and all(
        size > 0 if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(shape, expected, strict=False)
    )
    if not fits:
        found = f"is {list(shape)}" if name in state_dict else "is missing"
        wanted = ", ".join(map(str, expected))
        raise CheckpointError(f"not the weights of a MOAT: {name} [{wanted}] {found}")
    return shape
