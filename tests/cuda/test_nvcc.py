"""The CUDA kernels compiled for every architecture: nothing spills, and the table is true.

What docs/cuda_kernels.csv has of the same sources, flags and compiler is not compiled again.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from support import nvcc

pytestmark = pytest.mark.skipif(not nvcc.nvcc_version(), reason="there is no nvcc")


def test_every_kernel_is_compiled_for_every_architecture() -> None:
    names = {kernel.name for kernel in nvcc.all_kernels()}
    assert len(nvcc.all_kernels()) == len(names) * len(nvcc.ARCHITECTURES)
    kinds = ("identity", "gelu")
    for stride, dtype, kind in product((1, 2), ("float32", "bfloat16", "float16"), kinds):
        assert f"depthwise_backward_kernel<{dtype}, {kind}, {stride}>" in names
        for output_kind in kinds:
            assert f"depthwise_forward_kernel<{dtype}, {kind}, {output_kind}, {stride}>" in names
    for dtype in ("bfloat16", "float16"):
        assert {f"expand_depthwise_kernel<{dtype}, {stride}>" for stride in (1, 2)} <= names


def test_nothing_spills_and_16_warps_fit() -> None:
    for kernel in nvcc.all_kernels():
        assert kernel.spilled_bytes == 0, kernel
        assert kernel.shared_bytes <= nvcc.MOST_STATIC_SHARED_BYTES, kernel
        assert kernel.warps >= 16, kernel


def test_a_spill_would_be_noticed(tmp_path: Path) -> None:
    original = nvcc.ROOT / "csrc" / "cuda" / "expand_depthwise.cu"
    text = original.read_text()
    crowded = tmp_path / original.name
    # Twice the threads must fit: half the registers.
    crowded.write_text(
        text.replace("__launch_bounds__(kThreads, 2)", "__launch_bounds__(kThreads, 4)")
    )
    assert crowded.read_text() != text
    assert any(kernel.spilled_bytes for kernel in nvcc.compile_kernels(crowded, (80,)))


def test_pixels_are_loaded_at_once_and_products_made_on_tensor_cores() -> None:
    for kernel in nvcc.all_kernels():
        if kernel.name.startswith("depthwise"):
            # A lane's two channels of every map and phase: 4 bytes in 16 bits, 8 in float32.
            assert kernel.loads_of_pairs >= 6, kernel
        if kernel.name.startswith("expand"):
            # Two steps of depth times 8 tiles of 16 x 8; copies of x and of the weight.
            assert kernel.matrix_multiplies >= 16, kernel
            assert kernel.asynchronous_copies >= 2, kernel


def test_the_documented_table_is_that_of_these_sources() -> None:
    documented = nvcc.documented_table()
    version = f"nvcc {nvcc.nvcc_version()}:"
    if version not in documented:
        pytest.skip(f"the table was made by another compiler than {version[:-1]}")
    assert nvcc.documented() and documented == nvcc.table(), "run: python tests/support/nvcc.py"
