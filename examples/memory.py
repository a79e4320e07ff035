"""What a training step holds in memory: bytes saved for the backward pass, and the peak."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training import Settings, Trainer

from moat_kernels.memory import peak_bytes, saved_bytes

MEBIBYTE = 2**20
PEAK_ON_CPU = (
    "growth of the resident set during one training step, at its peak, in a fresh process that "
    "returns freed memory at once"
)
PEAK_ON_CUDA = "torch.cuda.max_memory_allocated of one training step, less what it started with"


def saved_for_backward(trainer: Trainer, images: Tensor, labels: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, exactly.

    Each storage counts once; parameters and buffers do not, they exist anyway.
    """
    trainer.model.train()
    own = [*trainer.model.parameters(), *trainer.model.buffers()]
    return saved_bytes(lambda: trainer.loss(images, labels), excluded=own)


def peak_of_step(trainer: Trainer, images: Tensor, labels: Tensor) -> int | None:
    """Bytes that a training step needs at its peak beyond what is there before it.

    See PEAK_ON_CPU and PEAK_ON_CUDA for what is measured; None where it cannot be measured.
    Trains the model for a step on a CUDA device.
    """
    if trainer.settings.device == "cuda":
        return peak_on_cuda(trainer, images, labels)
    task = {"blocks": trainer.blocks, "settings": asdict(trainer.settings)}
    return peak_in_fresh_process(__file__, task)


def peak_on_cuda(trainer: Any, *batch: Any) -> int:
    """The same on a CUDA device: trains the model for a step."""
    trainer.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.update(*batch)
    return torch.cuda.max_memory_allocated() - before


def peak_in_fresh_process(program: str, task: dict[str, Any]) -> int | None:
    """What `program TASK` measures and prints; `task` has the "blocks"."""
    if not Path("/proc/self/status").exists():
        return None
    environment = {
        **os.environ,
        # The same packages as here, wherever they were found.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        # glibc otherwise keeps freed blocks of up to 32 MiB, and peaks of earlier steps blur.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    result = subprocess.run(
        [sys.executable, program, json.dumps(task)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        print(
            f"warning: peak memory of the {task['blocks']} blocks was not measured, the process "
            f"for it ended with {result.returncode}: {result.stderr.strip()}",
            file=sys.stderr,
        )
        return None
    return int(result.stdout)


def _measure_in_this_process(blocks: str, settings: Settings) -> int | None:
    """The peak of the second step; the first allocates the optimiser's state and caches."""
    trainer = Trainer(blocks, settings)
    images = torch.randn(settings.batch_size, 3, settings.resolution, settings.resolution)
    labels = torch.arange(settings.batch_size) % len(settings.classes)
    trainer.update(images, labels)
    trainer.optimizer.zero_grad(set_to_none=True)
    return peak_bytes(lambda: trainer.update(images, labels))


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(_measure_in_this_process(task["blocks"], Settings(**task["settings"])))
