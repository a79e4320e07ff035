"""What is installed and usable here: `python -m moat_kernels.info`, with `--json` for programs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import moat_kernels
from moat_kernels.extension import build_record, load_extension, reason_cuda_unusable
from moat_kernels.ops.triton_support import user_table

# Names as Linux prints them in /proc/cpuinfo: those that decide which kernel runs, and how fast.
_CPU_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    "amx_fp16",
    *("asimd", "asimdhp", "bf16", "sve", "sve2", "i8mm"),
)


def collect() -> dict[str, Any]:
    """The facts a measurement or a bug report needs, made of JSON's types only.

    Keys: `versions` (None where not installed), `extension`, `cpu`, `gpus` (one entry per CUDA
    device, memory in bytes), `launch_table` (the user's: its `path` and, by the GPU's name, how
    many `launches` are used and why others are `ignored`) and `backends` (by name: `usable`, and
    `reason` where not).
    """
    # Here, because the registry itself asks about the extension.
    from moat_kernels.ops.common.backends import backend_status

    return {
        "versions": {
            "moat_kernels": moat_kernels.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": _installed_version("triton"),
        },
        "platform": platform.platform(),
        "extension": _extension(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "launch_table": _launch_table(),
        "backends": {
            name: {"usable": status.usable, "reason": status.reason}
            for name, status in backend_status().items()
        },
    }


def format_text(facts: dict[str, Any]) -> str:
    """The result of `collect` for people: one fact a line."""
    cpu, extension = facts["cpu"], facts["extension"]
    lines = [
        f"{name:<14}{version or 'not installed'}" for name, version in facts["versions"].items()
    ]
    lines += [
        f"{'platform':<14}{facts['platform']}",
        f"{'CPU':<14}{cpu['name']}, {cpu['cores']} cores usable, {cpu['threads']} torch threads",
        f"{'features':<14}{' '.join(cpu['features']) or 'not known on this system'}",
    ]
    lines += [
        f"{'GPU':<14}{gpu['name']}, compute capability {gpu['compute_capability']}, "
        f"{gpu['memory_bytes'] / 2**30:.1f} GiB"
        for gpu in facts["gpus"]
    ] or [f"{'GPU':<14}none that torch can use"]
    if extension["usable"]:
        lines.append(
            f"{'extension':<14}usable, instruction set {extension['instruction_set']}, built by "
            f"{extension['compiler']} against torch {extension['torch']}"
        )
        lines.append(f"{'CUDA kernels':<14}{_cuda_kernels(extension)}")
    else:
        lines.append(f"{'extension':<14}not usable: {extension['reason']}")
    table = facts["launch_table"]
    lines += [
        f"{'launch table':<14}{_used_launches(table['path'], gpu)}"
        for gpu in table["gpus"].values()
    ] or [f"{'launch table':<14}the static one: there is no GPU"]
    lines.append("backends")
    for name, backend in facts["backends"].items():
        state = "usable" if backend["usable"] else f"not usable: {backend['reason']}"
        lines.append(f"  {name:<12}{state}")
    return "\n".join(lines)


def _cuda_kernels(extension: dict[str, Any]) -> str:
    reason = extension["reason_cuda_unusable"]
    if not extension["cuda_architectures"]:
        return reason
    architectures = ", ".join(f"sm_{number}" for number in extension["cuda_architectures"])
    return f"for {architectures}" + (f"; not usable: {reason}" if reason else "")


def _used_launches(path: str, gpu: dict[str, Any]) -> str:
    used = f"{gpu['launches']} launches of {path}" if gpu["launches"] else "the static one"
    ignored = "".join(f"; ignored: {reason}" for reason in gpu["ignored"])
    return f"{used}{ignored}"


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> dict[str, Any]:
    status = load_extension()
    if not status.usable:
        return dataclasses.asdict(status)
    try:
        instruction_set = torch.ops.moat_kernels.cpu_isa()
    except RuntimeError as error:  # MOAT_KERNELS_CPU_ISA asks for what cannot be had.
        return {"usable": False, "reason": str(error)}
    record = build_record()
    return {
        "usable": True,
        "reason": "",
        "instruction_set": instruction_set,
        "compiler": record.get("compiler", "an unrecorded compiler"),
        "torch": record.get("torch", "an unrecorded version"),
        "cuda_architectures": record.get("cuda_architectures", []),
        "reason_cuda_unusable": reason_cuda_unusable(),
    }


def _cpu() -> dict[str, Any]:
    described = _proc_cpuinfo()
    # x86 calls the list "flags", Arm calls it "Features".
    present = (described.get("flags") or described.get("Features", "")).split()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "name": described.get("model name") or platform.processor() or platform.machine(),
        "features": [feature for feature in _CPU_FEATURES if feature in present],
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _proc_cpuinfo() -> dict[str, str]:
    """The first processor's entry of Linux's /proc/cpuinfo; empty on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first_entry = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first_entry.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _gpus() -> list[dict[str, Any]]:
    # device_count is 0 in a build without CUDA and on a machine without a driver.
    properties = [
        torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())
    ]
    return [
        {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_bytes": gpu.total_memory,
        }
        for gpu in properties
    ]


def _launch_table() -> dict[str, Any]:
    gpus = {}
    for gpu in _gpus():
        section = user_table.read(gpu["name"])
        gpus[gpu["name"]] = {"launches": len(section.launches), "ignored": list(section.ignored)}
    return {"path": user_table.location(), "gpus": gpus}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the facts; the command line of `python -m moat_kernels.info`."""
    parser = argparse.ArgumentParser(prog="python -m moat_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    facts = collect()
    if parser.parse_args(arguments).json:
        print(json.dumps(facts, indent=2))
    else:
        print(format_text(facts))


if __name__ == "__main__":
    main()
