"""From a checkpoint file to a model."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from moat_kernels.configuration import OFFICIAL, configurations_of

from .adapting import adapt
from .architecture import FIRST_CONVOLUTION, preprocessing_of
from .conversion import ConvertedCheckpoint, convert_variables
from .errors import CheckpointError
from .files import open_regular
from .filling import check_fit, check_target, fill
from .keras import KerasOptions, WindowSize, convert_keras
from .report import CheckpointReport
from .safetensors import is_safetensors, load_safetensors
from .state_dicts import (
    AVERAGED_MODEL_COUNTER,
    StateDict,
    beside,
    choose_state_dict,
    common_prefix,
)
from .tensorflow_bundle import TensorBundle
from .tensorflow_objects import is_object_checkpoint
from .torch_file import is_torch_file, load_torch_file

_MAGIC_BYTES = 16


def load_tensorflow(
    path: str | os.PathLike[str],
    *,
    ema: bool = False,
    resolution: int | None = None,
    window_size: WindowSize = "auto",
    channel_order: str | None = None,
) -> ConvertedCheckpoint:
    """Read a TensorFlow checkpoint of MOAT, official or of Keras, without TensorFlow.

    The weights of a Keras model do not tell all of its configuration: what is not given here, and
    not in the file, is assumed, and the report says so.

    Args:
        path: the prefix (``.../model.ckpt-1234``), its ``.index`` file, a folder with a
            ``checkpoint`` file, or a SavedModel (or the folder ``variables`` in it).
        ema: take the exponential moving averages where the file has them.
        resolution: side of the images that a Keras model was trained on, in pixels; None: as the
            SavedModel says, else 448.
        window_size: side of the windows in a Keras model's stage 3, in tokens; None: the whole map;
            "auto": a thirty-second of the resolution, which cuts the map in four.
        channel_order: of a Keras model's images, "rgb" or "bgr"; None: "bgr", if they have three.

    Returns:
        The state_dict, a report of what was loaded, skipped and assumed, and the configuration.

    Raises:
        CheckpointError: the file is damaged or unsupported, or holds no complete MOAT, or an
            argument is wrong, or is for Keras models and the file is official.
    """
    options = KerasOptions(resolution, window_size, channel_order)
    bundle = TensorBundle(path)
    if is_object_checkpoint(bundle):
        return convert_keras(bundle, options, ema=ema)
    if options != KerasOptions():
        raise CheckpointError(
            f"{bundle.prefix}: an official checkpoint; resolution, window_size and channel_order "
            "are for Keras models"
        )
    converted = convert_variables(bundle, ema=ema, origin=str(bundle.prefix))
    converted.report.skipped.update(bundle.skipped)
    return converted


def load_checkpoint(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    ema: bool = False,
    key: str | None = None,
    prefer: Sequence[str] = (),
    fine_tune: bool = False,
) -> CheckpointReport:
    """Load a checkpoint into ``model``: all of it or, where anything does not fit, nothing.

    The content of a file tells what it is, not its name. Prefixes that wrappers put before all
    names (``module.``, ``model.``, ``_orig_mod.``) are left out, in the file and in the model.

    Args:
        model: a MOAT of this package or one of its blocks. Without classifier head, the head's
            tensors in the file are skipped; those of stages behind the last of ``out_indices`` too.
            A first convolution for RGB is summed or repeated for other numbers of channels.
        path: a .safetensors file; a file of ``torch.save`` (read with ``weights_only=True``) with a
            state_dict or with dicts around one (``{"model": ..., "epoch": 3}``); or a TensorFlow
            checkpoint as in :func:`load_tensorflow`.
        ema: as in :func:`load_tensorflow`; for TensorFlow checkpoints only.
        key: where in a file of ``torch.save`` the state_dict is (``"model_ema"``,
            ``"ema.state_dict"``); needed if several would do.
        prefer: keys of which the first that is there is taken if several would do.
        fine_tune: the weights are a start for training. A classifier for another number of classes
            stays as ``model`` has it, and options that give other results are noted.

    Where the file tells the configuration that its weights were made for (those that this package
    wrote do), other windows or strides of ``model`` are noted in the report, a first convolution
    for the other ``channel_order`` is turned round, and another ``pool_size``, ``se_activation``,
    ``layer_norm_eps`` or ``pixel_scaling``, which would give other results, is refused unless they
    are to be fine-tuned. How images are prepared, if it tells that too, becomes the model's
    ``pretrained_cfg``.

    Returns:
        What was loaded from where, what was skipped, with the reasons, and what was adapted.

    Raises:
        CheckpointError: the file cannot be read, or does not fit; the model is then unchanged.
    """
    _, target = _tensors_of(model)
    converted = read_checkpoint(path, target, ema=ema, key=key, prefer=prefer)
    return load_converted(model, converted, fine_tune=fine_tune)


def load_converted(
    model: torch.nn.Module, converted: ConvertedCheckpoint, *, fine_tune: bool = False
) -> CheckpointReport:
    """The same of a checkpoint that was read."""
    prefix, target = _tensors_of(model)
    report, path = converted.report, prefix.removesuffix(".")
    own = configurations_of(model.state_dict()).get(path)
    try:
        configurations = (converted.configuration, own)
        state_dict = adapt(converted.state_dict, report, target, configurations, fine_tune)
        check_fit(state_dict, target)
        preprocessing = preprocessing_of(converted)
        fill(model, {prefix + name: tensor for name, tensor in state_dict.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{report.origin}: {error}") from error.__cause__
    if own is not None and preprocessing is not None:
        found = {**OFFICIAL, **(converted.configuration or {})}
        moat: Any = model.get_submodule(path)
        moat.describe_images(preprocessing.for_model(own, found["pixel_scaling"]))
    return report


def _tensors_of(model: torch.nn.Module) -> tuple[str, StateDict]:
    """The prefix of wrappers in a model's names, and its tensors by their names without it.

    Raises CheckpointError if values cannot be copied into one.
    """
    names = model.state_dict()
    prefix = common_prefix(names)
    target = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    check_target(target)
    return prefix, target


def read_checkpoint(
    path: str | os.PathLike[str],
    names: Collection[str] = (FIRST_CONVOLUTION,),
    *,
    ema: bool = False,
    key: str | None = None,
    prefer: Sequence[str] = (),
) -> ConvertedCheckpoint:
    """What is in a checkpoint of any kind, in this package's names, and what its file tells.

    names: which the state_dict to take should have; the other arguments are `load_checkpoint`'s.

    Raises:
        CheckpointError: the file cannot be read, or is a state_dict of another kind.
    """
    path = Path(path)
    kind = kind_of_file(path)
    if kind != "torch" and key is not None:
        raise CheckpointError(f"{path}: key={key!r} is for files of torch.save only")
    if kind == "tensorflow":
        return load_tensorflow(path, ema=ema)
    if ema:
        raise CheckpointError(f"{path}: ema=True is for TensorFlow checkpoints only")
    return read_state_dict(path, kind, names, key, prefer)


def read_state_dict(
    path: Path,
    kind: str,
    names: Collection[str] = (),
    key: str | None = None,
    prefer: Sequence[str] = (),
) -> ConvertedCheckpoint:
    """The state_dict in a file of this kind (``torch`` or ``safetensors``), without prefixes.

    ``names`` are those of the model that it is for; the rest is as in :func:`load_checkpoint`.
    """
    content = load_torch_file(path) if kind == "torch" else load_safetensors(path)
    try:
        key, state_dict = choose_state_dict(content, names, key, prefer)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    report = CheckpointReport(str(path))
    report.skipped.update(dict.fromkeys(beside(content, key), f"beside {key!r}"))
    return _without_prefix(state_dict, names, report)


def kind_of_file(path: Path) -> str:
    """``tensorflow``, ``torch`` or ``safetensors``, as far as the first bytes of ``path`` tell."""
    if path.suffix == ".index" or path.is_dir() or not path.exists():
        return "tensorflow"
    with open_regular(path) as file:
        begin = file.read(_MAGIC_BYTES)
    if is_torch_file(begin):
        return "torch"
    if is_safetensors(begin) or path.suffix == ".safetensors":
        return "safetensors"
    if Path(f"{path}.index").exists():
        return "tensorflow"
    raise CheckpointError(
        f"{path}: neither a .safetensors file, nor one of torch.save, nor a TensorFlow V2 "
        "checkpoint (give its prefix, its .index file or its folder)"
    )


def _without_prefix(
    state_dict: StateDict, names: Collection[str], report: CheckpointReport
) -> ConvertedCheckpoint:
    """``state_dict`` without the prefix of all its names, and ``report`` of it."""
    prefix = common_prefix(state_dict)
    configuration = configurations_of(state_dict).get(prefix.removesuffix("."))
    bare = {}
    for name, tensor in state_dict.items():
        if name == AVERAGED_MODEL_COUNTER and name not in names:
            report.skipped[name] = "a count of torch's AveragedModel"
            continue
        short = name.removeprefix(prefix)
        bare[short] = tensor
        report.loaded[short], report.source[short] = (name,), "raw"
    return ConvertedCheckpoint(bare, report, configuration)
