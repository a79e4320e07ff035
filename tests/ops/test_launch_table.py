"""Launch tables: the static ones, what goes before them, and the user's file."""

from __future__ import annotations

import dataclasses
import json
import os
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
from moat_kernels.ops.triton_support.user_table import Entry, LaunchTableError
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
    warps = {}
    for number in (90, 100, 103):
        monkeypatch.setattr(launching, "_architecture", lambda _, number=number: number)
        warps[number] = attention_blocks("gradient", ROWS, 1, 49, 3, 32).warps
    assert warps == {90: 4, 100: 8, 103: 8}


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
    with pytest.warns(UserWarning, match=r"measured with triton '3\.9\.0'.*while triton '3\.8\.0"):
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
        ({"dtype": ["torch.bfloat16"]}, "dtype must be one of"),
        ({"dtype": None}, "dtype must be one of"),
        ({"sizes": [0, 2, 2]}, "sizes must be powers of 2"),
        ({"sizes": [-4, 2, 2]}, "sizes must be powers of 2"),
        ({"sizes": [4096, 512, 100]}, "sizes must be powers of 2"),
        ({"sizes": [4096, 512, True]}, "sizes must be powers of 2"),
        ({"sizes": [4096, 512, 128.0]}, "sizes must be powers of 2"),
        ({"sizes": "many"}, "sizes must be powers of 2"),
        ({"sizes": [10**1000]}, "sizes must be powers of 2"),
        ({"blocks": {"rows": 128}}, "blocks must have rows, columns, depth, warps, stages"),
        ({"blocks": {**GOOD["blocks"], "rows": 100}}, "rows must be one of 16, 32"),
        ({"blocks": {**GOOD["blocks"], "warps": True}}, "warps must be one of"),
        ({"blocks": {**GOOD["blocks"], "warps": 4.0}}, "warps must be one of"),
        ({"blocks": {**GOOD["blocks"], "warps": -4}}, "warps must be one of"),
        ({"blocks": {**GOOD["blocks"], "warps": float("nan")}}, "warps must be one of"),
        ({"blocks": {**GOOD["blocks"], "stages": [2]}}, "stages must be one of"),
        ({"blocks": {**GOOD["blocks"], "stages": 10**1000}}, "stages must be one of"),
    ],
    ids=str,
)
def test_a_wrong_entry_is_named_and_the_others_are_used(
    change: dict, message: str, file: Path
) -> None:
    file.parent.mkdir()
    header = {"device": GPU, **VERSIONS}
    file.write_text(json.dumps({"sections": [{**header, "launches": [{**GOOD, **change}, GOOD]}]}))
    with pytest.warns(UserWarning, match=message) as caught:
        assert read_launch() == MEASURED
    assert len(caught) == 1 and len(str(caught[0].message)) < 1000
    # What is measured next replaces what was wrong.
    user_table.write(GPU, [Entry(PROBLEM, STATIC, 1.0, 1.0)])
    assert user_table.read(GPU) == user_table.Section({PROBLEM: STATIC})


def in_sections(*launches: object) -> str:
    """A launch table of one section for each list of launches."""
    header = {"device": GPU, **VERSIONS}
    return json.dumps({"sections": [{**header, "launches": each} for each in launches]})


OTHER = {**GOOD, "blocks": dataclasses.asdict(STATIC)}


@pytest.mark.parametrize("launches", [([GOOD, OTHER],), ([GOOD], [OTHER])], ids=["list", "section"])
def test_of_two_launches_for_a_problem_the_first_is_used(file: Path, launches: tuple) -> None:
    file.parent.mkdir()
    file.write_text(in_sections(*launches))
    with pytest.warns(UserWarning, match=r"expand: sizes \[4096, 512, 128\] are there twice"):
        assert read_launch() == MEASURED


def test_thousands_of_wrong_entries_are_counted(file: Path) -> None:
    file.parent.mkdir()
    file.write_text(in_sections([{"op": "x" * 10_000, "kernel": {}}] * 1000))
    with pytest.warns(UserWarning, match="997 more like these") as caught:
        assert read_launch() == STATIC
    assert len(str(caught[0].message)) < 1000


def nested(depth: int) -> str:
    return '{"sections": ' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[]", 'it has no list of "sections"'),
        ("NaN", 'it has no list of "sections"'),
        ("null", 'it has no list of "sections"'),
        ("true", 'it has no list of "sections"'),
        ('{"sections": {}}', 'it has no list of "sections"'),
        ('{"sections": [], "sections": []}', "'sections' is there twice"),
        (nested(100_000), "nested too deeply"),
        (nested(900), "nested too deeply"),  # as deep as reading can go, but not writing
        ("[" * 100_000, "nested too deeply"),
        ("9" * 10_000, "Exceeds the limit"),
        (b"\xff\xfe\xfd", "can't decode"),
        ('{"sections": [3]}', 'it has no list of "sections"'),
        ('{"sections": [{"device": "Some GPU"}]}', "measured with triton None"),
        (in_sections([1]), "1 is not a launch"),
        (in_sections(7), "launches must be a list"),
    ],
    ids=range(17),
)
def test_a_broken_file_is_named(
    content: str | bytes, message: str, file: Path, gpus: list[str]
) -> None:
    file.parent.mkdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_ignored_once(file, message)
    assert message in launch_table_line()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the GPUs that `info` finds."""
    names = [GPU]

    def found() -> list[dict]:
        return [
            {"name": name, "compute_capability": "9.0", "memory_bytes": 2**30} for name in names
        ]

    monkeypatch.setattr(info, "_gpus", found)
    return names


def launch_table_line() -> str:
    """What `python -m moat_kernels.info` says of launch tables."""
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == facts
    (found,) = [
        line for line in info.format_text(facts).splitlines() if line.startswith("launch table")
    ]
    return found


def assert_ignored_once(file: Path | str, message: str) -> None:
    """The static launch is used, and one warning names the file and the reason."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert read_launch() == STATIC
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(f"launch table {file}: ") and message in text


def make_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.mkdir()


def make_pipe(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(file)


def make_loop(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.symlink_to(file)


def forbid_reading(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(file, monkeypatch, "read_bytes")


def forbid_the_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(file, monkeypatch, "stat")  # before Python 3.14 `exists` raises this too


def forbid(file: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """As if this user might not call a method of `file`; root, who runs CI, may."""
    file.touch()
    original = getattr(Path, method)

    def refusing(self: Path, *arguments: object, **options: object) -> object:
        if self == file:
            raise PermissionError(13, "Permission denied", str(file))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, method, refusing)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_folder, "it is no file"),
        (make_pipe, "it is no file"),
        (make_loop, "symbolic links"),
        (forbid_reading, "Permission denied"),
        (forbid_the_folder, "Permission denied"),
    ],
)
def test_what_cannot_be_read_is_named(
    make, message: str, file: Path, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.parent.mkdir()
    make(file, monkeypatch)
    assert_ignored_once(file, message)
    assert message in launch_table_line()
    with pytest.raises(LaunchTableError, match=message):
        user_table.write(GPU, [Entry(PROBLEM, MEASURED, 10.0, 20.0)])


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container run under a user id that it does not know."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "home", home)


def test_without_a_home_the_static_launches_are_used(gpus: list[str], homeless: None) -> None:
    assert_ignored_once("~/.config/moat_kernels/launches.json", "no home folder")
    assert "no home folder" in launch_table_line()
    gpus.clear()
    assert launch_table_line() == "launch table  the static one: there is no GPU"
    with pytest.raises(LaunchTableError, match="no home folder"):
        user_table.write(GPU, [])


def test_without_a_home_a_named_table_is_used(
    file: Path, homeless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(user_table.ENVIRONMENT_VARIABLE, str(file))
    user_table.write(GPU, [Entry(PROBLEM, MEASURED, 10.0, 20.0)])
    assert read_launch() == MEASURED


def test_gpus_of_two_kinds_share_one_warning(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.mkdir()
    file.write_text("{")
    assert_ignored_once(file, "Expecting property name")
    monkeypatch.setattr(choice, "device_name", lambda _: "Another GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_launch() == STATIC


@pytest.mark.parametrize("content", ["my notes", '{"my": "settings"}', nested(900)], ids=len)
def test_writing_leaves_a_file_that_is_no_launch_table(content: str, file: Path) -> None:
    file.parent.mkdir()
    file.write_text(content)
    for write in (user_table.check_writable, lambda: user_table.write(GPU, [])):
        with pytest.raises(LaunchTableError):
            write()
    assert file.read_text() == content
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_writing_that_fails_leaves_the_file_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_table.write(GPU, [Entry(PROBLEM, MEASURED, 10.0, 20.0)])

    def write_half(self: Path, text: str, **options: object) -> None:
        self.write_bytes(text.encode()[:40])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(LaunchTableError, match=r"cannot be written: .*No space left"):
        user_table.write(GPU, [Entry(PROBLEM, STATIC, 1.0, 1.0)])
    assert user_table.read(GPU).launches == {PROBLEM: MEASURED}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_writing_follows_a_link(file: Path, tmp_path: Path) -> None:
    file.parent.mkdir()
    file.symlink_to(tmp_path / "elsewhere.json")
    user_table.write(GPU, [Entry(PROBLEM, MEASURED, 10.0, 20.0)])
    assert file.is_symlink() and (tmp_path / "elsewhere.json").is_file()
    assert read_launch() == MEASURED


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


def test_info_tells_what_is_in_use(
    file: Path, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch_table_line() == "launch table  the static one"
    path = user_table.write(GPU, [Entry(PROBLEM, MEASURED, 10.0, 20.0)])
    assert launch_table_line() == f"launch table  1 launches of {path}"
    monkeypatch.setattr(user_table, "versions", lambda: {**VERSIONS, "moat_kernels": "2.0"})
    assert launch_table_line().startswith(
        "launch table  the static one; ignored: measured with triton '3.9.0'"
    )
