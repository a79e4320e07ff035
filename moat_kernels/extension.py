"""Loads the native library, and says why not where its kernels cannot be used."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

from moat_kernels.source_hashes import source_hashes

# The library is built against this version's stable ABI (setup.py): it runs on it and on newer.
MINIMUM_TORCH = "2.11"
# How the reason begins where a checkout's library was built from other sources than lie there.
OUTDATED = "built from other sources"

_LIBRARY = "moat_kernels._C"
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the native CPU kernels can be called in this process, and if not, why not."""

    usable: bool
    reason: str = ""


def build_record() -> dict[str, Any]:
    """What the build wrote about the native kernels; empty in a tree that was never built.

    Keys: `reason_not_built` (empty if they were built), and if they were: `compiler`, `torch` (the
    version whose headers were used), `instruction_sets`, `reason_cuda_not_built`; if the CUDA
    kernels were built, `cuda_architectures`, such as [80, 90], and `cuda_ptx`, those with PTX for
    newer GPUs; in a checkout `sources`, as of `source_hashes`.
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
    if importlib.util.find_spec(_LIBRARY) is None:
        why = build_record().get("reason_not_built") or "the package has no compiled library"
        return ExtensionStatus(False, f"not built: {why}")
    # Asked first: ops of other sources may clash with those that this package registers.
    if changed := _changed_sources():
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return ExtensionStatus(
            False, f"{OUTDATED} ({changed[0]}{others}): run `python setup.py build_ext --inplace`"
        )
    try:
        importlib.import_module(_LIBRARY)
    except ImportError as error:
        return ExtensionStatus(False, f"failed to load: {error}")
    return ExtensionStatus(True)


@functools.cache
def reason_cuda_unusable() -> str:
    """Why the CUDA kernels cannot be called in this process; empty if they can.

    Every build of torch loads a library that has them: this says where they are of use.
    """
    status, record = load_extension(), build_record()
    if not status.usable:
        return status.reason
    if not record.get("cuda_architectures"):
        return f"not built: {record.get('reason_cuda_not_built') or 'an older build'}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    problem: str = torch.ops.moat_kernels.cuda_problem()
    return problem


def _changed_sources() -> list[str]:
    """The sources in this checkout that are not those which the library was built from."""
    built, present = build_record().get("sources", {}), source_hashes(_ROOT)
    if not present:
        return []  # installed: the library and this package were made of the same sources
    return sorted({path for path, _ in built.items() ^ present.items()})
