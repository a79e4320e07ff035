"""A trained classifier or tagger from a file, ready to be run on a CPU or a GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from photographs import DataError, normalised
from prediction_labels import read_labels
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


def known_labels(labels: Path | None, checkpoint: Path | None) -> list[str] | None:
    """The names in the file `labels`, else those in the checkpoint, if it has any.

    Raises DataError for labels that cannot be read.
    """
    if labels is not None:
        return read_labels(labels)
    names = classes_of(checkpoint) if checkpoint is not None else None
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if are_names and names else None


def load_model(name: str | None, checkpoint: Path | None, classes: int | None) -> moat_kernels.MOAT:
    """A MOAT in eval mode, with the weights of a file or random ones of the variant `name`.

    classes: how many a variant given by its name has; None: as many as official ones.

    Raises DataError for a file that cannot be read or that is of another model, and for a model
    that does not classify images of three colours.
    """
    torch.manual_seed(SEED)
    try:
        if name is None:
            model = moat_kernels.create_model(checkpoint=checkpoint)
        else:
            model = moat_kernels.create_model(name, checkpoint=checkpoint, num_classes=classes)
    except (OSError, CheckpointError) as error:
        raise DataError(f"--checkpoint {checkpoint} cannot be loaded: {error}") from error
    if model.get_classifier() is None:
        raise DataError(f"--checkpoint {checkpoint} has no classifier")
    if (channels := model.configuration["in_chans"]) != COLOURS:
        raise DataError(
            f"--checkpoint {checkpoint} is for images of {channels} channels, photographs have "
            f"{COLOURS}"
        )
    return model.eval()


def labels_of(model: moat_kernels.MOAT, known: Sequence[str] | None) -> list[str]:
    """Those that are known, else the numbers of the classes, from 0 on.

    Raises DataError if they are not as many as the model has classes.
    """
    if known is None:
        return [str(number) for number in range(model.num_classes)]
    if len(known) != model.num_classes:
        raise DataError(
            f"--labels or the checkpoint names {len(known)} classes, but the model has "
            f"{model.num_classes}"
        )
    return list(known)


def preprocessing_of(model: moat_kernels.MOAT, resolution: int | None) -> Preprocessing:
    """How images are prepared, at `resolution` if it is given. DataError if it is not known."""
    try:
        preprocessing = moat_kernels.get_preprocessing(model)
    except ValueError as error:
        raise DataError(
            "--checkpoint does not tell how images are prepared, nor has its model the sizes of a "
            f"variant of which that is known ({', '.join(moat_kernels.list_models())})"
        ) from error
    return dataclasses.replace(preprocessing, resolution=resolution or preprocessing.resolution)


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
        (
            indices[row, :count].tolist(),
            [float(f"{score:.6g}") for score in ordered[row, :count].tolist()],
        )
        for row, count in enumerate(counts)
    ]
