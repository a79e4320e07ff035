"""The model that weights are for: sizes as their shapes say, the rest as their file tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moat_kernels.configuration import OFFICIAL, PREPROCESSING_KEY
from moat_kernels.preprocessing import PIXELS, SCALED, Preprocessing

from .conversion import ConvertedCheckpoint
from .errors import CheckpointError

#: A tensor that every MOAT has.
FIRST_CONVOLUTION = "stem.conv_0.weight"
_SECOND_CONVOLUTION = "stem.conv_1.weight"
_CLASSIFIER = "logits_head.weight"
_STAGES = 4
_EXPANSION = 4
# What shapes do not tell.
_TOLD = (
    "output_stride",
    "window_size",
    "global_attention_at_end",
    "pool_size",
    *OFFICIAL,
)


def options_of(converted: ConvertedCheckpoint) -> dict[str, Any]:
    """The arguments of a MOAT that has these weights; official ones where the file tells nothing.

    Stages that a backbone was made without have the sizes that the file tells.

    Raises:
        CheckpointError: the weights are of no MOAT, or of fewer stages, of which nothing is told.
    """
    state_dict, told = converted.state_dict, converted.configuration or {}
    first = _shape(converted, FIRST_CONVOLUTION, ("width", "channels", 3, 3))
    _shape(converted, _SECOND_CONVOLUTION, (first[0], first[0], 3, 3))
    widths, depths = _sizes_of_stages(converted)
    if (missing := _STAGES - len(widths)) > 0:
        widths += _rest(converted, "widths", missing)
        depths += _rest(converted, "depths", missing)
    classes = 0
    if _CLASSIFIER in state_dict:
        classes = _shape(converted, _CLASSIFIER, ("classes", widths[-1]))[0]
    return {
        "stem_width": first[0],
        "in_chans": first[1],
        "widths": tuple(widths),
        "depths": tuple(depths),
        "num_classes": classes,
        "position_embedding": any(
            name.endswith("relative_position_embedding") for name in state_dict
        ),
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
        raise CheckpointError(
            f"{converted.report.origin}: how it says images are prepared cannot be: {error}"
        ) from None


def _sizes_of_stages(converted: ConvertedCheckpoint) -> tuple[list[int], list[int]]:
    """Widths and depths of the stages that are there, up to the first that is not.

    The blocks are counted one by one: a model made by these sizes is not much larger than the file.
    """
    widths, depths = [], []
    for stage in range(_STAGES):
        depth = 0
        while (name := f"stages.{stage}.{depth}.shrink_conv.weight") in converted.state_dict:
            width = converted.state_dict[name].shape[:1].numel()
            _shape(converted, name, (width, _EXPANSION * width, 1, 1))
            depth += 1
        if not depth:
            break
        widths.append(width)
        depths.append(depth)
    return widths, depths


def _shape(
    converted: ConvertedCheckpoint, name: str, expected: tuple[int | str, ...]
) -> tuple[int, ...]:
    """That of a tensor, as expected; words stand for any size. Raises CheckpointError."""
    tensor = converted.state_dict.get(name)
    shape = () if tensor is None else tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        size > 0 if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(shape, expected, strict=False)
    )
    if not fits:
        found = "is missing" if tensor is None else f"is {list(shape)}"
        wanted = ", ".join(map(str, expected))
        raise CheckpointError(
            f"{converted.report.origin}: not the weights of a MOAT: {name} [{wanted}] {found}"
        )
    return shape


def _rest(converted: ConvertedCheckpoint, name: str, count: int) -> list[int]:
    """The sizes of the last `count` stages, as the file tells."""
    told: Mapping[str, Any] = converted.configuration or {}
    sizes = told.get(name)
    if not isinstance(sizes, list | tuple) or len(sizes) != _STAGES:
        raise CheckpointError(
            f"{converted.report.origin}: has {_STAGES - count} of a MOAT's {_STAGES} stages and "
            f"tells no {name} of the others: give create_model the name of the variant"
        )
    return list(sizes[-count:])
