"""The record of a build, where moat_kernels.extension looks for it."""

from __future__ import annotations

import importlib.metadata
import json
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from build_support import cuda
from build_support.environment import compiler, reason_not_built
from build_support.flags import ISA_FLAGS


def source_hashes() -> dict[str, str]:
    """See moat_kernels/source_hashes.py, whose package cannot be imported where torch is not."""
    module = runpy.run_path("moat_kernels/source_hashes.py")
    hashes: dict[str, str] = module["source_hashes"](Path())
    return hashes


def discard_outdated(objects: Path, sources: dict[str, str]) -> bool:
    """Remove the last record, and also the objects if some are of other sources that look older.

    ninja goes by times alone: it would keep those. Files that were copied or unpacked with their
    old times look so. Returns whether the objects were removed.
    """
    # Until the next record, nobody knows what a library in this checkout was built from.
    _path(Path()).unlink(missing_ok=True)
    stamp = objects / "sources.json"
    built = json.loads(stamp.read_text()) if stamp.exists() else {}
    changed = [path for path, value in sources.items() if built.get(path) != value]
    outdated = objects.exists() and any(
        not stamp.exists() or Path(path).stat().st_mtime <= stamp.stat().st_mtime
        for path in changed
    )
    if outdated:
        shutil.rmtree(objects)
    objects.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(sources))
    return outdated


def write(root: Path, sources: dict[str, str] | None = None) -> None:
    """Write what was built, or why not, for the package below `root`; say so if not.

    sources: hashes of what the library in a checkout was built from.
    """
    path = _path(root)
    record: dict[str, Any] = {"reason_not_built": reason_not_built()}
    if record["reason_not_built"]:
        print(
            f"moat_kernels: native CPU kernels not built: {record['reason_not_built']}. "
            "Everything else works, with stock PyTorch operations on the CPU.",
            file=sys.stderr,
        )
        if path.exists() and path.with_name("_C.abi3.so").exists():
            return  # the library of an earlier build is still there, and this is its record
    else:
        command = shlex.split(str(compiler()))
        version = subprocess.check_output([*command, "--version"], text=True)
        record["compiler"] = version.splitlines()[0]
        record["torch"] = importlib.metadata.version("torch")
        record["instruction_sets"] = list(ISA_FLAGS)
        record["reason_cuda_not_built"] = cuda.reason_cuda_not_built()
        if not record["reason_cuda_not_built"]:
            record["cuda_architectures"] = [number for number, _ in cuda.architectures()]
            record["cuda_ptx"] = [number for number, ptx in cuda.architectures() if ptx]
        if sources is not None:
            record["sources"] = sources
    path.write_text(json.dumps(record, indent=2) + "\n")


def _path(root: Path) -> Path:
    return root / "moat_kernels" / "_build_record.json"
