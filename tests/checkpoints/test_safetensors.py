"""The .safetensors format, against its own library and against hostile files."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.hostile import SPECIAL_FILES, make_special_file, peak_of_refusal

from moat_kernels.checkpoints import (
    CheckpointError,
    load_safetensors,
    safetensors_header,
    save_safetensors,
)
from moat_kernels.checkpoints.safetensors import load_metadata

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.complex64,
    torch.bool,
]


def example_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (3,), (2, 5), (4, 0, 3), (1, 2, 3, 4)]
    return {
        f"{dtype}/{shape}": (torch.randn(shape, generator=generator) * 9).to(dtype)
        for dtype in DTYPES
        for shape in shapes
    }


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def record(
    dtype: Any = "F32", shape: Sequence[Any] = (2,), offsets: Sequence[int] = (0, 8)
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def assert_same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name], tensor), name


def test_round_trip(tmp_path: Path) -> None:
    path, tensors = tmp_path / "all.safetensors", example_tensors()
    save_safetensors(tensors, path, {"made by": "a test"})
    assert_same(load_safetensors(path), tensors)
    assert load_metadata(path) == {"made by": "a test"}
    assert os.listdir(tmp_path) == ["all.safetensors"]


@pytest.mark.parametrize("metadata", [b"{}", b'{"__metadata__":null}'])
def test_a_file_without_metadata(tmp_path: Path, metadata: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(file_of(metadata))
    assert load_metadata(tmp_path / "x.safetensors") == {}


def test_metadata_of_another_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(file_of(b'{"__metadata__":{"epoch":3}}'))
    with pytest.raises(CheckpointError, match="__metadata__ does not map strings"):
        load_metadata(tmp_path / "x.safetensors")


def test_the_reference_library_reads_our_files(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors")
    reader = pytest.importorskip("safetensors.torch")
    path, tensors = tmp_path / "ours.safetensors", example_tensors()
    save_safetensors(tensors, path, {"made by": "a test"})
    assert_same(reader.load_file(path), tensors)
    with library.safe_open(path, "pt") as file:
        assert file.metadata() == {"made by": "a test"}


def test_we_read_files_of_the_reference_library(tmp_path: Path) -> None:
    writer = pytest.importorskip("safetensors.torch")
    path, tensors = tmp_path / "theirs.safetensors", example_tensors()
    writer.save_file(tensors, path, {"format": "pt"})
    assert_same(load_safetensors(path), tensors)


def test_views_and_shared_storage_are_written_in_full(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "same": base, "transposed": base.T, "part": base[1:, ::2]}
    save_safetensors(tensors, tmp_path / "views.safetensors")
    assert_same(load_safetensors(tmp_path / "views.safetensors"), tensors)


def test_parameters_are_saved_as_plain_tensors(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    save_safetensors(dict(layer.named_parameters()), tmp_path / "layer.safetensors")
    loaded = load_safetensors(tmp_path / "layer.safetensors")
    assert_same(loaded, layer.state_dict())
    assert not loaded["weight"].requires_grad


def test_the_data_is_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors({"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2)}, path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0
    assert list(load_safetensors(path)) == ["b", "a"], "wider dtypes come first"


def test_unaligned_files_are_read_into_aligned_memory(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    header = {"a": record("U8", (1,), (0, 1)), "b": record("F32", (1,), (1, 5))}
    path.write_bytes(file_of(header, b"\x07" + struct.pack("<f", 2.5)))
    loaded = load_safetensors(path)
    assert_same(loaded, {"a": torch.tensor([7], dtype=torch.uint8), "b": torch.tensor([2.5])})
    assert loaded["b"].data_ptr() % 4 == 0


def test_empty_tensors_need_no_alignment(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    header = {
        "a": record("U8", (1,), (0, 1)),
        "b": record("F32", (0,), (1, 1)),
        "c": record("F64", (4, 0, 3), (1, 1)),
    }
    path.write_bytes(file_of(header, b"\x07"))
    expected = {"b": torch.empty(0), "c": torch.empty(4, 0, 3, dtype=torch.float64)}
    assert_same(load_safetensors(path), {"a": torch.tensor([7], dtype=torch.uint8)} | expected)


RECORD = json.dumps({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]})


@pytest.mark.parametrize(
    "content",
    [
        file_of({"e": record("F64", (0,), (1, 1)), "b": record("U8", (1,), (0, 1))}, b"\x07"),
        file_of({"z": record(), "a": record(shape=(0,), offsets=(0, 0))}, bytes(8)),
        file_of({"z": record(), "a": record(offsets=(8, 16))}, bytes(16)),
        file_of({"y": record(offsets=(8, 16)), "b": record()}, bytes(16)),
        file_of({"": record()}, bytes(8)),
        file_of({'é"\\\n\U0001f600': record()}, bytes(8)),
        file_of({"x": record(shape=[1] * 70 + [2])}, bytes(8)),
        file_of({"x": record() | {"more": [{"}": 1}]}}, bytes(8)),
        file_of({"x": record(), "__metadata__": {"a": "b\n", "": ""}}, bytes(8)),
        file_of({"__metadata__": None}),
        file_of(b'{"__metadata__":{"a":"1","a":"2"}}'),
        file_of(b" \n{} \t\r\n"),
        file_of(f'{{ "x" :\n{RECORD}\t}} '.encode(), bytes(8)),
        file_of({"x": record("F8_E8M0", (8,))}, bytes(8)),
        file_of({"x": record("C64", (1,))}, bytes(8)),
    ],
    ids=lambda content: repr(content[8:60]),
)
def test_what_the_reference_library_reads_is_read_alike(tmp_path: Path, content: bytes) -> None:
    reader = pytest.importorskip("safetensors.torch")
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert_same(load_safetensors(path), reader.load_file(path))


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors({"x": torch.ones(5)}, path)
    load_safetensors(path)["x"].zero_()
    assert torch.equal(load_safetensors(path)["x"], torch.ones(5))


def test_a_loaded_file_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors({"x": torch.ones(5)}, path)
    loaded = load_safetensors(path)
    save_safetensors({"x": loaded["x"] * 2}, path)
    assert torch.equal(loaded["x"], torch.ones(5))
    assert torch.equal(load_safetensors(path)["x"], torch.full((5,), 2.0))


@pytest.mark.parametrize(
    ("tensors", "metadata", "complaint"),
    [
        ({"x": torch.ones(1).cdouble()}, None, "'x' has dtype torch.complex128"),
        ({"x": [1.0]}, None, "'x' is a list, not a tensor"),
        ({1: torch.ones(1)}, None, "1 cannot be the name"),
        ({"__metadata__": torch.ones(1)}, None, "'__metadata__' cannot be the name"),
        ({"x": torch.ones(1, device="meta")}, None, "'x' is torch.strided on meta"),
        ({"x": torch.eye(2).to_sparse()}, None, "'x' is torch.sparse_coo"),
        ({"x": torch.ones(1)}, {"epoch": 3}, "metadata must map strings to strings"),
    ],
)
def test_what_cannot_be_saved_leaves_no_file(
    tmp_path: Path, tensors: Any, metadata: Any, complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        save_safetensors(tensors, tmp_path / "x.safetensors", metadata)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors({"x": torch.ones(1)}, path)

    def no_space(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="no space left"):
        save_safetensors({"x": torch.zeros(1)}, path)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert torch.equal(load_safetensors(path)["x"], torch.ones(1))


TWO = bytes(8)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "shorter than the length of its header"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "a header of 727905341920923785 bytes is announced"),
        (file_of(b"{}", length=1 << 63), "a header of 9223372036854775808 bytes"),
        (file_of(b"{}", length=3), "a header of 3 bytes is announced, 2 bytes follow"),
        (file_of(b"[]"), "not a JSON object"),
        (file_of(b"{"), "not valid JSON"),
        (file_of(b"{}{}"), "not valid JSON"),
        (file_of(b"{}\0"), "not valid JSON"),
        (file_of(b'{"a":\xff}'), "not valid JSON"),
        (file_of(b'{"a\n":{}}'), "not valid JSON"),
        (file_of(b'{"\\ud800":' + RECORD.encode() + b"}", TWO), "not valid JSON"),
        (file_of(b'{"__metadata__":{"a":"b"'), "not valid JSON"),
        (file_of(b'{"a":{"b":[}}'), "not valid JSON"),
        (file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "'a' is not described by"),
        (file_of(b'{"a":{"b":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"), "valid JSON"),
        (file_of(b'{"a":' + b"9" * 10_000 + b"}"), "'a' is not described by"),
        (file_of(f'{{"a":{RECORD},"a":{RECORD}}}'.encode(), TWO), "key 'a' twice"),
        (file_of(f'{{"a":{RECORD[:-1]},"shape":[2]}}}}'.encode(), TWO), "key 'shape' twice"),
        (file_of({"n" * 5000: record()}, TWO), "a name of 5000 characters"),
        (file_of({"x": 3}), "'x' is not described by"),
        (file_of({"x": {"dtype": "F32", "shape": [2]}}, TWO), "'x' is not described by"),
        (file_of({"x": record("F4")}, TWO), "'x' has dtype 'F4'; supported are F64"),
        (file_of({"x": record(["F32"])}, TWO), "'x' has dtype"),
        (file_of({"x": record(shape=[-2])}, TWO), r"impossible shape \[-2\]"),
        (file_of({"x": record(shape=[2.0])}, TWO), "impossible shape"),
        (file_of({"x": record(shape=[True, 2])}, TWO), "impossible shape"),
        (file_of({"x": record(shape=[1 << 40, 1 << 40, 0], offsets=(0, 0))}), "impossible shape"),
        (file_of({"x": record(shape=[1] * 5000, offsets=(0, 4))}, bytes(4)), "at most 4096 char"),
        (file_of({"x": record(offsets=(0, 8, 8))}, TWO), "impossible data_offsets"),
        (file_of({"x": record(offsets=(-8, 0))}, TWO), "impossible data_offsets"),
        (file_of({"x": record(shape=[3])}, TWO), r"F32 of shape \[3\] takes 12 bytes"),
        (file_of({"x": record(offsets=(8, 0))}, TWO), "takes 8 bytes"),
        (file_of({"x": record(shape=[1 << 40], offsets=(0, 1 << 42))}, TWO), "the file has 8"),
        (file_of({"x": record()}, bytes(9)), "take 8 bytes, the file has 9"),
        (file_of({"x": record()}, bytes(7)), "take 8 bytes, the file has 7"),
        (file_of({"x": record(offsets=(8, 16))}, bytes(16)), "'x' begins at byte 8"),
        (file_of({"x": record(), "y": record()}, TWO), "'y' begins at byte 0.*expected 8"),
        (
            file_of({"x": record(), "y": record(offsets=(4, 12))}, bytes(12)),
            "'y' begins at byte 4 of the data, expected 8 .a gap or an overlap",
        ),
        (file_of({"__metadata__": {"a": 1}}), "__metadata__ does not map strings"),
        (file_of({"__metadata__": []}), "__metadata__ does not map strings"),
        (file_of({"x": record("BOOL", (2,), (0, 2))}, b"\1\2"), "bytes other than 0 and 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_damaged_hostile_and_foreign_files(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: .*({complaint})"):
        load_safetensors(path)


MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b'{"a":[' + b"[]," * (MEGABYTE // 3) + b"[]]}", "not described"),
        (b'{"a":{"shape":[' + b"[]," * (MEGABYTE // 3) + b"[]]}}", "at most 4096 characters"),
        (b'{"__metadata__":{"a":{' + b'"":[],' * (MEGABYTE // 6), "does not map strings"),
        (b'{"__metadata__":{"a":"' + b"\\n" * (MEGABYTE // 2) + b'"}}x', "not valid JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "header",
)
def test_a_header_takes_a_small_multiple_of_its_size(
    tmp_path: Path, header: bytes, complaint: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(header))
    # The bytes, their text and one string of it; a JSON parser takes up to 30 times the size.
    assert peak_of_refusal(lambda: load_safetensors(path), complaint) < 5 * MEGABYTE


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ({str(i): record("U8", (0,), (0, 0)) for i in range(11)}, "more than 10 tensors"),
        ({"__metadata__": {str(i): "" for i in range(11)}}, "has more than 10 keys"),
    ],
    ids=["tensors", "metadata"],
)
def test_no_more_entries_than_a_checkpoint_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: dict[str, Any], complaint: str
) -> None:
    monkeypatch.setattr(safetensors_header, "_MAXIMUM_ENTRIES", 10)
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(header))
    with pytest.raises(CheckpointError, match=complaint):
        load_safetensors(path)


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="has 100000001 bytes, at most 100000000 are read"):
        load_safetensors(path)


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_only_regular_files_are_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    make_special_file(kind, path, monkeypatch)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: {SPECIAL_FILES[kind]}, not a"):
        load_safetensors(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors({"x": torch.ones(3), "y": torch.ones(2, dtype=torch.int64)}, path)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            load_safetensors(path)


def test_flipped_bits_of_the_header_raise_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors({"x": torch.ones(3), "y": torch.ones(2, dtype=torch.int64)}, path, {"a": "b"})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    generator = random.Random(0)
    for bit in range(0, 8 * (8 + length), 3):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        damaged[generator.randrange(8 + length)] ^= generator.randrange(2)
        path.write_bytes(damaged)
        try:
            tensors = load_safetensors(path)
        except CheckpointError:
            continue
        # A header has no checksum: a name or a dtype can change, but never the amount of data.
        assert sum(tensor.nbytes for tensor in tensors.values()) == 28
