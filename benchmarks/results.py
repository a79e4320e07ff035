"""Benchmark results as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

MEBIBYTE = 2**20

# {group: {contender: extra_info}}
Groups = dict[str, dict[str, dict[str, Any]]]

LINES_SUFFIX = ".jsonl"


class Results(NamedTuple):
    """What was measured, the facts of the machine, and why contenders failed.

    failures: {group: {contender: reason}}.
    """

    groups: Groups
    facts: dict[str, Any]
    failures: dict[str, dict[str, str]]


class ResultLines:
    """A file of JSON lines: what pytest-benchmark writes at the end, but at once.

    The first line has the machine's facts as "machine_info", each other the "group" and the
    "extra_info" of a contender; of one that failed this has the reason as "failure". A later line
    of a contender replaces an earlier one.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        path.write_text(_line({"machine_info": {"moat_kernels": facts}}))

    def write(self, group: str, info: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(_line({"group": group, "extra_info": info}))


def _line(contents: dict[str, Any]) -> str:
    return json.dumps(contents) + "\n"


def load(path: Path) -> Results:
    """A file of pytest-benchmark, or of `ResultLines` if it is called so."""
    text = path.read_text()
    if path.suffix == LINES_SUFFIX:
        # A run that was killed may have left half a line.
        head, *entries = (
            json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")
        )
    else:
        head = json.loads(text)
        entries = head["benchmarks"]
    results = Results({}, head["machine_info"]["moat_kernels"], {})
    for entry in entries:
        group, info = entry["group"], entry["extra_info"]
        name = info["contender"]
        if "failure" in info:
            results.failures.setdefault(group, {})[name] = info["failure"]
            results.groups.get(group, {}).pop(name, None)
        elif "skipped" not in info:
            results.groups.setdefault(group, {})[name] = info
    return results


def is_gpu(facts: dict[str, Any]) -> bool:
    """Whether a GPU was measured; results of before it could be say nothing of it."""
    return facts.get("measured", {}).get("is_gpu", False)


def describe(facts: dict[str, Any]) -> str:
    """The machine and the versions, in one line."""
    cpu, versions = facts["cpu"], facts["versions"]
    kernels = facts["extension"].get("instruction_set", "none")
    peers = {
        "openvino": "OpenVINO",
        "nncf": "NNCF",
        "onnxruntime": "ONNX Runtime",
        "zentorch": "zentorch",
    }
    measured = facts.get("measured", {"is_gpu": False, "dtype": "float32"})
    gpu = f"on {measured['device']}" if is_gpu(facts) else "no GPU was used"
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
