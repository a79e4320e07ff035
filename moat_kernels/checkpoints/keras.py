"""MOATs of the Keras layout: an object checkpoint, and what its variables do not tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from moat_kernels.configuration import KERAS
from moat_kernels.preprocessing import CHANNEL_ORDERS

from .architecture import sizes_of
from .conversion import ConvertedCheckpoint, convert_inventory
from .errors import CheckpointError
from .files import open_regular
from .keras_inventory import take_keras_inventory
from .tensorflow_bundle import TensorBundle
from .tensorflow_objects import ObjectMapping, read_object_variables

_RGB = 3
_RESOLUTION = 448
_MAXIMUM_RESOLUTION = 1 << 14
# From pixels to the tokens of half a side of stage 3's map, which such models cut in four windows.
_WINDOW_STRIDE = 32
_METADATA_FILE = "keras_metadata.pb"
_MAXIMUM_METADATA_BYTES = 1 << 23
# In the JSON text of the input layer: images [null, H, W, C].
_INPUT_SHAPE = re.compile(
    rb'"batch_input_shape":\s{0,8}\[null,\s{0,8}(\d{1,5}),\s{0,8}(\d{1,5}),\s{0,8}(\d{1,5})\]'
)

#: The side of stage 3's windows in tokens, None for the whole map, or what the resolution tells.
WindowSize = int | None | Literal["auto"]


@dataclass(frozen=True)
class KerasOptions:
    """What the user knows of a Keras model beside its weights.

    Attributes:
        resolution: of the images that it was trained on, in pixels; None: as the file says.
        window_size: side of stage 3's windows, in tokens; None: the whole map; "auto": a
            thirty-second of the resolution.
        channel_order: of the images, "rgb" or "bgr"; None: "bgr", if they have three.

    Raises:
        CheckpointError: naming the argument that is none of these.
    """

    resolution: int | None = None
    window_size: WindowSize = "auto"
    channel_order: str | None = None

    def __post_init__(self) -> None:
        resolution, window = self.resolution, self.window_size
        if resolution is not None and not _is_within(resolution, _MAXIMUM_RESOLUTION):
            raise CheckpointError(
                f"resolution must be an integer from 1 to {_MAXIMUM_RESOLUTION}, got {resolution!r}"
            )
        if window not in (None, "auto") and not _is_within(window, _MAXIMUM_RESOLUTION):
            raise CheckpointError(
                f"window_size must be an integer from 1 to {_MAXIMUM_RESOLUTION}, None or 'auto', "
                f"got {window!r}"
            )
        if self.channel_order not in (None, *CHANNEL_ORDERS):
            raise CheckpointError(
                f"channel_order must be one of {', '.join(CHANNEL_ORDERS)}, "
                f"got {self.channel_order!r}"
            )


def convert_keras(
    bundle: TensorBundle, options: KerasOptions | None = None, *, ema: bool = False
) -> ConvertedCheckpoint:
    """The state_dict of the Keras MOAT in ``bundle``, its report and its configuration.

    Raises:
        CheckpointError: as :func:`load_tensorflow`.
    """
    variables = read_object_variables(bundle)
    inventory, keys = take_keras_inventory(bundle, variables, ema=ema, origin=str(bundle.prefix))
    converted = convert_inventory(ObjectMapping(bundle, keys), inventory)
    try:
        configuration, assumed = _configuration(
            converted.state_dict, options or KerasOptions(), bundle.prefix
        )
    except CheckpointError as error:
        raise inventory.error(str(error)) from None
    converted.report.assumed += assumed
    return replace(converted, configuration=configuration)


def _configuration(
    state_dict: Mapping[str, torch.Tensor], options: KerasOptions, prefix: Path
) -> tuple[dict[str, Any], list[str]]:
    """The whole configuration, and a line for all in it that nobody said."""
    sizes = sizes_of(state_dict)
    assumed = [
        "as the code of this layout has it: images are pixels of 0 to 255, padded by white to a "
        "square; GELU in squeeze-and-excitation, layer norms' epsilon 0.001, a 3x3 pool"
    ]
    resolution = options.resolution or _resolution_of_file(prefix, sizes["in_chans"])
    if resolution is None:
        resolution = _RESOLUTION
        assumed.append(f"resolution {resolution}: neither given nor in {_METADATA_FILE}")
    window = options.window_size
    if window == "auto":
        window = _window_of(resolution)
        assumed.append(
            f"windows of {window}x{window} tokens in stage 3, a quarter of its map at {resolution} "
            "pixels: window_size was not given"
        )
    channel_order = options.channel_order
    if channel_order is None:
        channel_order = KERAS["channel_order"] if sizes["in_chans"] == _RGB else "rgb"
        assumed.append(f"channel_order {channel_order!r}: it was not given")
    configuration = {
        **sizes,
        "output_stride": 32,
        "window_size": (None, None, window and (window, window), None),
        "global_attention_at_end": False,
        **KERAS,
        "channel_order": channel_order,
        "preprocessing": {
            "resolution": resolution,
            "crop_mode": "border",
            "crop_pct": 1.0,
            "interpolation": "bicubic",
        },
    }
    return configuration, assumed


def _window_of(resolution: int) -> int:
    if resolution % _WINDOW_STRIDE:
        raise CheckpointError(
            f"a resolution of {resolution} pixels is no multiple of {_WINDOW_STRIDE}, stage 3's "
            "map cannot be cut in four: give window_size, in tokens, or None for the whole map"
        )
    return resolution // _WINDOW_STRIDE


def _resolution_of_file(prefix: Path, channels: int) -> int | None:
    """The side of the images in the metadata of a SavedModel; None where it does not tell one."""
    folder = prefix.absolute().parent
    if folder.name != "variables":
        return None
    try:
        with open_regular(folder.parent / _METADATA_FILE) as file:
            text = file.read(_MAXIMUM_METADATA_BYTES)
    except (CheckpointError, OSError):
        return None
    shapes = {tuple(map(int, match)) for match in _INPUT_SHAPE.findall(text)}
    if len(shapes) != 1:
        return None
    height, width, depth = shapes.pop()
    is_square = height == width and depth == channels
    return height if is_square and _is_within(height, _MAXIMUM_RESOLUTION) else None


def _is_within(value: object, largest: int) -> bool:
    return type(value) is int and 1 <= value <= largest
