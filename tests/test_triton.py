"""Triton kernels: tests/triton_kernels and tests/triton_compile, in processes of their own.

Triton decides when it is imported whether it interprets or compiles. Both folders can also be
given to pytest by themselves; it does not enter them otherwise. Where `make oldest` has fetched the
oldest Triton, it runs a selection of them: every kernel, and each dtype.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import oldest

from moat_kernels.ops.triton_support.launching import triton_missing

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(bool(triton_missing()), reason=triton_missing())


class _Run:
    """pytest at work in another process, on one folder, with `variables` in its environment."""

    def __init__(self, folder: str, interpret: bool, log: Path, *options: str, **variables) -> None:
        self.log = log
        environment = {**os.environ, **variables, "TRITON_INTERPRET": str(int(interpret))}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v"]
        command += [*options, TESTS / folder]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def check(self) -> None:
        """Wait; print what pytest printed; at least one test ran and none failed."""
        status = self.process.wait()
        output = self.log.read_text()
        print(output)
        assert status == 0, "see the captured output"
        assert re.search(r"\b[1-9]\d* passed", output)


@pytest.fixture(scope="module")
def without_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, _Run]]:
    """Both at once, one core each."""
    logs = tmp_path_factory.mktemp("triton")
    runs = {
        "interpreter": _Run("triton_kernels", True, logs / "interpreter"),
        "compile": _Run("triton_compile", False, logs / "compile"),
    }
    yield runs
    for run in runs.values():
        run.process.kill()


@pytest.mark.parametrize("name", ["interpreter", "compile"])
def test_without_a_gpu(name: str, without_gpu: dict[str, _Run]) -> None:
    without_gpu[name].check()


@pytest.mark.skipif(bool(oldest.reason_no_triton()), reason=oldest.reason_no_triton())
def test_under_the_oldest_triton(tmp_path: Path) -> None:
    """What may differ from the newest: each kernel interpreted in every dtype, and compiled once.

    How kernels are put together, and what surrounds them, is the same Python under both.
    """
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join((str(oldest.TRITON), *([inherited] if inherited else [])))
    version = "import triton; print(triton.__version__)"
    environment = {**os.environ, "PYTHONPATH": path}
    used = subprocess.check_output([sys.executable, "-c", version], env=environment, text=True)
    assert used.strip() == oldest.TRITON_VERSION
    runs = (
        _Run(
            "triton_kernels", True, tmp_path / "interpreter", "-m", "oldest_triton", PYTHONPATH=path
        ),
        _Run("triton_compile", False, tmp_path / "compile", "-k", "compiles", PYTHONPATH=path),
    )
    try:
        for run in runs:
            run.check()
    finally:
        for run in runs:
            run.process.kill()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_on_the_gpu(tmp_path: Path) -> None:
    _Run("triton_kernels", False, tmp_path / "log").check()
