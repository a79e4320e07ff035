"""Launch tables: the static ones, what goes before them, and the user's file."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moat_kernels import info
from moat_kernels.ops.mbconv.triton.launch_table import GemmBlocks, gemm_blocks
from moat_kernels.ops.triton_support import choice, launching, user_table
from moat_kernels.ops.triton_support.choice import choosing
from moat_kernels.ops.triton_support.launch_table import LAUNCH_TABLES, LaunchTable, Problem
from moat_kernels.ops.triton_support.user_table import Entry
from moat_kernels.ops.window_attention.triton.launch_table import attention_blocks

GPU = "Some GPU"
VERSIONS = {"triton": "3.9.0", "moat_kernels": "1.0"}
PROBLEM = Problem("mbconv", "expand", torch.bfloat16, (4096, 512, 128))
MEASURED = GemmBlocks(256, 64, 64, 8, 4)
ROWS = torch.empty(1, dtype=torch.bfloat16, device="meta")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's table on a machine with a GPU."""
    monkeypatch.delenv(user_table.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(user_table, "versions", lambda: VERSIONS)
    monkeypatch.setattr(choice, "device_name", lambda _: GPU)
    user_table.chooser.cache_clear()
    yield tmp_path / "moat_kernels" / "launches.json"
    user_table.chooser.cache_clear()


def read_launch() -> GemmBlocks:
    """That of PROBLEM, without its sizes being powers of 2."""
    return gemm_blocks("expand", ROWS, 4000, 400, 96)


STATIC = GemmBlocks(128, 128, 32, 8, 3)


@pytest.mark.parametrize("table", LAUNCH_TABLES.values(), ids=LAUNCH_TABLES)
def test_every_static_launch_is_among_the_choices(table: LaunchTable) -> None:
    for launches in (table.launches, *table.exceptions.values()):
        for key, blocks in launches.items():
            assert key in table.launches
            for name, value in dataclasses.asdict(blocks).items():
                assert value in table.choices[name], (key, name)


@pytest.mark.parametrize("table", LAUNCH_TABLES.values(), ids=LAUNCH_TABLES)
def test_every_kernel_has_launches_for_16_and_32_bits(table: LaunchTable) -> None:
    kernels = {(kernel, size) for kernel, _, size in table.launches}
    assert {(kernel, width, size) for kernel, size in kernels for width in (2, 4)} == set(
        table.launches
    )


def test_neighbours_differ_by_one_step_of_one_field() -> None:
    neighbours = list(LAUNCH_TABLES["mbconv"].neighbours(GemmBlocks(256, 128, 32, 8, 1)))
    assert neighbours == [
        GemmBlocks(128, 128, 32, 8, 1),
        GemmBlocks(256, 64, 32, 8, 1),
        GemmBlocks(256, 256, 32, 8, 1),
        GemmBlocks(256, 128, 16, 8, 1),
        GemmBlocks(256, 128, 64, 8, 1),
        GemmBlocks(256, 128, 32, 4, 1),
        GemmBlocks(256, 128, 32, 16, 1),
        GemmBlocks(256, 128, 32, 8, 2),
    ]


def test_exceptions_of_an_architecture(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {}
    for number in (90, 100, 103):
        monkeypatch.setattr(launching, "_architecture", lambda _, number=number: number)
        stages[number] = attention_blocks("key_value", ROWS, 1, 49, 3, 32).stages
    assert stages == {90: 2, 100: 1, 103: 1}


def test_blocks_do_not_exceed_what_they_cover() -> None:
    assert gemm_blocks("expand", ROWS, 20, 24, 3) == GemmBlocks(32, 32, 16, 8, 3)


def test_choosing_goes_before_the_tables() -> None:
    seen = []
    with choosing(lambda problem, static: seen.append((problem, static)) or MEASURED):
        assert read_launch() == MEASURED
    assert seen == [(PROBLEM, STATIC)]
    assert read_launch() == STATIC


def test_what_was_written_is_used_on_the_same_gpu(file: Path) -> None:
    assert read_launch() == STATIC
    assert user_table.write(GPU, [Entry(PROBLEM, MEASURED, 10.0, 20.0)]) == file
    assert read_launch() == MEASURED
    assert gemm_blocks("expand", ROWS, 5000, 400, 96) == STATIC
    assert gemm_blocks("expand", ROWS.float(), 4000, 400, 96) != MEASURED
    assert user_table.chooser("Another GPU") is None


def test_writing_keeps_what_was_not_measured_again(file: Path) -> None:
    other = dataclasses.replace(PROBLEM, kernel="project")
    user_table.write("Another GPU", [Entry(PROBLEM, STATIC, 1.0, 1.0)])
    user_table.write(GPU, [Entry(PROBLEM, STATIC, 1.0, 1.0), Entry(other, MEASURED, 1.0, 2.0)])
    user_table.write(GPU, [Entry(PROBLEM, MEASURED, 10.0, 20.0)])
    assert user_table.read(GPU).launches == {PROBLEM: MEASURED, other: MEASURED}
    assert user_table.read("Another GPU").launches == {PROBLEM: STATIC}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_another_version_is_ignored_with_one_warning(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_table.write(GPU, [Entry(PROBLEM, MEASURED, 10.0, 20.0)])
    monkeypatch.setattr(user_table, "versions", lambda: {**VERSIONS, "triton": "3.8.0"})
    with pytest.warns(UserWarning, match=r"measured with triton 3\.9\.0.*while triton 3\.8\.0"):
        assert read_launch() == STATIC
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_launch() == STATIC
    # Measured again, the old section goes.
    user_table.write(GPU, [Entry(PROBLEM, MEASURED, 10.0, 20.0)])
    assert read_launch() == MEASURED
    assert len(json.loads(file.read_text())["sections"]) == 1


GOOD = {
    "op": "mbconv",
    "kernel": "expand",
    "dtype": "torch.bfloat16",
    "sizes": [4096, 512, 128],
    "blocks": dataclasses.asdict(MEASURED),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "softmax"}, "op must be one of mbconv, window_attention, layer_norm"),
        ({"kernel": "contract"}, "mbconv has no kernel 'contract'"),
        ({"kernel": ["expand"]}, "mbconv has no kernel"),
        ({"op": ["mbconv"]}, "op must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"sizes": [0, 2, 2]}, "sizes must be positive integers"),
        ({"sizes": "many"}, "sizes must be positive integers"),
        ({"blocks": {"rows": 128}}, "blocks must have rows, columns, depth, warps, stages"),
        ({"blocks": {**GOOD["blocks"], "rows": 100}}, "rows must be one of 16, 32"),
        ({"blocks": {**GOOD["blocks"], "warps": True}}, "warps must be one of"),
        ({"blocks": {**GOOD["blocks"], "stages": [2]}}, "stages must be one of"),
    ],
    ids=str,
)
def test_a_wrong_entry_is_named_and_the_others_are_used(
    change: dict, message: str, file: Path
) -> None:
    file.parent.mkdir()
    header = {"device": GPU, **VERSIONS}
    file.write_text(json.dumps({"sections": [{**header, "launches": [{**GOOD, **change}, GOOD]}]}))
    with pytest.warns(UserWarning, match=message):
        assert read_launch() == MEASURED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", 'it has no list of "sections"'),
        ('{"sections": [3]}', 'it has no list of "sections"'),
        ('{"sections": [{"device": "Some GPU"}]}', "measured with triton None"),
        (
            json.dumps({"sections": [{"device": GPU, **VERSIONS, "launches": [1]}]}),
            "1 is not a launch",
        ),
        (
            json.dumps({"sections": [{"device": GPU, **VERSIONS, "launches": 7}]}),
            "launches must be a list",
        ),
    ],
)
def test_a_broken_file_is_named(content: str, message: str, file: Path) -> None:
    file.parent.mkdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match=message) as caught:
        assert read_launch() == STATIC
    assert len(caught) == 1 and str(file) in str(caught[0].message)


def test_a_file_that_is_named_must_exist(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert user_table.path() == file
    assert read_launch() == STATIC
    monkeypatch.setenv(user_table.ENVIRONMENT_VARIABLE, "")  # as if it were not set
    assert user_table.read(GPU).ignored == ()
    monkeypatch.setenv(user_table.ENVIRONMENT_VARIABLE, str(tmp_path / "my.json"))
    user_table.chooser.cache_clear()
    with pytest.warns(UserWarning, match=r"my.json: there is no such file"):
        assert read_launch() == STATIC


def test_info_tells_what_is_in_use(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": GPU, "compute_capability": "9.0", "memory_bytes": 2**30}
    monkeypatch.setattr(info, "_gpus", lambda: [gpu])

    def line() -> str:
        lines = info.format_text(info.collect()).splitlines()
        (found,) = [text for text in lines if text.startswith("launch table")]
        return found

    assert line() == "launch table  the static one"
    path = user_table.write(GPU, [Entry(PROBLEM, MEASURED, 10.0, 20.0)])
    assert line() == f"launch table  1 launches of {path}"
    monkeypatch.setattr(user_table, "versions", lambda: {**VERSIONS, "moat_kernels": "2.0"})
    assert line().startswith("launch table  the static one; ignored: measured with triton 3.9.0")


def test_info_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_gpus", list)
    assert "launch table  the static one: there is no GPU" in info.format_text(info.collect())
