"""The CUDA kernels compiled for every architecture: nothing spills, loops are short, tables true.

What docs/cuda_kernels.csv has of the same sources, flags and compiler is not compiled again.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from support import nvcc

pytest.importorskip("triton", reason="its wheel has the disassembler")

pytestmark = pytest.mark.skipif(not nvcc.nvcc_version(), reason="there is no nvcc")
OUTDATED = "run: python tests/support/nvcc.py"
# Instructions for each element of the input, as training launches the stencils: what nvcc 13.0
# makes, and a few percent for other compilers. Who makes a loop shorter lowers its budget.
BUDGETS = [
    ("depthwise_forward_kernel", 1, 41),
    ("depthwise_forward_kernel", 2, 24),
    ("depthwise_backward_kernel", 1, 62),
    ("depthwise_backward_kernel", 2, 38),
]


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


@pytest.mark.parametrize(("kernel", "stride", "most"), BUDGETS)
def test_a_stencil_keeps_its_budget_of_instructions(kernel: str, stride: int, most: int) -> None:
    activations = nvcc.TRAINED[kernel]
    trained = {
        f"{kernel}<{', '.join((dtype, *activations, str(stride)))}>"
        for dtype in ("float32", "bfloat16", "float16")
    }
    counted = [one for one in nvcc.all_kernels() if one.name in trained]
    assert len(counted) == len(trained) * len(nvcc.ARCHITECTURES)
    for one in counted:
        assert one.instructions_per_element <= most, one


def test_no_stencil_of_any_activation_issues_more_than_was_planned() -> None:
    for kernel in nvcc.all_kernels():
        if kernel.name.startswith("depthwise"):
            most = 110 if "backward" in kernel.name else 60
            assert 0 < kernel.instructions_per_element <= most, kernel


def test_the_documented_tables_are_those_of_these_sources() -> None:
    version = f"nvcc {nvcc.nvcc_version()}:"
    if version not in nvcc.documented_table(nvcc.REGISTERS_TABLE):
        pytest.skip(f"the tables were made by another compiler than {version[:-1]}")
    assert nvcc.documented(), OUTDATED
    for start, table in nvcc.TABLES.items():
        assert nvcc.documented_table(start) == table(), OUTDATED
