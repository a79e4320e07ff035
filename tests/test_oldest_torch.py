"""csrc/ compiles against the headers of the oldest PyTorch: what came later is an error."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from support import nvcc, oldest

from build_support.environment import TORCH_TARGET_VERSION

CSRC = nvcc.ROOT / "csrc"
# Those of csrc/cpu/isa include nothing of PyTorch's.
SOURCES = sorted((*CSRC.glob("*.cpp"), *CSRC.glob("cpu/host/*.cpp")))
CUDA_SOURCES = sorted(CSRC.glob("cuda/*.cpp"))
INCLUDE = oldest.TORCH_HEADERS / oldest.INCLUDE

pytestmark = [
    pytest.mark.skipif(
        bool(oldest.reason_no_torch_headers()), reason=oldest.reason_no_torch_headers()
    ),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
]


def errors(source: Path, *flags: str) -> str:
    """What g++ says about a source for the oldest PyTorch's stable ABI."""
    includes = (INCLUDE, INCLUDE / "torch" / "csrc" / "api" / "include")
    command = [
        *("g++", "-fsyntax-only", "-std=c++17", "-fvisibility=hidden", f"-I{CSRC}"),
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION:#018x}",
        *(f"-isystem{path}" for path in (*includes, sysconfig.get_path("include"))),
        *(*flags, str(source)),
    ]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_native_kernels_compile(source: Path) -> None:
    assert not errors(source)


@pytest.mark.skipif(not nvcc.nvcc_version(), reason="there is no nvcc, whose headers it needs")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_the_cuda_binding_compiles(source: Path) -> None:
    assert not errors(source, *nvcc.include_flags())


def test_what_came_after_the_oldest_would_be_noticed(tmp_path: Path) -> None:
    source = tmp_path / "newer.cpp"
    source.write_text(
        "#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n"
        "#include <torch/csrc/stable/accelerator.h>\n"
        "void check(AOTITorchError code) { STABLE_TORCH_ERROR_CODE_CHECK(code); }\n"
    )
    assert "STABLE_TORCH_ERROR_CODE_CHECK" in errors(source)
