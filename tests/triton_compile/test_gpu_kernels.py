"""Production launches compiled without a GPU: no spills, tensor cores in use, table current.

The table in docs/ has every kernel for every architecture and dtype, which take a quarter of an
hour to compile. Here all launches are compared with it, and of some pairs of an architecture and a
dtype one of each kernel is compiled. What that takes is compared too, under the version of Triton
that the table was made with: every version allots registers in its own way.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton
from support.compile_only_driver import AMD, Usage, amd_vector_spills, compile_launches
from support.gpu_kernels import (
    COMPILED,
    OPS,
    SUMMARY,
    compile_for,
    faults,
    read_table,
    record,
    representatives,
    row_key,
    summarise,
    table_triton,
)

each_op = pytest.mark.parametrize("op", OPS)
each_pair = pytest.mark.parametrize(("arch", "dtype"), COMPILED, ids=str)
# Every architecture and every dtype is among them.
some_pairs = pytest.mark.parametrize(
    ("arch", "dtype"),
    [(80, "float32"), (90, "bfloat16"), (100, "bfloat16"), (120, "float16")],
    ids=str,
)
# What the assertions below say when they fail.
OUTDATED = "the kernels or their launches changed: run `python benchmarks/gpu_kernels.py`"


@each_op
@each_pair
def test_the_table_has_what_is_launched(op: str, arch: int, dtype: str) -> None:
    launched = {row_key(op, dtype, launch) for launch in record(op, arch, dtype)}
    listed = {
        key for key, usages in read_table().items() if key[:2] == (op, dtype) and arch in usages
    }
    assert launched == listed, OUTDATED


@each_op
@some_pairs
def test_what_compiles_today_is_right_and_in_the_table(op: str, arch: int, dtype: str) -> None:
    launches = representatives(record(op, arch, dtype))
    table, comparable = read_table(), triton.__version__ == table_triton()
    for launch, usage in zip(launches, compile_for(launches, arch), strict=True):
        assert not faults(op, dtype, arch, launch.kernel, usage)
        if comparable:
            assert table[row_key(op, dtype, launch)][arch] == usage, OUTDATED


def test_nothing_in_the_table_is_wrong() -> None:
    table = read_table()
    combinations = {
        (op, arch, dtype) for (op, dtype, *_), usages in table.items() for arch in usages
    }
    assert combinations == {(op, arch, dtype) for op in OPS for arch, dtype in COMPILED}
    for (op, dtype, kernel, *_), usages in table.items():
        for arch, usage in usages.items():
            assert not faults(op, dtype, arch, kernel, usage)


@pytest.mark.parametrize(
    ("usage", "fault"),
    [
        (Usage(255, 16, 1024, 8, 4), "16 bytes of registers spilled"),
        (Usage(64, 0, 102400, 8, 4), "102400 bytes of shared memory, 101376 fit"),
        (Usage(64, 0, 1024, 0, 4), "not on tensor cores"),
        (Usage(64, 0, 1024, 8, 4), None),
    ],
)
def test_faults_are_seen(usage: Usage, fault: str | None) -> None:
    found = faults("mbconv", "bfloat16", 120, "expand_kernel", usage)
    assert found == ([] if fault is None else [f"expand_kernel, bfloat16, sm_120: {fault}"])


def test_the_summary_is_the_tables() -> None:
    assert SUMMARY.read_text() == summarise(read_table(), table_triton()), OUTDATED


@each_op
def test_amd(op: str) -> None:
    launches = representatives(record(op, AMD, "bfloat16"))
    for launch, kernel in zip(launches, compile_launches(launches, AMD), strict=True):
        assert amd_vector_spills(kernel) == 0, launch.kernel


def test_every_kernel_of_mbconv_is_among_them() -> None:
    names = {launch.kernel for launch in record("mbconv", 90, "bfloat16")}
    assert names == OPS["mbconv"].without_product | {
        "expand_kernel",
        "project_kernel",
        "project_input_kernel",
        "project_weight_kernel",
        "expand_products_kernel",
        "fold_gradient_kernel",
        "correction_kernel",
        "expand_input_kernel",
    }
