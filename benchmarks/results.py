"""Reading benchmark results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEBIBYTE = 2**20

# {group: {contender: extra_info}}
Groups = dict[str, dict[str, dict[str, Any]]]


def load(path: Path) -> tuple[Groups, dict[str, Any]]:
    """The groups of a pytest-benchmark JSON file, and the facts of its machine."""
    contents = json.loads(path.read_text())
    groups: Groups = {}
    for entry in contents["benchmarks"]:
        info = entry["extra_info"]
        groups.setdefault(entry["group"], {})[info["contender"]] = info
    return groups, contents["machine_info"]["moat_kernels"]


def describe(facts: dict[str, Any]) -> str:
    """The machine and the versions, in one line."""
    cpu, versions = facts["cpu"], facts["versions"]
    kernels = facts["extension"].get("instruction_set", "none")
    peers = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
    measured = facts.get("measured", {"is_gpu": False, "dtype": "float32"})
    gpu = f"on {measured['device']}" if measured["is_gpu"] else "no GPU was used"
    installed = [f"{name} {versions[key]}" for key, name in peers.items() if versions.get(key)]
    return ", ".join(
        [
            f"{cpu['name']}, native kernels {kernels}",
            f"{cpu['threads']} threads",
            f"torch {versions['torch']}",
            *installed,
            f"moat_kernels {versions['moat_kernels']}; {measured['dtype']}; {gpu}",
        ]
    )
