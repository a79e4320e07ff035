"""Ordinary training of a MOAT classifier: model, optimiser, schedule, step, test, state."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import processes
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from validation import Validation

import moat_kernels

WEIGHT_DECAY = 0.05
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
    checkpoint: str | None = None  # the weights that it starts from


@dataclass
class Trainer:
    """One model in training, with what it has measured so far.

    blocks: "stock" or "fused".

    With many processes each holds a copy of the model and sees its share of every batch; gradients
    are averaged, and batch norms measure the shares together: the numbers are those of one process.
    """

    gradient_norm: ClassVar[float] = 1.0  # gradients are clipped to this

    blocks: str
    settings: Settings
    model: moat_kernels.MOAT = field(init=False)
    parallel: nn.Module = field(init=False)  # the model, averaging its gradients over processes
    optimizer: torch.optim.Optimizer = field(init=False)
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = self.settings
        torch.manual_seed(settings.seed)
        self.model = self.make_model().to(settings.device)
        self.parallel = self.model
        if processes.count() > 1:
            moat_kernels.convert_sync_batchnorm(self.model)
            self.parallel = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.parameter_groups(), lr=settings.lr)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weight decay is for what multiplies: not for norms, biases and position bias tables."""
        return self.model.parameter_groups(lr=self.settings.lr, weight_decay=WEIGHT_DECAY)

    def make_model(self) -> nn.Module:
        """A model of random weights."""
        return moat_kernels.create_model(
            self.settings.model,
            num_classes=len(self.settings.classes),
            fused=self.blocks == "fused",
            recompute=self.settings.recompute,
        )

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of a batch, under autocast to bfloat16 if the settings say so."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.settings.amp):
            logits = self.parallel(images)
        return F.cross_entropy(logits.float(), labels)

    def update(self, images: Tensor, labels: Tensor) -> float:
        """One step of the optimiser; returns the loss, over all processes."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(images, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_norm)
        self.optimizer.step()
        return processes.mean_over_processes(loss.detach())

    def step(self, step: int, images: Tensor, labels: Tensor) -> None:
        """Train on the batch of step `step` and record loss and time."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * learning_rate_scale(step, self.settings.steps)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = batch_norm_momentum(step)
        # Drop path draws from here: the same for both kinds of blocks, and after a resume.
        torch.manual_seed((self.settings.seed << 32) + step * processes.count() + processes.rank())
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
    def logits(self, images: Tensor) -> Tensor:
        """What the model, in eval mode, makes of images: [B, 3, H, W] -> [B, classes] float32."""
        self.model.eval()
        with torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.amp):
            return self.model(images.to(self.settings.device)).float().cpu()

    def tensors(self) -> dict[str, Any]:
        """The states of model and optimiser, by the names of the parameters."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def history(self) -> dict[str, list[Any]]:
        """What was measured so far, as JSON has it."""
        return {
            "losses": self.losses,
            "step_seconds": self.step_seconds,
            "validations": [asdict(one) for one in self.validations],
        }

    def load(self, tensors: dict[str, Any], history: dict[str, list[Any]]) -> None:
        """Continue where `tensors` and `history` were taken."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )
        self.losses = list(history["losses"])
        self.step_seconds = list(history["step_seconds"])
        # Older versions validated at the end only.
        self.validations = [Validation(**one) for one in history.get("validations", ())]


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
