"""Loads the native CPU kernels, and says why not where they cannot be used."""

from __future__ import annotations

import functools
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

# What Python calls; a library that lacks one was built from older sources.
NATIVE_OPS = (
    "cpu_isa",
    "cpu_release_memory",
    "cpu_release_scratch",
    "cpu_mbconv_eval",
    "cpu_stem_eval",
    "cpu_mbconv_train_front",
    "cpu_mbconv_train_pool",
    "cpu_mbconv_train_project",
    "cpu_mbconv_train_backward_gated",
    "cpu_mbconv_train_backward",
    "cpu_window_attention_forward",
    "cpu_window_attention_backward",
    "cpu_linear_forward",
    "cpu_linear_backward",
)

# The library is built against this version's stable ABI (setup.py): it runs on it and on newer.
MINIMUM_TORCH = "2.11"


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the native CPU kernels can be called in this process, and if not, why not."""

    usable: bool
    reason: str = ""


def build_record() -> dict[str, Any]:
    """What the build wrote about the native kernels; empty in a tree that was never built.

    Keys: `reason_not_built` (empty if they were built), and if they were: `compiler`, `torch` (the
    version whose headers were used), `instruction_sets`, `reason_cuda_not_built` and, if the CUDA
    kernels were built, `cuda_architectures`, such as [80, 90].
    """
    path = Path(__file__).with_name("_build_record.json")
    if not path.exists():
        return {}
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@functools.cache
def load_extension() -> ExtensionStatus:
    """Register the native ops `torch.ops.moat_kernels.*`. Tries once a process; never raises."""
    if TorchVersion(torch.__version__) < MINIMUM_TORCH:
        return ExtensionStatus(
            False, f"torch {torch.__version__} is installed; at least {MINIMUM_TORCH} is needed"
        )
    try:
        importlib.import_module("moat_kernels._C")
    except ModuleNotFoundError:
        why = build_record().get("reason_not_built") or "the package has no compiled library"
        return ExtensionStatus(False, f"not built: {why}")
    except ImportError as error:
        return ExtensionStatus(False, f"failed to load: {error}")
    missing = [name for name in NATIVE_OPS if not hasattr(torch.ops.moat_kernels, name)]
    if missing:
        return ExtensionStatus(False, f"built from older sources, without {', '.join(missing)}")
    return ExtensionStatus(True)
