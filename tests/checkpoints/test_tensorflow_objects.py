"""Object checkpoints: strings and graphs that are damaged, lie or are hostile."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints.bundle_writer import (
    STRING,
    bytes_field,
    fixed32_field,
    header_record,
    integer_field,
    table,
    tensor_record,
    varint,
    write_raw_bundle,
)
from checkpoints.hostile import peak_of_refusal
from checkpoints.keras_writer import (
    GRAPH_KEY,
    SUFFIX,
    attribute,
    child,
    graph_of,
    keras_shapes,
    object_graph,
    saved_model_keys,
    slot,
    string_record,
    write_object_bundle,
    write_saved_model,
)
from support.golden import variable_values

from moat_kernels.checkpoints import CheckpointError, TensorBundle, load_tensorflow
from moat_kernels.checkpoints.crc32c import masked_crc32c
from moat_kernels.checkpoints.keras_inventory import take_keras_inventory
from moat_kernels.checkpoints.tensorflow_objects import (
    ObjectVariable,
    parse_object_graph,
    read_object_variables,
)

GRAPH = GRAPH_KEY.decode()
TINY = (8, (8, 8, 32, 32), (1, 1, 1, 1), 3)
LIMIT = 1 << 20


def bundle_with(folder: Path, record: bytes, data: bytes) -> TensorBundle:
    records = {b"": header_record(), GRAPH_KEY: record}
    return TensorBundle(write_raw_bundle(folder, records, [data]))


def flip(path: Path, position: int) -> None:
    """Flip a bit of one byte; a second call restores it."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


@pytest.fixture(scope="module")
def tiny() -> dict[str, np.ndarray]:
    shapes = keras_shapes(*TINY)
    return {name: variable_values(name, shape, 6) for name, shape in shapes.items()}


@pytest.fixture
def saved_model(tmp_path: Path, tiny: dict[str, np.ndarray]) -> Path:
    return write_saved_model(tmp_path / "saved", tiny)


@pytest.mark.parametrize("content", [b"", b"graph", bytes(300)])
def test_a_scalar_string(tmp_path: Path, content: bytes) -> None:
    bundle = bundle_with(tmp_path, *string_record(content))
    assert bundle.read_string(GRAPH, LIMIT) == content


def string_data(length: bytes, content: bytes = b"graph", summed: int = 5) -> bytes:
    return length + struct.pack("<I", masked_crc32c(struct.pack("<I", summed))) + content


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "a variable-length integer is cut off"),
        (b"\x85", "a variable-length integer is cut off"),
        (b"\5\0\0", "4 bytes are announced where 2 are left"),
        (string_data(varint(1 << 40)), "a string of 1099511627776 bytes is too long"),
        (string_data(varint((1 << 64) - 1)), "bytes is too long"),
        (string_data(varint(5), summed=6), "the checksum of its length is wrong"),
        (string_data(varint(4), summed=4), "a string of 4 bytes is announced, 5 follow"),
        (string_data(varint(1 << 31), summed=1 << 31), "a string of 2147483648 bytes is announced"),
        (string_data(varint(5)), "its checksum is wrong: the file is damaged"),
    ],
)
def test_malformed_strings(tmp_path: Path, data: bytes, complaint: str) -> None:
    # Its own checksum, of the plain bytes, is what other tensors have.
    bundle = bundle_with(tmp_path, tensor_record(STRING, (), data), data)
    with pytest.raises(CheckpointError, match=rf"data-00000-of-00001: '{GRAPH}': .*{complaint}"):
        bundle.read_string(GRAPH, LIMIT)


def test_strings_that_are_not_read(tmp_path: Path) -> None:
    record, data = string_record(b"graph")
    bundle = bundle_with(tmp_path, record, data)
    with pytest.raises(CheckpointError, match=rf"'{GRAPH}' has 10 bytes, at most 9 are read"):
        bundle.read_string(GRAPH, 9)
    with pytest.raises(CheckpointError, match=r"model\.index: it has no scalar string 'other'"):
        bundle.read_string("other", LIMIT)
    with pytest.raises(CheckpointError, match="it has no scalar string"):
        bundle_with(tmp_path, tensor_record(STRING, (1,), data), data).read_string(GRAPH, LIMIT)
    with pytest.raises(CheckpointError, match=f"truncated: '{GRAPH}' ends at byte 10, the file at"):
        bundle_with(tmp_path, record, data[:-1]).read_string(GRAPH, LIMIT)


def test_variables_of_a_graph() -> None:
    """Every variable once, whatever number of nodes hold it; other attributes are none."""
    gamma, beta, slot_key = (f"layer/{name}{SUFFIX}" for name in ("gamma", "beta", "slot"))
    other = bytes_field(2, bytes_field(1, b"CONFIG") + bytes_field(3, b"layer/.ATTRIBUTES/CONFIG"))
    nodes = [
        child(1) + child(2) + slot(2, 3),
        attribute("norm/gamma", gamma) + other,
        attribute("norm/beta", beta),
        attribute("Adam/m", slot_key),
        attribute("norm/gamma", gamma),
        b"",
    ]
    assert parse_object_graph(object_graph(nodes)) == [
        ObjectVariable("norm/gamma", gamma),
        ObjectVariable("norm/beta", beta),
        ObjectVariable("Adam/m", slot_key, is_slot=True),
    ]


KEY = f"layer/gamma{SUFFIX}"
NODE = attribute("norm/gamma", KEY)


@pytest.mark.parametrize(
    ("graph", "complaint"),
    [
        (object_graph([NODE, attribute("norm/beta", KEY)]), "is both 'norm/gamma' and 'norm/beta'"),
        (object_graph([child(1)]), "it speaks of node 1, but has only 1"),
        (object_graph([child(-1)]), "it speaks of node 18446744073709551615"),
        (object_graph([slot(0, 7)]), "it speaks of node 7"),
        (object_graph([slot(7, 0)]), "it speaks of node 7"),
        (object_graph([NODE])[:-1], "bytes are announced where"),
        (integer_field(1, 3), "field 1 has wire type 0, expected 2"),
        (object_graph([integer_field(2, 3)]), "field 2 has wire type 0, expected 2"),
        (object_graph([bytes_field(2, integer_field(3, 3))]), "field 3 has wire type 0, expected"),
        (object_graph([bytes_field(2, bytes_field(3, b"\xff"))]), r"field 3 is not text: b'\\xff'"),
        (object_graph([attribute("n" * 5000, KEY)]), "or one of more than 4096 bytes"),
    ],
)
def test_graphs_that_lie_or_are_damaged(graph: bytes, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        parse_object_graph(graph)


@pytest.mark.parametrize(
    ("graph", "complaint"),
    [
        (bytes_field(1, b"") * (1 << 18), "more than 131072 nodes"),
        (
            object_graph([bytes_field(1, b"") * (1 << 18)]),
            "more than 131072 children, attributes and slots",
        ),
        (object_graph([bytes_field(2, bytes(1 << 20))]), "one of more than 4096 bytes"),
    ],
    ids=["nodes", "children", "large"],
)
def test_hostile_graphs_take_little_memory(graph: bytes, complaint: str) -> None:
    assert peak_of_refusal(lambda: parse_object_graph(graph), complaint) < 3 * len(graph) + 50_000


def test_a_graph_that_is_too_large(tmp_path: Path) -> None:
    prefix = write_object_bundle(tmp_path / "ckpt", {}, bytes((1 << 22) + 1))
    with pytest.raises(CheckpointError, match=f"'{GRAPH}' has .* bytes, at most 4194304 are read"):
        read_object_variables(TensorBundle(prefix))


def without_key(keys: dict[str, str]) -> bytes:
    return graph_of({**keys, "root_bn/gamma": f"nowhere{SUFFIX}"})


def twice(keys: dict[str, str]) -> bytes:
    return graph_of(keys) + object_graph([attribute("root_bn/gamma", keys["root_bn/beta"])])


def under_another(keys: dict[str, str]) -> bytes:
    """A name that another tensor of the bundle has too."""
    return graph_of(keys) + object_graph([attribute("root_bn/gamma", f"spare{SUFFIX}")])


@pytest.mark.parametrize(
    ("lie", "complaint"),
    [
        (without_key, f"'root_bn/gamma' is said to be under 'nowhere{SUFFIX}', which the index"),
        (twice, "is both 'root_bn/beta' and 'root_bn/gamma'"),
        (under_another, f"root_bn/gamma is there twice, under .* and spare{SUFFIX}"),
        (lambda keys: b"", "no variable of a Keras MOAT .* among its 0"),
    ],
)
def test_graphs_that_contradict_the_bundle(
    tmp_path: Path,
    tiny: dict[str, np.ndarray],
    lie: Callable[[dict[str, str]], bytes],
    complaint: str,
) -> None:
    keys = saved_model_keys(tiny)
    tensors = {keys[name]: array for name, array in tiny.items()}
    tensors[f"spare{SUFFIX}"] = tiny["root_bn/gamma"]
    prefix = write_object_bundle(tmp_path / "ckpt", tensors, lie(keys))
    with pytest.raises(CheckpointError, match=rf"ckpt.*: .*{complaint}"):
        load_tensorflow(prefix)


def test_an_object_checkpoint_without_graph(tmp_path: Path) -> None:
    data = bytes(8)
    records = {b"": header_record(), f"a{SUFFIX}".encode(): tensor_record(1, (2,), data)}
    prefix = write_raw_bundle(tmp_path, records, [data])
    with pytest.raises(CheckpointError, match=f"it has no scalar string '{GRAPH}'"):
        load_tensorflow(prefix)


def test_mutated_graphs_name_the_same_or_nothing(
    saved_model: Path, tiny: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes hold each variable, so that none can be mistaken for another by one mutation."""
    bundle, keys = TensorBundle(saved_model), saved_model_keys(tiny)
    intact, generator = graph_of(keys), random.Random(0)
    refused = 0
    for _ in range(150):
        mutated = bytearray(intact)
        mutated[generator.randrange(len(intact))] = generator.randrange(256)
        end = len(intact) if generator.random() < 0.8 else generator.randrange(len(intact))
        graph = bytes(mutated[:end])
        monkeypatch.setattr(bundle, "read_string", lambda name, limit, graph=graph: graph)
        try:
            variables = read_object_variables(bundle)
            found = take_keras_inventory(bundle, variables, ema=False, origin="file")[1]
        except CheckpointError:
            refused += 1
            continue
        assert found.items() <= keys.items()
    assert refused > 50


def test_flipped_bits_in_a_saved_model(saved_model: Path) -> None:
    """Every flip is noticed, but of what has no meaning: the padding of the index's footer."""
    intact = load_tensorflow(saved_model).state_dict
    index, data = (
        saved_model / "variables" / f"variables.{name}" for name in ("index", "data-00000-of-00001")
    )
    generator = random.Random(0)
    for path, count in ((index, 60), (data, 30)):
        size = path.stat().st_size
        for position in generator.sample(range(size), count):
            flip(path, position)
            try:
                state_dict = load_tensorflow(saved_model).state_dict
                assert path == index and position >= size - 48
                assert all(torch.equal(state_dict[name], intact[name]) for name in intact)
            except CheckpointError as error:
                assert "variables.index" in str(error) or "variables.data" in str(error)
            flip(path, position)


@pytest.mark.parametrize("name", ["index", "data-00000-of-00001"])
def test_truncated_saved_models(saved_model: Path, name: str) -> None:
    path = saved_model / "variables" / f"variables.{name}"
    content = path.read_bytes()
    for size in (0, 1, len(content) // 3, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=rf"variables\.{name}: "):
            load_tensorflow(saved_model)


def test_a_saved_model_without_data(saved_model: Path) -> None:
    (saved_model / "variables" / "variables.data-00000-of-00001").unlink()
    with pytest.raises(CheckpointError, match="data-00000-of-00001: missing"):
        load_tensorflow(saved_model)
    (saved_model / "variables" / "variables.index").unlink()
    with pytest.raises(CheckpointError, match="saved: no file 'checkpoint' says"):
        load_tensorflow(saved_model)


def test_arbitrary_string_records_with_valid_checksums(tmp_path: Path) -> None:
    record, data = string_record(b"graph")
    prefix = write_raw_bundle(tmp_path, {b"": header_record(), GRAPH_KEY: record}, [data])
    generator = random.Random(0)
    for _ in range(200):
        mutated = bytearray(record)
        mutated[generator.randrange(len(record))] = generator.randrange(256)
        records = {b"": header_record(), GRAPH_KEY: bytes(mutated)}
        Path(f"{prefix}.index").write_bytes(table(records))
        try:
            content = TensorBundle(prefix).read_string(GRAPH, LIMIT)
        except CheckpointError:
            continue
        assert content == b"graph"


def test_a_missing_checksum_is_a_wrong_one(tmp_path: Path) -> None:
    record, data = string_record(b"graph")
    bundle = bundle_with(tmp_path, record + fixed32_field(6, 0), data)
    with pytest.raises(CheckpointError, match="its checksum is wrong"):
        bundle.read_string(GRAPH, LIMIT)
