"""Weights of models in files of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import processes
from files import free_name
from torch import nn

from moat_kernels.checkpoints import save_safetensors


def save_weights(module: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the state_dict to `path`, a .safetensors file that `load_checkpoint` reads.

    Whole or not at all: if it cannot be written (OSError), what was at `path` is as it was.

    metadata: what to say of the weights in the file.
    """
    save_safetensors(module.state_dict(), path, metadata)


def put_aside(path: Path) -> None:
    """Give what is at `path`, if anything is, another name."""
    if os.path.lexists(path):
        old = path.rename(free_name(path, "old"))
        print(f"{path} is of an earlier run, it is {old} now")


class Weights:
    """Writes weights into a folder while a model trains.

    What cannot be written is a warning, and training goes on. One process of many writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._failures: dict[Path, OSError] = {}

    def save(self, module: nn.Module, name: str, metadata: Mapping[str, str]) -> None:
        """Write `FOLDER/name`, in place of what this run wrote there."""
        if processes.rank():
            return
        path = self.folder / name
        try:
            save_weights(module, path, metadata)
            self._failures.pop(path, None)
        except OSError as error:
            self._failures[path] = error
            print(f"\nwarning: cannot write the weights {path}: {error}", file=sys.stderr)

    def failure(self) -> str:
        """Which files do not hold what they should, and why; empty if all do."""
        return "; ".join(
            f"cannot write the weights {path}: {error}" for path, error in self._failures.items()
        )
