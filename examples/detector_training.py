"""Ordinary training of a detector: model, optimiser, schedule, step, test."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import training
from average_precision import AveragePrecision, Evaluation
from cascade_mask_rcnn import Sizes, make_detector
from memory import peak_in_fresh_process, peak_on_cuda
from scenes import Scenes
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from training import WEIGHT_DECAY

from moat_kernels.memory import peak_bytes

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """All that, with the images, determines a run.

    checkpoint: the weights that the backbone starts from, loaded elsewhere; None: random ones.
    """

    model: str
    classes: list[str]
    sizes: Sizes
    resolution: int
    batch_size: int
    steps: int
    lr: float
    seed: int
    device: str
    checkpoint: str | None


@dataclass
class Trainer(training.Trainer):
    """One detector in training, with what it has measured so far.

    precisions: average precision on what was held out, by the number of steps done.

    Batch norms are trained. Frozen ones, usual in detection because batches are small, need the
    statistics of a pretrained backbone; and a batch of two crops of 192 pixels still has 72 values
    of a channel at stride 32, and 288 at stride 16.
    """

    gradient_norm: ClassVar[float] = 10.0

    settings: Settings
    model: GeneralizedRCNN = field(init=False)
    precisions: dict[int, AveragePrecision] = field(default_factory=dict)

    def make_model(self) -> GeneralizedRCNN:
        settings = self.settings
        fused = self.blocks == "fused"
        return make_detector(settings.model, len(settings.classes), settings.sizes, fused=fused)

    def parameter_groups(self) -> list[dict[str, Any]]:
        prefix = "backbone.moat."
        undecayed = {prefix + name for name in self.model.backbone.moat.no_weight_decay()}
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in self.model.named_parameters():
            groups[parameter.dim() > 1 and name not in undecayed].append(parameter)
        return [
            {"params": parameters, "weight_decay": WEIGHT_DECAY * decays}
            for decays, parameters in groups.items()
        ]

    def loss(self, images: list[Tensor], targets: list[Target]) -> Tensor:
        """The sum of all losses of a batch."""
        return sum(self.model(images, targets).values(), torch.zeros((), device=images[0].device))

    @torch.inference_mode()
    def detect(self, image: Tensor) -> Target:
        """Boxes, labels, scores and masks of the objects found in [3, H, W], on the CPU."""
        self.model.eval()
        (found,) = self.model([image.to(self.settings.device)])
        return {name: tensor.cpu() for name, tensor in found.items()}

    def test(self, scenes: Scenes) -> AveragePrecision:
        """Look for the objects of all held-out scenes, and record how well they were found."""
        evaluation = Evaluation(len(self.settings.classes))
        for scene in scenes.held_out():
            evaluation.add(scene, self.detect(scene.image))
        self.precisions[len(self.losses)] = evaluation.result()
        return self.precisions[len(self.losses)]


def peak_of_step(trainer: Trainer, images: list[Tensor], targets: list[Target]) -> int | None:
    """As memory.peak_of_step, with this batch."""
    if trainer.settings.device == "cuda":
        return peak_on_cuda(trainer, images, targets)
    with tempfile.TemporaryDirectory() as folder:
        batch = Path(folder, "batch.pt")
        torch.save((images, targets), batch)
        task = {"blocks": trainer.blocks, "settings": asdict(trainer.settings)}
        return peak_in_fresh_process(__file__, {**task, "batch": str(batch)})


def _measure_in_this_process(
    blocks: str, settings: Settings, images: list[Tensor], targets: list[Target]
) -> int | None:
    """The peak of the second step; the first allocates the optimiser's state and caches."""
    trainer = Trainer(blocks, settings)
    trainer.update(images, targets)
    trainer.optimizer.zero_grad(set_to_none=True)
    return peak_bytes(lambda: trainer.update(images, targets))


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    sizes = Sizes(**task["settings"].pop("sizes"))
    settings = Settings(**task["settings"], sizes=sizes)
    print(_measure_in_this_process(task["blocks"], settings, *torch.load(task["batch"])))
