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

# Kernels without a matrix product.
NO_PRODUCT = {"fold_table_kernel"}

each_op = pytest.mark.parametrize("op", OPS)
each_compilation = pytest.mark.parametrize(("arch", "dtype"), COMPILED, ids=str)


def multiplies_in_low_precision(kernel: Compiled, dtype: torch.dtype) -> bool:
    return dtype != torch.float32 and kernel.launch.kernel not in NO_PRODUCT


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
        assert on_tensor_cores == multiplies_in_low_precision(kernel, dtype), kernel


@each_op
def test_amd(op: str) -> None:
    with compile_only(AMD) as launches:
        OPS[op](torch.bfloat16)
    for launch in {launch.key: launch for launch in launches}.values():
        assert amd_vector_spills(launch) == 0, launch.kernel


def test_the_table_is_current() -> None:
    """If this fails, the kernels or their launches changed: run `benchmarks/gpu_kernels.py`."""
    assert DOCUMENT.read_text() == format_tables()
