"""`python -m moat_kernels.info`: complete, printable, and JSON on request."""

from __future__ import annotations

import json

import pytest
import torch

import moat_kernels
from moat_kernels import info
from moat_kernels.extension import ExtensionStatus
from moat_kernels.ops.common.backends import BackendStatus


def test_collect_survives_json_and_names_this_process() -> None:
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["moat_kernels"] == moat_kernels.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["cpu"]["cores"] >= 1
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["backends"]["reference"] == {"usable": True, "reason": ""}


def test_unusable_parts_are_printed_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = {"torch": BackendStatus(True), "triton": BackendStatus(False, "no CUDA device")}
    monkeypatch.setattr("moat_kernels.ops.common.backends.backend_status", lambda: backends)
    monkeypatch.setattr(
        info, "load_extension", lambda: ExtensionStatus(False, "not built: skipped")
    )
    text = info.format_text(info.collect())
    assert "extension     not usable: not built: skipped" in text
    assert "  torch       usable" in text
    assert "  triton      not usable: no CUDA device" in text


def test_a_gpu_is_printed_with_its_memory() -> None:
    gpu = {"name": "GPU X", "compute_capability": "9.0", "memory_bytes": 80 * 2**30}
    text = info.format_text({**info.collect(), "gpus": [gpu]})
    assert "GPU           GPU X, compute capability 9.0, 80.0 GiB" in text


def test_cpu_features_are_read_from_both_spellings(monkeypatch: pytest.MonkeyPatch) -> None:
    x86 = {"model name": "Some CPU", "flags": "fpu avx2 fma sse2"}
    monkeypatch.setattr(info, "_proc_cpuinfo", lambda: x86)
    assert info.collect()["cpu"]["name"] == "Some CPU"
    assert info.collect()["cpu"]["features"] == ["avx2", "fma"]
    monkeypatch.setattr(info, "_proc_cpuinfo", lambda: {"Features": "fp asimd bf16"})
    assert info.collect()["cpu"]["features"] == ["asimd", "bf16"]


def test_the_command_line_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    info.main([])
    assert capsys.readouterr().out.startswith(f"moat_kernels  {moat_kernels.__version__}\n")
    info.main(["--json"])
    assert json.loads(capsys.readouterr().out)["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("architectures", "reason", "line"),
    [
        ([80, 90], "", "CUDA kernels  for sm_80, sm_90"),
        ([80], "no driver", "CUDA kernels  for sm_80; not usable: no driver"),
        ([], "not built: no nvcc", "CUDA kernels  not built: no nvcc"),
    ],
)
def test_the_cuda_kernels_are_printed_or_why_not(
    architectures: list[int], reason: str, line: str
) -> None:
    facts = info.collect()
    facts["extension"] = {
        "usable": True,
        "instruction_set": "avx2",
        "compiler": "g++",
        "torch": "2.13",
        "cuda_architectures": architectures,
        "reason_cuda_unusable": reason,
    }
    assert line in info.format_text(facts).splitlines()
