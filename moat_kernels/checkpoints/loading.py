"""From a checkpoint file to a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .conversion import ConvertedCheckpoint, convert_variables
from .errors import CheckpointError
from .report import CheckpointReport
from .safetensors import load_safetensors
from .tensorflow_bundle import TensorBundle

_TORCH_SUFFIXES = (".pt", ".pth")
_HEAD_PREFIXES = ("final_layer_norm.", "logits_head.")
_POSITION_EMBEDDING = "relative_position_embedding"
_EXAMPLES = 3


def load_tensorflow(path: str | os.PathLike[str], *, ema: bool = False) -> ConvertedCheckpoint:
    """Read an official TensorFlow V2 checkpoint of MOAT; TensorFlow itself is not needed.

    Args:
        path: the prefix (``.../model.ckpt-1234``), its ``.index`` file, or a folder with a
            ``checkpoint`` file.
        ema: take the exponential moving averages where the file has them.

    Returns:
        The state_dict and a report of what was loaded and what was skipped.

    Raises:
        CheckpointError: the file is damaged or unsupported, or holds no complete MOAT.
    """
    bundle = TensorBundle(path)
    converted = convert_variables(bundle, ema=ema, origin=str(bundle.prefix))
    converted.report.skipped.update(bundle.skipped)
    return converted


def load_checkpoint(
    model: torch.nn.Module, path: str | os.PathLike[str], *, ema: bool = False
) -> CheckpointReport:
    """Load a checkpoint into ``model``; names and shapes are checked before it is touched.

    Args:
        model: a MOAT of this package or one of its blocks. Without classifier head, the head's
            tensors in the file are skipped.
        path: a ``.safetensors`` file, a ``.pt`` or ``.pth`` file with a state_dict (read with
            ``weights_only=True``), or else a TensorFlow checkpoint as in :func:`load_tensorflow`.
        ema: as in :func:`load_tensorflow`; for TensorFlow checkpoints only.

    Returns:
        What was loaded from where, and what was skipped, with the reasons.

    Raises:
        CheckpointError: the file cannot be read, or does not fit; the model is then unchanged.
    """
    converted = _read(Path(path), ema)
    report = converted.report
    target = model.state_dict()
    state_dict = dict(converted.state_dict)
    if not any(name.startswith(_HEAD_PREFIXES) for name in target):
        for name in [name for name in state_dict if name.startswith(_HEAD_PREFIXES)]:
            del state_dict[name], report.source[name]
            for variable in report.loaded.pop(name):
                report.skipped[variable] = "the model has no classifier head"
    _check_names(report.origin, state_dict, target)
    _check_tensors(report.origin, state_dict, target)
    model.load_state_dict(state_dict)
    return report


def _read(path: Path, ema: bool) -> ConvertedCheckpoint:
    if path.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        return load_tensorflow(path, ema=ema)
    if ema:
        raise CheckpointError(f"{path}: ema=True is for TensorFlow checkpoints only")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    state_dict = load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    report = CheckpointReport(
        str(path),
        loaded={name: (name,) for name in state_dict},
        source=dict.fromkeys(state_dict, "raw"),
    )
    return ConvertedCheckpoint(state_dict, report)


def _load_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load has no error of its own: bytes that are not a state_dict end in any exception.
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: not a state_dict that torch.load can read safely: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state_dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: not a flat state_dict: {name!r} is a {type(value).__name__}, not a tensor"
            )
    return dict(content)


def _check_names(
    origin: str, state_dict: dict[str, torch.Tensor], target: dict[str, torch.Tensor]
) -> None:
    missing = [name for name in target if name not in state_dict]
    unexpected = [name for name in state_dict if name not in target]
    if not missing and not unexpected:
        return
    if not missing and all(name.endswith(_POSITION_EMBEDDING) for name in unexpected):
        raise CheckpointError(
            f"{origin}: has position embeddings ({_some(unexpected)}), which change the function, "
            "but the model has none: build it with position_embedding=True"
        )
    if not unexpected and all(name.endswith(_POSITION_EMBEDDING) for name in missing):
        raise CheckpointError(
            f"{origin}: has no position embeddings ({_some(missing)}), but the model has: "
            "build it with position_embedding=False"
        )
    if not unexpected and all(name.startswith(_HEAD_PREFIXES) for name in missing):
        raise CheckpointError(
            f"{origin}: has no classifier head ({_some(missing)}), but the model has: "
            "build it with features_only=True or num_classes=0"
        )
    raise CheckpointError(
        f"{origin}: does not fit the model; missing in the file: {_some(missing)}; "
        f"not in the model: {_some(unexpected)}"
    )


def _check_tensors(
    origin: str, state_dict: dict[str, torch.Tensor], target: dict[str, torch.Tensor]
) -> None:
    differing = [name for name in target if state_dict[name].shape != target[name].shape]
    if differing:
        shapes = [
            f"{name} is {list(state_dict[name].shape)} in the file, "
            f"{list(target[name].shape)} in the model"
            for name in differing
        ]
        message = f"{origin}: does not fit the model: {_some(shapes, '; ')}"
        if all(name.startswith("logits_head.") for name in differing):
            classes = state_dict["logits_head.bias"].numel()
            message += (
                f"; build the model with num_classes={classes}, then reset_classifier, "
                "or without head (features_only=True)"
            )
        raise CheckpointError(message)
    for name, tensor in target.items():
        if state_dict[name].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{origin}: {name} is {state_dict[name].dtype} in the file, "
                f"{tensor.dtype} in the model"
            )


def _some(items: list[str], separator: str = ", ") -> str:
    shown = separator.join(items[:_EXAMPLES]) or "nothing"
    rest = len(items) - _EXAMPLES
    return f"{shown}{separator}and {rest} more" if rest > 0 else shown
