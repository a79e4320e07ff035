"""From any checkpoint file to a .safetensors file, or to a list of what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moat_kernels.configuration import encode, with_configurations

from .conversion import ConvertedCheckpoint
from .errors import CheckpointError
from .keras import KerasOptions, WindowSize
from .loading import kind_of_file, load_tensorflow, read_state_dict
from .safetensors import load_metadata, save_safetensors
from .safetensors_header import CONFIGURATION_KEY
from .tensorflow_bundle import TensorBundle
from .tensorflow_objects import is_object_checkpoint, read_object_variables

# The prefix within a SavedModel, whose folder has the name that tells something.
_VARIABLES = "variables"


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source: ``key`` as in ``load_checkpoint``, the others as in
    ``load_tensorflow``."""

    key: str | None = None
    ema: bool = False
    resolution: int | None = None
    window_size: WindowSize = "auto"
    channel_order: str | None = None

    @property
    def _are_for_keras(self) -> bool:
        return KerasOptions(self.resolution, self.window_size, self.channel_order) != KerasOptions()

    def check(self, source: Path, kind: str) -> None:
        """Raise CheckpointError for what does not apply to a ``source`` of this kind."""
        if kind != "torch" and self.key is not None:
            raise CheckpointError(f"{source}: --key is for files of torch.save only")
        if kind != "tensorflow" and self.ema:
            raise CheckpointError(f"{source}: --ema is for TensorFlow checkpoints only")
        if kind != "tensorflow" and self._are_for_keras:
            raise CheckpointError(
                f"{source}: --resolution, --window-size and --channel-order are for Keras models"
            )


def read_source(source: Path, options: SourceOptions) -> ConvertedCheckpoint:
    """The state_dict in ``source``, without the prefixes of wrappers, and the report of it.

    Raises:
        CheckpointError: the file cannot be read, or an option is not for such files.
    """
    kind = kind_of_file(source)
    options.check(source, kind)
    if kind == "tensorflow":
        return load_tensorflow(
            source,
            ema=options.ema,
            resolution=options.resolution,
            window_size=options.window_size,
            channel_order=options.channel_order,
        )
    return read_state_dict(source, kind, key=options.key)


def write_converted(converted: ConvertedCheckpoint, source: Path, destination: Path) -> None:
    """Write ``converted``, which was read from ``source``, with its configuration.

    What a .safetensors file has as metadata stays.

    Raises:
        CheckpointError: a dtype, layout or name that a .safetensors file cannot hold.
    """
    state_dict = converted.state_dict
    if converted.configuration is not None:
        state_dict = with_configurations(state_dict, encode({"": converted.configuration}))
    averaged = "ema" in converted.report.source.values()
    metadata = {
        "format": "pt",
        "source": _name_of(Path(converted.report.origin)),
        "weights": "ema" if averaged else "raw",
        **_metadata_of(source),
    }
    save_safetensors(state_dict, destination, metadata)


def describe(source: Path, key: str | None = None) -> Iterator[str]:
    """A line for each tensor in ``source``: name, shape, dtype; its variable's name, if it has one.

    Raises:
        CheckpointError: the file cannot be read.
    """
    kind = kind_of_file(source)
    SourceOptions(key=key).check(source, kind)
    if kind == "tensorflow":
        yield from _describe_bundle(TensorBundle(source))
        return
    for name, tensor in read_state_dict(source, kind, key=key).state_dict.items():
        yield f"{name}  {list(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}"


def _describe_bundle(bundle: TensorBundle) -> Iterator[str]:
    names = {}
    if is_object_checkpoint(bundle):
        names = {variable.key: f"  {variable.name}" for variable in read_object_variables(bundle)}
    for key, entry in bundle.entries.items():
        yield f"{key}  {list(entry.shape)}  {entry.dtype}{names.get(key, '')}"
    for key, reason in bundle.skipped.items():
        yield f"{key}  skipped: {reason}"


def _metadata_of(source: Path) -> dict[str, str]:
    """What a .safetensors file says beside its models' configurations; others say nothing."""
    if kind_of_file(source) != "safetensors":
        return {}
    return {name: text for name, text in load_metadata(source).items() if name != CONFIGURATION_KEY}


def _name_of(origin: Path) -> str:
    folder = origin.absolute().parent
    is_saved_model = origin.name == folder.name == _VARIABLES
    return folder.parent.name if is_saved_model else origin.name
