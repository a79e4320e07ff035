"""A classifier that starts from the weights in a file."""

from __future__ import annotations

import json
from pathlib import Path

from training import Settings, TrainingError

import moat_kernels
from moat_kernels.checkpoints import CheckpointError, CheckpointReport, load_checkpoint
from moat_kernels.checkpoints.safetensors import load_metadata


def load_pretrained(
    model: moat_kernels.MOAT, path: Path, settings: Settings, *, classifier_needed: bool
) -> str:
    """Put the weights of `path` into `model`; returns what was done, in words.

    A classifier of other classes is left out, and the model's own stays as it is.

    classifier_needed: it is a TrainingError then, as is a file that cannot be read, or holds
        another model.
    """
    # Of what the example wrote the names of the classes are known, of other files their number.
    classes = _classes_of(path)
    if classes in (None, settings.classes):
        try:
            load_checkpoint(model, path)
            return f"weights from {path}"
        except (OSError, CheckpointError):
            pass  # told below, if it is not for the classifier
    backbone = moat_kernels.create_model(settings.model, features_only=True)
    try:
        report = load_checkpoint(backbone, path)
    except (OSError, CheckpointError) as error:
        raise TrainingError(
            f"--checkpoint {path} cannot be loaded into a {settings.model} (--model): {error}"
        ) from error
    reason = _why_the_classifier_does_not_fit(report, classes, settings.classes)
    if classifier_needed:
        raise TrainingError(f"--checkpoint {path} {reason}; train one first, without --evaluate")
    model.load_state_dict(backbone.state_dict(), strict=False)
    return f"weights from {path}, which {reason}: its own starts anew"


def _classes_of(path: Path) -> list[str] | None:
    """The names of the classes, where the file says them."""
    try:
        return json.loads(load_metadata(path)["classes"])
    except (OSError, ValueError, LookupError):
        return None


def _why_the_classifier_does_not_fit(
    report: CheckpointReport, classes: list[str] | None, wanted: list[str]
) -> str:
    if not any("logits_head" in name for name in report.skipped):
        return "has no classifier"
    if classes is None:
        return f"has a classifier of another number of classes than {len(wanted)}"
    differing = sorted(set(classes) ^ set(wanted)) or classes
    return (
        f"has a classifier of {len(classes)} other classes than the {len(wanted)} here: "
        f"{', '.join(differing[:3])}"
    )
