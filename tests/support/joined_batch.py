"""One step of training on ranks that share a batch, against one process on the joined batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from support.small_model import CLASSES, RESOLUTION
from support.tolerances import BACKEND_GRADIENT, BACKEND_OUTPUT, assert_close

Batch = tuple[Tensor, Tensor]


def make_batches(
    sizes: list[int], dtype: torch.dtype = torch.float64, resolution: int = RESOLUTION
) -> tuple[Batch, list[Batch]]:
    """(the joined batch, each rank's share of it): images and labels."""
    images = torch.randn(sum(sizes), 3, resolution, resolution, dtype=dtype)
    labels = torch.randint(CLASSES, (sum(sizes),))
    shares = list(zip(images.split(sizes), labels.split(sizes), strict=True))
    return (images, labels), shares


def train_step(model: nn.Module, batch: Batch, samples: int) -> dict[str, Tensor]:
    """Logits, gradients and buffers of a step on this rank's share of `samples`.

    DDP and FSDP take the mean over ranks of what is here each rank's share of the loss's sum.
    """
    images, labels = batch
    logits = model(images)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    loss = F.cross_entropy(logits, labels, reduction="sum") * ranks / samples
    loss.backward()
    gradients = {f"{name}.grad": _whole(p.grad) for name, p in model.named_parameters()}
    results = {"logits": logits.detach(), **gradients, **dict(model.named_buffers())}
    return {name.removeprefix("module."): value for name, value in results.items()}


def _whole(grad: Tensor | None) -> Tensor | None:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def check_ranks(
    results: list[dict[str, Any]], expected: dict[str, Any], dtype: torch.dtype = torch.float64
) -> None:
    """Every rank has the gradients and buffers of one process, and its share of the logits."""
    assert_close(
        torch.cat([one.pop("logits") for one in results]),
        expected.pop("logits"),
        BACKEND_OUTPUT[dtype],
        "logits",
    )
    for result in results:
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(result[name], value, BACKEND_GRADIENT[dtype], name, floor=1e-3)
