"""How a classifier does on what was held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import processes
import torch.nn.functional as F
from photographs import Example, held_out_batch

import moat_kernels

if TYPE_CHECKING:
    from training import Trainer


@dataclass(frozen=True)
class Validation:
    """After `step` steps: the share of pictures classified right, and their mean cross entropy."""

    step: int
    accuracy: float
    loss: float
    pictures: int


def validate(trainer: Trainer, examples: Sequence[Example], step: int) -> Validation | None:
    """Classify `examples`, each process its share of them; None if none of them can be read."""
    settings = trainer.settings
    preprocessing = moat_kernels.get_preprocessing(settings.model)
    share = examples[processes.rank() :: processes.count()]
    right, loss, tested = 0, 0.0, 0
    for start in range(0, len(share), settings.batch_size):
        batch = share[start : start + settings.batch_size]
        images, labels = held_out_batch(batch, settings.resolution, preprocessing)
        if len(images):
            logits = trainer.logits(images)
            right += int((logits.argmax(1) == labels).sum())
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            tested += len(images)
    right, loss, tested = processes.sums_over_processes(right, loss, tested)
    if not tested:
        return None
    return Validation(step, right / tested, loss / tested, int(tested))


def best_of(validations: Sequence[Validation]) -> Validation:
    """The one of the highest accuracy; among those, of the lowest loss."""
    return max(validations, key=lambda one: (one.accuracy, -one.loss))
