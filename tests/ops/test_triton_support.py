"""What the Triton backends share, as far as it needs no kernel."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moat_kernels.ops.triton_support import launching


class _Kernel:
    """Stands for a Triton kernel: records its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments, **options: self.launches.append((grid, arguments, options))


def test_the_package_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import moat_kernels"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_launch_passes_on_grid_arguments_and_options() -> None:
    kernel, x = _Kernel(), torch.zeros(3)
    launching.launch(kernel, (2, 1), x, 7, num_warps=8)
    (launch,) = kernel.launches
    assert launch == ((2, 1), (x, 7), {"num_warps": 8, "enable_fp_fusion": True})


def test_nothing_is_launched_for_an_empty_grid_or_fake_tensors() -> None:
    kernel = _Kernel()
    launching.launch(kernel, (0, 4), torch.zeros(3))
    with FakeTensorMode():
        launching.launch(kernel, (1,), torch.zeros(3))
    assert not kernel.launches


def test_other_devices_and_dtypes_are_refused_with_a_reason(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert launching.unsupported_tensor(torch.zeros(1)) == "tensors on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launching.unsupported_tensor(torch.zeros(1)) == ""
    assert launching.unsupported_tensor(torch.zeros(1).double()) == "dtype torch.float64"


def test_an_absent_or_old_triton_is_named(monkeypatch) -> None:
    def version(name: str) -> str:
        raise launching.importlib.metadata.PackageNotFoundError

    unwrapped = launching.triton_missing.__wrapped__
    monkeypatch.setattr(launching.importlib.metadata, "version", lambda _: "3.6.0")
    assert unwrapped() == "triton 3.6.0 is installed; at least 3.7 is needed"
    monkeypatch.setattr(launching.importlib.metadata, "version", version)
    assert unwrapped() == "triton is not installed"
