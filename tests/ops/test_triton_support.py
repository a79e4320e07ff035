"""What the Triton backends share, as far as it needs no kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moat_kernels import use_backend
from moat_kernels.ops.common.device import planning
from moat_kernels.ops.triton_support import launching
from moat_kernels.ops.triton_support.traffic import Part, Pass, record_passes


class _Kernel:
    """Stands for a Triton kernel: records its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.fn = test_the_package_imports_without_triton  # a kernel's name is its function's

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments, **options: self.launches.append((grid, arguments, options))


def test_the_package_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import moat_kernels"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_launch_passes_on_grid_arguments_and_options() -> None:
    kernel, x = _Kernel(), torch.zeros(3)
    launching.launch(kernel, (2, 1), x, 7, reads=(x,), writes=(), num_warps=8)
    (launch,) = kernel.launches
    assert launch == ((2, 1), (x, 7), {"num_warps": 8, "enable_fp_fusion": True})


def test_nothing_is_launched_for_an_empty_grid_or_fake_tensors() -> None:
    kernel = _Kernel()
    launching.launch(kernel, (0, 4), torch.zeros(3), reads=(), writes=())
    with FakeTensorMode():
        launching.launch(kernel, (1,), torch.zeros(3), reads=(), writes=())
    assert not kernel.launches


def passes_of(**options) -> list[Pass]:
    with FakeTensorMode(), record_passes() as passes:
        x, y = torch.zeros(4, 3, dtype=torch.bfloat16), torch.zeros(6)
        launching.launch(
            *(_Kernel(), (1,), x, y, 7, None),
            reads=(x, None, x),
            writes=(Part(y, 2, 3),),
            **options,
        )
    return passes


def test_a_recorded_pass_adds_up_what_crosses_memory() -> None:
    (one,) = passes_of(flops=5, PRECISION="ieee")
    assert [(*crossing.shape, crossing.bytes) for crossing in one.reads] == [(4, 3, 24)]
    assert [crossing.bytes for crossing in one.writes] == [16]
    assert (one.bytes, one.flops, one.arithmetic) == (40, 5, "bfloat16")
    assert passes_of()[0].arithmetic == "float32"


def test_a_tensor_that_no_one_declared_is_named() -> None:
    x, y = torch.zeros(3), torch.zeros(2, 5)
    with record_passes(), pytest.raises(ValueError, match=r"argument 1, .* shape \(2, 5\)"):
        launching.launch(_Kernel(), (1,), x, y, reads=(x,), writes=(y[:1],))


@pytest.mark.skipif(bool(launching.triton_missing()), reason=launching.triton_missing())
def test_planning_takes_meta_tensors_for_a_gpu_s(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernel, x = _Kernel(), torch.empty(3, device="meta")
    assert launching.unsupported_tensor(x) == "tensors on meta"
    with planning(90), use_backend("triton"):
        assert launching.unsupported_tensor(x) == ""
        assert launching.architecture(x.device) == 90
        launching.launch(kernel, (1,), x, reads=(x,), writes=())
        assert launching.unsupported_tensor(torch.zeros(1)) == "tensors on cpu"
    assert not kernel.launches
    launching.launch(kernel, (1,), x, reads=(x,), writes=())
    assert len(kernel.launches) == 1


def test_other_devices_and_dtypes_are_refused_with_a_reason(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert launching.unsupported_tensor(torch.zeros(1)) == "tensors on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launching.unsupported_tensor(torch.zeros(1)) == ""
    assert launching.unsupported_tensor(torch.zeros(1).double()) == "dtype torch.float64"


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("setting", ["fp32_precision", "allow_tf32"])
def test_the_precision_of_float32_products_is_read_however_it_was_set(
    setting: str, precision: str
) -> None:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    value = precision if setting == "fp32_precision" else precision == "tf32"
    try:
        setattr(products, setting, value)
        assert launching.multiplies_as_tf32() == (precision == "tf32")
    finally:
        products.fp32_precision = before


def test_an_absent_or_old_triton_is_named(monkeypatch) -> None:
    def version(name: str) -> str:
        raise launching.importlib.metadata.PackageNotFoundError

    unwrapped = launching.triton_missing.__wrapped__
    monkeypatch.setattr(launching.importlib.metadata, "version", lambda _: "3.5.1")
    assert unwrapped() == "triton 3.5.1 is installed; at least 3.6 is needed"
    monkeypatch.setattr(launching.importlib.metadata, "version", version)
    assert unwrapped() == "triton is not installed"
