"""Ordinary training of DeepLabv3+ on a MOAT: as of classifiers, with another model and loss."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
import training
from deeplab import DeepLab, deeplab
from labelled_images import IGNORED, LabelledImages, normalized
from memory import peak_in_fresh_process, peak_on_cuda
from segmentation_scores import Confusion, Scores
from torch import Tensor
from training import Settings

import moat_kernels
from moat_kernels.memory import peak_bytes

WINDOW = 14  # tokens: a map of any size is cut in such windows, so that large images cost no more


@dataclass
class Trainer(training.Trainer):
    """scores: of what was held out, by the number of steps done."""

    model: DeepLab = field(init=False)
    scores: dict[int, Scores] = field(default_factory=dict)

    def make_model(self) -> DeepLab:
        return deeplab(
            self.settings.model,
            len(self.settings.classes),
            WINDOW,
            fused=self.blocks == "fused",
            recompute=self.settings.recompute,
        )

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of all pixels but those that are IGNORED; 0 if all are."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.settings.amp):
            logits = self.model(images)
        total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp(min=1)

    def segment(self, image: Tensor) -> Tensor:
        """The class of each pixel of a whole image of any size: [3, H, W] of 0..1 -> [H, W]."""
        preprocessing = moat_kernels.get_preprocessing(self.settings.model)
        return self.logits(normalized(image[None], preprocessing))[0].argmax(0)

    def test(self, images: LabelledImages) -> Scores | None:
        """Segment all held-out images, and record how well; None if none can be read."""
        confusion = Confusion(len(self.settings.classes))
        for one in images.held_out():
            confusion.add(self.segment(one.image), one.labels)
        if scores := confusion.scores():
            self.scores[len(self.losses)] = scores
        return scores


def peak_of_step(trainer: Trainer, images: Tensor, labels: Tensor) -> int | None:
    """As memory.peak_of_step, of a segmentation model."""
    if trainer.settings.device == "cuda":
        return peak_on_cuda(trainer, images, labels)
    task = {"blocks": trainer.blocks, "settings": asdict(trainer.settings)}
    return peak_in_fresh_process(__file__, task)


def _measure_in_this_process(blocks: str, settings: Settings) -> int | None:
    """The peak of the second step; the first allocates the optimiser's state and caches."""
    trainer = Trainer(blocks, settings)
    side = settings.resolution
    images = torch.randn(settings.batch_size, 3, side, side)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(len(settings.classes), (settings.batch_size, side, side))
    trainer.update(images, labels)
    trainer.optimizer.zero_grad(set_to_none=True)
    return peak_bytes(lambda: trainer.update(images, labels))


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(_measure_in_this_process(task["blocks"], Settings(**task["settings"])))
