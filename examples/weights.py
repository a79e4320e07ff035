"""Weights of models in files of their own, and models that start from such."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from moat_kernels.checkpoints import save_safetensors


def save_weights(module: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the state_dict to `path`, a .safetensors file that `load_checkpoint` reads.

    Whole or not at all: if it cannot be written (OSError), what was at `path` is as it was.

    metadata: what to say of the weights in the file.
    """
    save_safetensors(module.state_dict(), path, metadata)
