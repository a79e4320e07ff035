"""A classifier that starts from the weights in a file."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from torch import nn
from training import Settings, TrainingError

import moat_kernels
from moat_kernels.checkpoints import CheckpointError, CheckpointReport, load_checkpoint
from moat_kernels.checkpoints.safetensors import load_metadata


def start_from(model: moat_kernels.MOAT, path: Path, settings: Settings) -> str:
    """Put the weights of `path` into `model`, to be trained on; returns what was done, in words.

    A classifier of other classes is left out, and the model's own stays as it is. Raises
    TrainingError for a file that cannot be read, or holds another model.
    """
    own_classifier = copy.deepcopy(model.get_classifier())
    report = _load(model, path, settings, fine_tune=True)
    lines = [f"weights from {path}"]
    difference = _difference(classes_of(path), settings.classes)
    if difference:
        model.get_classifier().load_state_dict(own_classifier.state_dict())
        lines.append(f"its classifier is left out, {difference}: a new one is trained")
    elif "logits_head.weight" not in report.loaded:
        lines.append(
            "its classifier, if it has one, is left out, it is not for "
            f"{len(settings.classes)} classes: a new one is trained"
        )
    return "\n".join([*lines, *report.adapted])


def evaluate_from(model: moat_kernels.MOAT, path: Path, settings: Settings) -> str:
    """The same of weights that are to be evaluated: TrainingError if anything does not fit."""
    report = _load(model, path, settings, fine_tune=False)
    if difference := _difference(classes_of(path), settings.classes):
        raise TrainingError(
            f"--checkpoint {path}: {difference}; evaluate it on --data of its own classes"
        )
    return "\n".join([f"weights from {path}", *report.adapted])


def _load(
    model: moat_kernels.MOAT, path: Path, settings: Settings, *, fine_tune: bool
) -> CheckpointReport:
    try:
        return load_checkpoint(model, path, fine_tune=fine_tune)
    except (OSError, CheckpointError) as error:
        raise TrainingError(
            f"--checkpoint {path} cannot be loaded into a {settings.model} (--model) of "
            f"{len(settings.classes)} classes (--data): {error}"
        ) from error


def classes_of(path: Path) -> list[str] | None:
    """The names of the classes in what this program wrote; of other files they are not known."""
    try:
        return json.loads(load_metadata(path)["classes"])
    except (OSError, ValueError, LookupError):
        return None


def _difference(classes: list[str] | None, wanted: list[str]) -> str:
    """How the classes in a file, if it names them, differ from those of the data; or nothing."""
    if classes is None or classes == wanted:
        return ""
    differing = ", ".join(sorted(set(classes) ^ set(wanted))[:3]) or "in another order"
    return f"it is for {len(classes)} other classes than the {len(wanted)} of --data ({differing})"


def backbone_from(backbone: nn.Module, path: Path, model: str) -> str:
    """Put a classifier's weights into the backbone of something else; returns what was done.

    model: the backbone's name, for messages. Raises TrainingError, and changes nothing, if the
    weights cannot be read or are of another model.
    """
    try:
        report = load_checkpoint(backbone, path, fine_tune=True)
    except (OSError, CheckpointError) as error:
        raise TrainingError(
            f"--checkpoint {path} cannot be loaded into a {model} (--model): {error}"
        ) from error
    return "\n".join([f"weights of the backbone from {path}", *report.adapted])
