"""A trained classifier or tagger from a file, ready to be run on a CPU or a GPU."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from photographs import DataError, normalised
from pretrained import classes_of
from torch import Tensor, nn

import moat_kernels
from moat_kernels.checkpoints import CheckpointError
from moat_kernels.variants import Preprocessing

SEED = 0  # of random weights, which are the same in every run
COLOURS = 3


@dataclass(frozen=True)
class Classifier:
    """A model, and what has to be known to run it.

    module: frozen, which takes and gives float32 and computes in `dtype`, or plain and in `dtype`.
    weights: a digest of the model's weights and configuration.
    """

    module: nn.Module
    labels: Sequence[str]
    preprocessing: Preprocessing
    dtype: torch.dtype
    device: str
    frozen: bool
    weights: str

    @torch.inference_mode()
    def logits(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] of 0 .. 255 in uint8 -> [B, labels] in float32, on the CPU."""
        images = normalised(pixels.to(self.device), self.preprocessing)
        images = images.to(memory_format=torch.channels_last)
        return self.module(images if self.frozen else images.to(self.dtype)).float().cpu()


def load_model(
    name: str | None, checkpoint: Path | None, labels: Sequence[str] | None
) -> moat_kernels.MOAT:
    """A MOAT in eval mode, with the weights of a file or random ones of the variant `name`.

    Raises DataError for a file that cannot be read or that is of another model, and for a model
    that does not classify images of three colours.
    """
    torch.manual_seed(SEED)
    options = {} if labels is None else {"num_classes": len(labels)}
    try:
        if name is not None:
            model = moat_kernels.create_model(name, checkpoint=checkpoint, **options)
        else:
            model = moat_kernels.create_model(checkpoint=checkpoint)
    except (OSError, CheckpointError) as error:
        raise DataError(f"--checkpoint {checkpoint} cannot be loaded: {error}") from error
    classifier = model.get_classifier()
    if classifier is None:
        raise DataError(f"--checkpoint {checkpoint} has no classifier")
    if model.configuration["in_chans"] != COLOURS:
        raise DataError(
            f"--checkpoint {checkpoint} is for images of {model.configuration['in_chans']} "
            f"channels, photographs have {COLOURS}"
        )
    return model.eval()


def labels_of(
    model: moat_kernels.MOAT, checkpoint: Path | None, labels: Sequence[str] | None
) -> list[str]:
    """Those given, else those of the file, else the numbers of the classes, from 0 on.

    Raises DataError if they are not as many as the model has classes.
    """
    found = labels if labels is not None else checkpoint and classes_of(checkpoint)
    if found is None:
        return [str(number) for number in range(model.num_classes)]
    if len(found) != model.num_classes:
        source = "--labels" if labels is not None else f"--checkpoint {checkpoint}"
        raise DataError(
            f"{source} has {len(found)} names, but the model has {model.num_classes} classes"
        )
    return list(found)


def make_classifier(
    model: moat_kernels.MOAT,
    labels: Sequence[str],
    preprocessing: Preprocessing,
    dtype: torch.dtype,
    device: str,
    freeze: bool,
) -> Classifier:
    """The model ready to run: frozen on a CPU unless `freeze` is false; it is used up.

    Where it cannot be frozen a warning says why, and it runs as it is.
    """
    weights = digest(model.state_dict(), str(model.configuration))
    module: nn.Module | None = None
    if freeze and device == "cpu":
        try:
            module = moat_kernels.freeze(model, dtype=dtype)
        except ValueError as error:
            print(f"warning: not frozen: {error}", file=sys.stderr)
    frozen = module is not None
    if module is None:
        module = model.to(device, dtype, memory_format=torch.channels_last)
    return Classifier(module, labels, preprocessing, dtype, device, frozen, weights)


def digest(state_dict: Mapping[str, Tensor], configuration: str) -> str:
    """The same for the same weights in the same model, whatever file they come from."""
    result = hashlib.sha256(configuration.encode())
    for name, tensor in sorted(state_dict.items()):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()


def chosen(
    logits: Tensor, top: int | None, threshold: float | None
) -> list[tuple[list[int], list[float]]]:
    """Of each row of [B, classes] the indices and scores that are told, best first.

    top: so many of the softmax. threshold: instead, all whose sigmoid is above it.
    """
    scores = logits.softmax(1) if threshold is None else logits.sigmoid()
    ordered, indices = scores.sort(dim=1, descending=True, stable=True)
    counts = [top] * len(logits) if threshold is None else (ordered > threshold).sum(1).tolist()
    return [
        (indices[row, :count].tolist(), [float(f"{one:.6g}") for one in ordered[row, :count]])
        for row, count in enumerate(counts)
    ]
