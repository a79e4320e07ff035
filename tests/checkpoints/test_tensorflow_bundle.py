"""TensorFlow checkpoints: the golden one bit for bit, and every kind of damage and hostility."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from checkpoints.bundle_writer import (
    BFLOAT16,
    STRING,
    bytes_field,
    fixed32_field,
    header_record,
    integer_field,
    table,
    table_of_blocks,
    tensor_record,
    write_bundle,
    write_raw_bundle,
)
from checkpoints.bundle_writer import (
    entry as table_entry,
)
from checkpoints.hostile import SPECIAL_FILES, make_special_file, peak_of_refusal
from support.golden import variable_values

from moat_kernels.checkpoints import CheckpointError, TensorBundle, save_safetensors
from moat_kernels.checkpoints.files import open_regular

# The seed of the model whose weights the golden checkpoint holds.
GOLDEN_SEED = 21
FLOAT32 = 1
ONE_RESTART = struct.pack("<II", 0, 1)


def index_of(prefix: Path) -> Path:
    return Path(f"{prefix}.index")


def data_of(prefix: Path) -> Path:
    return Path(f"{prefix}.data-00000-of-00001")


def flip(path: Path, position: int, mask: int) -> None:
    """Flip bits of one byte; a second call restores it."""
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ mask]))


def test_golden_checkpoint_bit_for_bit(golden_folder: Path) -> None:
    bundle = TensorBundle(golden_folder)
    shapes = json.loads((golden_folder / "names.json").read_text())
    assert {name: list(entry.shape) for name, entry in bundle.entries.items()} == shapes
    assert bundle.skipped == {}
    assert bundle["global_step"] == 1234
    assert bundle["global_step"].dtype == np.int64
    for name in shapes.keys() - {"global_step"}:
        array, expected = bundle[name], variable_values(name, shapes[name], GOLDEN_SEED)
        assert array.dtype == expected.dtype and array.shape == expected.shape
        assert array.tobytes() == expected.tobytes(), name


def test_prefix_index_and_folder_mean_the_same(golden_folder: Path) -> None:
    prefix = golden_folder / "model.ckpt-1234"
    for path in (prefix, str(prefix), index_of(prefix), golden_folder):
        assert TensorBundle(path).prefix == prefix


def test_a_checkpoint_file_with_the_path_of_another_machine(golden_copy: Path) -> None:
    state = 'model_checkpoint_path: "/elsewhere/run/model.ckpt-1234"\n'
    (golden_copy.parent / "checkpoint").write_text(state)
    assert TensorBundle(golden_copy.parent).prefix == golden_copy


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32", "int64"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 1, 4)])
def test_dtypes_and_shapes(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(scale=100, size=shape).astype(dtype)
    bundle = TensorBundle(write_bundle(tmp_path, {"tensor": array}))
    assert bundle.entries["tensor"].dtype == dtype
    np.testing.assert_array_equal(bundle["tensor"], array, strict=True)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_bfloat16_is_widened(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.full(shape, -1.5, dtype="<f4")
    # The upper half of a float32 is a bfloat16; -1.5 needs no more bits.
    data = (values.view("<u4") >> 16).astype("<u2").tobytes()
    records = {b"": header_record(), b"x": tensor_record(BFLOAT16, shape, data)}
    bundle = TensorBundle(write_raw_bundle(tmp_path, records, [data]))
    assert bundle.entries["x"].dtype == "bfloat16"
    np.testing.assert_array_equal(bundle["x"], values, strict=True)


def test_several_shards_are_opened_only_when_needed(tmp_path: Path) -> None:
    arrays = {f"tensor_{i}": np.full((i, 2), i, dtype=np.float32) for i in range(7)}
    prefix = write_bundle(tmp_path, arrays, shards=3)
    Path(f"{prefix}.data-00001-of-00003").unlink()
    bundle = TensorBundle(prefix)
    assert list(bundle) == list(arrays) and len(bundle) == 7 and "tensor_8" not in bundle
    np.testing.assert_array_equal(bundle["tensor_5"], arrays["tensor_5"])
    with pytest.raises(CheckpointError, match=r"data-00001-of-00003: missing.*'tensor_4'"):
        bundle["tensor_4"]


def test_strings_and_unknown_dtypes_are_skipped_and_reported(tmp_path: Path) -> None:
    records = {
        b"": header_record(),
        b"_CHECKPOINTABLE_OBJECT_GRAPH": tensor_record(STRING, (), b"graph"),
        b"odd": tensor_record(77, (), b"??"),
    }
    bundle = TensorBundle(write_raw_bundle(tmp_path, records, [b"graph??"]))
    assert len(bundle) == 0
    assert bundle.skipped == {
        "_CHECKPOINTABLE_OBJECT_GRAPH": "dtype string is not supported",
        "odd": "dtype number 77 is not supported",
    }


def test_a_partitioned_variable_is_named(tmp_path: Path) -> None:
    whole = integer_field(1, FLOAT32) + bytes_field(2, bytes_field(2, integer_field(1, 8)))
    pieces = bytes_field(7, bytes_field(1, integer_field(2, 8)))
    records = {
        b"": header_record(),
        b"\0\x01table": tensor_record(FLOAT32, (8,), bytes(32)),
        b"table": whole + pieces,
    }
    bundle = TensorBundle(write_raw_bundle(tmp_path, records, [bytes(32)]))
    assert list(bundle) == ["table"]
    with pytest.raises(CheckpointError, match=r"model\.index: 'table' is stored in pieces"):
        bundle["table"]


def test_flipped_bits_in_the_index(golden_copy: Path) -> None:
    intact = TensorBundle(golden_copy).entries
    path = index_of(golden_copy)
    size = path.stat().st_size
    footer = range(size - 48, size)
    for position in [*random.Random(0).sample(range(size - 48), 250), *footer]:
        mask = 1 << position % 8
        flip(path, position, mask)
        try:
            assert TensorBundle(golden_copy).entries == intact
            # Only the footer's padding has no checksum and no meaning.
            assert position in footer
        except CheckpointError as error:
            assert str(path) in str(error)
        flip(path, position, mask)


def test_flipped_bits_in_the_data(golden_copy: Path) -> None:
    bundle, path = TensorBundle(golden_copy), data_of(golden_copy)
    generator = random.Random(0)
    for name, entry in bundle.entries.items():
        position = entry.offset + generator.randrange(entry.size)
        flip(path, position, 1 << position % 8)
        with pytest.raises(CheckpointError) as error:
            bundle[name]
        assert str(path) in str(error.value) and repr(name) in str(error.value)
        flip(path, position, 1 << position % 8)


def test_truncated_index(golden_copy: Path) -> None:
    path = index_of(golden_copy)
    content = path.read_bytes()
    for size in [*range(0, len(content), 37), *range(len(content) - 50, len(content))]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"model\.ckpt-1234\.index: not a TensorFlow"):
            TensorBundle(golden_copy)


def test_truncated_data(golden_copy: Path) -> None:
    bundle, path = TensorBundle(golden_copy), data_of(golden_copy)
    # From the back, because a file is easily shortened.
    for name, entry in sorted(bundle.entries.items(), key=lambda item: -item[1].offset):
        with path.open("r+b") as file:
            file.truncate(entry.offset + entry.size - 1)
        with pytest.raises(CheckpointError, match="truncated: "):
            bundle[name]


def test_arbitrary_records_with_valid_checksums(tmp_path: Path) -> None:
    data = np.arange(24, dtype="<f4").tobytes()
    record = tensor_record(FLOAT32, (2, 3, 4), data)
    prefix = write_raw_bundle(tmp_path, {b"": header_record(), b"x": record}, [data])
    generator = random.Random(0)
    for _ in range(300):
        mutated = bytearray(record)
        for _ in range(generator.randint(1, 3)):
            mutated[generator.randrange(len(record))] = generator.randrange(256)
        index_of(prefix).write_bytes(table({b"": header_record(), b"x": bytes(mutated)}))
        try:
            array = TensorBundle(prefix).get("x")
        except CheckpointError:
            continue
        # The bytes are right wherever a tensor comes out; its dtype and shape are the record's.
        assert array is None or array.size == 0 or array.tobytes() == data


def without(record: bytes, number: int) -> bytes:
    """A tensor record whose field ``number`` is emptied by a later zero."""
    return record + integer_field(number, 0)


GOOD = tensor_record(FLOAT32, (2,), bytes(8))


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (GOOD + integer_field(5, 1 << 62), r"float32 of shape \[2\] takes 8 bytes, the index says"),
        (without(GOOD, 5), r"takes 8 bytes, the index says 0"),
        (tensor_record(FLOAT32, (1 << 62,), b""), "not a possible shape"),
        (tensor_record(FLOAT32, (1 << 40, 1 << 40, 0), b""), "not a possible shape"),
        (tensor_record(FLOAT32, (-1,), b""), r"\[-1\] is not a possible shape"),
        (tensor_record(FLOAT32, (1,) * 33, bytes(4)), "not a possible shape"),
        (GOOD + bytes_field(2, integer_field(3, 1)), "rank is unknown"),
        (tensor_record(FLOAT32, (2,), bytes(8), shard=1), "shard 1 of only 1"),
        (GOOD + integer_field(3, -1), "shard 18446744073709551615 of only 1"),
        (bytes_field(1, b"float"), "field 1 has wire type 2"),
        (b"\xff", "cut off"),
    ],
)
def test_hostile_records(tmp_path: Path, record: bytes, complaint: str) -> None:
    records = {b"": header_record(), b"some/tensor": record}
    prefix = write_raw_bundle(tmp_path, records, [bytes(8)])
    with pytest.raises(CheckpointError, match=rf"model\.index: 'some/tensor': .*{complaint}"):
        TensorBundle(prefix)


def test_tensors_that_share_bytes(tmp_path: Path) -> None:
    data = bytes(range(24))
    records = {
        b"": header_record(),
        b"a": tensor_record(FLOAT32, (4,), data[:16]),
        b"b": tensor_record(FLOAT32, (3,), data[12:], offset=12),
        b"empty": tensor_record(FLOAT32, (0,), b"", offset=8),
    }
    prefix = write_raw_bundle(tmp_path, records, [data])
    complaint = r"model\.index: 'b' begins at byte 12 of shard 0, within 'a', which ends at 16"
    with pytest.raises(CheckpointError, match=complaint):
        TensorBundle(prefix)
    records[b"b"] = tensor_record(FLOAT32, (2,), data[16:], offset=16)
    assert set(TensorBundle(write_raw_bundle(tmp_path, records, [data]))) == {"a", "b", "empty"}


@pytest.mark.parametrize("kind", SPECIAL_FILES)
@pytest.mark.parametrize("name", ["model.index", "checkpoint", "model.data-00000-of-00001"])
def test_only_regular_files_are_opened(
    tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path, {"x": np.ones(2, dtype=np.float32)})
    (tmp_path / name).unlink(missing_ok=True)
    make_special_file(kind, tmp_path / name, monkeypatch)
    with pytest.raises(CheckpointError, match=f"{name}: {SPECIAL_FILES[kind]}, not a regular file"):
        TensorBundle(tmp_path if name == "checkpoint" else tmp_path / "model")["x"]


def test_a_device_is_not_read() -> None:
    with pytest.raises(CheckpointError, match="/dev/zero: a device, not a regular file"):
        open_regular(Path("/dev/zero"))


def test_an_index_takes_a_small_multiple_of_its_size(tmp_path: Path) -> None:
    """65,536 keys of four bytes without records, and one that is no text."""
    path = tmp_path / "x.index"
    entries = b"".join(b"\0\4\0" + struct.pack(">I", i + 1) for i in range(1 << 16)) + b"\0\1\0\xff"
    path.write_bytes(table_of_blocks([table_entry(b"", header_record()) + entries + ONE_RESTART]))
    size = path.stat().st_size
    assert peak_of_refusal(lambda: TensorBundle(path), "not the name of a tensor") < 5 * size


@pytest.mark.parametrize("offset", [1, 1 << 62])
def test_an_offset_beyond_the_data(tmp_path: Path, offset: int) -> None:
    record = tensor_record(FLOAT32, (2,), bytes(8), offset=offset)
    prefix = write_raw_bundle(tmp_path, {b"": header_record(), b"x": record}, [bytes(8)])
    with pytest.raises(CheckpointError, match=f"'x' ends at byte {offset + 8}, the file at 8"):
        TensorBundle(prefix)["x"]


def test_an_offset_beyond_31_bits(tmp_path: Path) -> None:
    """As in files of more than 2 GiB; this one is sparse, it takes no room on the disk."""
    data, offset = np.arange(5, dtype="<f4"), (5 << 30) + 4
    record = tensor_record(FLOAT32, (5,), data.tobytes(), offset=offset)
    prefix = write_raw_bundle(tmp_path, {b"": header_record(), b"x": record}, [b""])
    with data_of(prefix).open("r+b") as file:
        file.seek(offset)
        file.write(data.tobytes())
    np.testing.assert_array_equal(TensorBundle(prefix)["x"], data)
    with data_of(prefix).open("r+b") as file:
        file.truncate(offset + 19)
    with pytest.raises(CheckpointError, match=f"ends at byte {offset + 20}, the file at"):
        TensorBundle(prefix)["x"]


def test_a_missing_checksum_is_a_wrong_one(tmp_path: Path) -> None:
    record = GOOD + fixed32_field(6, 0)
    prefix = write_raw_bundle(tmp_path, {b"": header_record(), b"x": record}, [bytes(8)])
    with pytest.raises(CheckpointError, match="checksum of 'x' is wrong"):
        TensorBundle(prefix)["x"]


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ({}, "header of a V2 checkpoint is missing"),
        ({b"x": GOOD}, "header of a V2 checkpoint is missing"),
        ({b"": header_record(big_endian=True)}, "big-endian"),
        ({b"": header_record(min_consumer=2)}, "needs a reader of version 2"),
        ({b"": header_record(shards=0)}, "0 is not a possible number of shards"),
        ({b"": header_record(shards=-1)}, "not a possible number of shards"),
        # A V1 checkpoint is a table too; its record of this key begins with a message.
        ({b"": bytes_field(1, b"\x0a\x00")}, "V1 checkpoints are not supported"),
        ({b"": header_record(), b"\xff\xfe": GOOD}, "is not the name of a tensor"),
    ],
)
def test_headers_and_names(tmp_path: Path, records: dict[bytes, bytes], complaint: str) -> None:
    prefix = write_raw_bundle(tmp_path, records, [bytes(8)])
    with pytest.raises(CheckpointError, match=rf"model\.index: .*{complaint}"):
        TensorBundle(prefix)


@pytest.mark.parametrize("kind", ["empty", "png", "safetensors", "pickle", "snappy"])
def test_foreign_files_renamed_to_index(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.index"
    if kind == "safetensors":
        save_safetensors({}, path)
    else:
        content = {
            "empty": b"",
            "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
            "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR." + bytes(60),
            "snappy": table_of_blocks([b"compressed"], compression=1),
        }
        path.write_bytes(content[kind])
    with pytest.raises(CheckpointError, match=r"model\.index: "):
        TensorBundle(path)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such checkpoint"):
        TensorBundle(tmp_path / "nowhere")
    (tmp_path / "v1.ckpt").write_bytes(struct.pack("<Q", 0))
    with pytest.raises(CheckpointError, match=r"v1\.ckpt: not a TensorFlow V2 checkpoint"):
        TensorBundle(tmp_path / "v1.ckpt")


def test_folders_that_do_not_say_which_checkpoint(tmp_path: Path) -> None:
    write_bundle(tmp_path, {}, prefix="model.ckpt-7")
    with pytest.raises(CheckpointError, match=r"give the prefix.*model\.ckpt-7\.index"):
        TensorBundle(tmp_path)
    (tmp_path / "checkpoint").write_bytes(b"\xff\x00 nothing")
    with pytest.raises(CheckpointError, match="no line model_checkpoint_path"):
        TensorBundle(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-8"\n')
    with pytest.raises(CheckpointError, match=r"names 'model\.ckpt-8', whose \.index"):
        TensorBundle(tmp_path)
