"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from moat_kernels.info import collect

PEERS = ("openvino", "onnxruntime", "timm", "torchvision", "vit-pytorch")


def facts() -> dict[str, Any]:
    """What `python -m moat_kernels.info` collects, and the peers' versions (None: missing)."""
    collected = collect()
    for package in PEERS:
        try:
            collected["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            collected["versions"][package] = None
    return collected


def summary() -> dict[str, Any]:
    """What every benchmark records of them."""
    collected = facts()
    return {
        "device": collected["cpu"]["name"],
        "threads": collected["cpu"]["threads"],
        "instruction_set": collected["extension"].get("instruction_set", "none"),
        "versions": collected["versions"],
    }
