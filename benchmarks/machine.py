"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from device import chosen, measured_dtype

from moat_kernels.info import collect

PEERS = (
    *("openvino", "nncf", "onnxruntime", "zentorch"),
    *("timm", "torchvision", "vit-pytorch"),
)


def facts() -> dict[str, Any]:
    """What `python -m moat_kernels.info` collects, the peers' versions (None: missing), and
    what was `measured`: the device and the dtype.
    """
    collected = collect()
    for package in PEERS:
        try:
            collected["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            collected["versions"][package] = None
    on_gpu = chosen() == "cuda"
    collected["measured"] = {
        "device": torch.cuda.get_device_name() if on_gpu else collected["cpu"]["name"],
        "is_gpu": on_gpu,
        "dtype": str(measured_dtype()).removeprefix("torch."),
    }
    return collected


def summary() -> dict[str, Any]:
    """What every benchmark records of them."""
    collected = facts()
    return {
        "device": collected["measured"]["device"],
        "dtype": collected["measured"]["dtype"],
        "threads": collected["cpu"]["threads"],
        "instruction_set": collected["extension"].get("instruction_set", "none"),
        "versions": collected["versions"],
    }
