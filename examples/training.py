"""Ordinary training of a MOAT classifier: model, optimiser, schedule, step, test, checkpoint."""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moat_kernels

WEIGHT_DECAY = 0.05
GRADIENT_NORM = 1.0  # gradients are clipped to this
WARM_UP_SHARE = 0.1  # of the steps


class TrainingError(RuntimeError):
    """Training cannot start or go on; the text says why."""


@dataclass(frozen=True)
class Settings:
    """All that, with the photographs, determines a run."""

    model: str
    classes: list[str]
    resolution: int
    batch_size: int
    steps: int
    lr: float
    seed: int
    amp: bool
    recompute: str
    device: str


@dataclass
class Trainer:
    """One model in training, with what it has measured so far.

    blocks: "stock" or "fused".
    """

    blocks: str
    settings: Settings
    model: moat_kernels.MOAT = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = self.settings
        torch.manual_seed(settings.seed)
        self.model = moat_kernels.create_model(
            settings.model,
            num_classes=len(settings.classes),
            fused=self.blocks == "fused",
            recompute=settings.recompute,
        ).to(settings.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameter_groups(lr=settings.lr, weight_decay=WEIGHT_DECAY)
        )

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of a batch, under autocast to bfloat16 if the settings say so."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.settings.amp):
            logits = self.model(images)
        return F.cross_entropy(logits.float(), labels)

    def update(self, images: Tensor, labels: Tensor) -> float:
        """One step of the optimiser; returns the loss."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(images, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        return loss.item()

    def step(self, step: int, images: Tensor, labels: Tensor) -> None:
        """Train on the batch of step `step` and record loss and time."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * learning_rate_scale(step, self.settings.steps)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = batch_norm_momentum(step)
        # Drop path draws from here: the same for both kinds of blocks, and after a resume.
        torch.manual_seed((self.settings.seed << 32) + step)
        synchronize(self.settings.device)
        start = time.perf_counter()
        loss = self.update(images, labels)
        synchronize(self.settings.device)
        self.step_seconds.append(time.perf_counter() - start)
        self.losses.append(loss)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of the {self.blocks} blocks is {loss} at step {step + 1}; "
                "a smaller --lr may help"
            )

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """The most likely class of each image: [B, 3, H, W] -> [B]."""
        self.model.eval()
        with torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.amp):
            return self.model(images.to(self.settings.device)).argmax(1).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs of this trainer."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "step_seconds": self.step_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        self.step_seconds = list(state["step_seconds"])


def learning_rate_scale(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def batch_norm_momentum(step: int) -> float:
    """MOAT's 0.01, but faster at first.

    The moving averages begin with the first batch instead of 0 and 1, and follow the weights while
    these change fast; with 0.01 alone they would be usable after some 1000 steps only.
    """
    return max(0.01, 4 / (step + 4))


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock read next tells the truth."""
    if device == "cuda":
        torch.cuda.synchronize()


def save_training(path: Path, trainers: Sequence[Trainer], step: int) -> None:
    """Write all of a run after `step` steps. The old file stays whole until the new one is."""
    contents = {
        "settings": asdict(trainers[0].settings),
        "step": step,
        "trainers": {trainer.blocks: trainer.state_dict() for trainer in trainers},
    }
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(contents, unfinished)
    os.replace(unfinished, path)


def load_training(path: Path, trainers: Sequence[Trainer]) -> int:
    """Put the trainers where `path` left them; returns the number of steps done.

    The learning rate follows this run's --steps and --lr: only with the same arguments does the
    resumed run repeat the uninterrupted one.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        saved, step, states = contents["settings"], contents["step"], contents["trainers"]
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as e:
        raise TrainingError(f"--resume {path} is no checkpoint of this program: {e}") from e
    settings = trainers[0].settings
    for name, wanted in (("model", settings.model), ("classes", settings.classes)):
        if saved[name] != wanted:
            raise TrainingError(f"--resume {path} has {name} {saved[name]}, this run has {wanted}")
    missing = [trainer.blocks for trainer in trainers if trainer.blocks not in states]
    if missing:
        raise TrainingError(
            f"--resume {path} was made with --blocks {'|'.join(states)}, "
            f"it has no {' or '.join(missing)} blocks"
        )
    if step >= settings.steps:
        raise TrainingError(f"--resume {path} has done {step} steps already; raise --steps")
    for trainer in trainers:
        trainer.load_state_dict(states[trainer.blocks])
    return step
