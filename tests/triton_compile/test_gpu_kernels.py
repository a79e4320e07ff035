"""Production launches compiled without a GPU: no spills, tensor cores in use, table current."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.compile_only_driver import (
    AMD,
    MULTIPROCESSORS,
    amd_vector_spills,
    compile_only,
)
from support.gpu_kernels import (
    COMPILED,
    DOCUMENT,
    OPS,
    Compiled,
    collect,
    format_tables,
)

each_op = pytest.mark.parametrize("op", OPS)
each_compilation = pytest.mark.parametrize(("arch", "dtype"), COMPILED, ids=str)


def multiplies_on_tensor_cores(op: str, kernel: Compiled, dtype: torch.dtype) -> bool:
    exact = dtype == torch.float32 and OPS[op].exact_float32
    return not exact and kernel.launch.kernel not in OPS[op].without_product


@each_op
@each_compilation
def test_nothing_spills_and_shared_memory_fits(op: str, arch: int, dtype: torch.dtype) -> None:
    kernels = collect(op, arch, dtype)
    assert kernels
    for kernel in kernels:
        assert kernel.usage.stack == 0, kernel
        assert kernel.usage.shared_memory <= MULTIPROCESSORS[arch].shared_memory_per_block, kernel


@each_op
@each_compilation
def test_products_are_on_tensor_cores(op: str, arch: int, dtype: torch.dtype) -> None:
    for kernel in collect(op, arch, dtype):
        on_tensor_cores = kernel.usage.tensor_core_instructions > 0
        assert on_tensor_cores == multiplies_on_tensor_cores(op, kernel, dtype), kernel


@each_op
def test_amd(op: str) -> None:
    with compile_only(AMD) as launches:
        OPS[op].launch(torch.bfloat16)
    for launch in {launch.key: launch for launch in launches}.values():
        assert amd_vector_spills(launch) == 0, launch.kernel


def test_every_kernel_of_mbconv_is_among_them() -> None:
    names = {kernel.launch.kernel for kernel in collect("mbconv", 80, torch.bfloat16)}
    assert names == OPS["mbconv"].without_product | {
        "covariance_kernel",
        "expand_kernel",
        "project_kernel",
        "project_input_kernel",
        "project_weight_kernel",
        "expand_weight_kernel",
        "expand_input_kernel",
    }


def test_the_table_is_current() -> None:
    """If this fails, the kernels or their launches changed: run `benchmarks/gpu_kernels.py`."""
    assert DOCUMENT.read_text() == format_tables()
