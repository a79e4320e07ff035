"""Writes Keras MOATs as TensorFlow 2 does, without it: object checkpoints, whole or wrong."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from checkpoints.bundle_writer import (
    DTYPE_CODES,
    STRING,
    bytes_field,
    fixed32_field,
    header_record,
    integer_field,
    table,
    tensor_record,
    varint,
)

from moat_kernels.checkpoints.crc32c import masked_crc32c

GRAPH_KEY = b"_CHECKPOINTABLE_OBJECT_GRAPH"
SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
NORM = ("gamma", "beta")
BATCH_NORM = (*NORM, "moving_mean", "moving_variance")
HEAD_DIM = 32
#: Stem, widths, depths and classes of a small model.
SMALL_KERAS = (16, (16, 32, 64, 96), (1, 2, 2, 1), 7)


def keras_shapes(
    stem_width: int,
    widths: Sequence[int],
    depths: Sequence[int],
    classes: int,
    *,
    in_chans: int = 3,
) -> dict[str, tuple[int, ...]]:
    """The full names and shapes of all variables of a Keras MOAT, in the order of its layers."""
    shapes: dict[str, tuple[int, ...]] = {
        "root_conv2d_01/kernel": (3, 3, in_chans, stem_width),
        "root_conv2d_01/bias": (stem_width,),
        **{f"root_bn/{leaf}": (stem_width,) for leaf in BATCH_NORM},
        "root_conv2d_02/kernel": (3, 3, stem_width, stem_width),
        "root_conv2d_02/bias": (stem_width,),
    }
    inputs = stem_width
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for index in range(depth):
            block = _block_shapes(inputs, width, attention=stage >= 2)
            shapes |= {f"stage{stage}_block{index}_{name}": block[name] for name in block}
            inputs = width
    shapes |= {f"predictions_norm/{leaf}": (inputs,) for leaf in NORM}
    return shapes | {
        "predictions_dense/kernel": (inputs, classes),
        "predictions_dense/bias": (classes,),
    }


def _block_shapes(inputs: int, width: int, attention: bool) -> dict[str, tuple[int, ...]]:
    inner, reduced, heads = 4 * width, width // 4, width // HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        **{f"mb_bn_01/{leaf}": (inputs,) for leaf in BATCH_NORM},
        "mb_conv2d_01/kernel": (1, 1, inputs, inner),
        **{f"mb_bn_02/{leaf}": (inner,) for leaf in BATCH_NORM},
        "mb_conv2d_02/depthwise_kernel": (3, 3, inner, 1),
        **{f"mb_bn_03/{leaf}": (inner,) for leaf in BATCH_NORM},
    }
    if not attention:
        shapes["mb_se_dense_01/kernel"], shapes["mb_se_dense_01/bias"] = (
            (inner, reduced),
            (reduced,),
        )
        shapes["mb_se_dense_02/kernel"], shapes["mb_se_dense_02/bias"] = (reduced, inner), (inner,)
    shapes["mb_conv2d_03/kernel"], shapes["mb_conv2d_03/bias"] = (1, 1, inner, width), (width,)
    if inputs != width:
        shapes["mb_shortcut_conv/kernel"] = (1, 1, inputs, width)
        shapes["mb_shortcut_conv/bias"] = (width,)
    if attention:
        shapes |= {f"ln/{leaf}": (width,) for leaf in NORM}
        for projection in "qkv":
            shapes[f"attention/{projection}/weight"] = (width, heads, HEAD_DIM)
            shapes[f"attention/{projection}/bias"] = (heads, HEAD_DIM)
        shapes["attention/o/weight"] = (heads, HEAD_DIM, width)
        shapes["attention/o/bias"] = (width,)
    return shapes


def saved_model_keys(names: Iterable[str]) -> dict[str, str]:
    """The keys that a SavedModel has for variables: attention's under the whole model's list."""
    keys, layers = {}, {}
    for number, name in enumerate(names):
        layer, _, leaf = name.rpartition("/")
        owner = f"layer_with_weights-{layers.setdefault(layer, len(layers))}/{leaf}"
        keys[name] = (f"variables/{number}" if "_attention/" in name else owner) + SUFFIX
    return keys


def attribute(name: str, key: str) -> bytes:
    text = bytes_field(1, b"VARIABLE_VALUE") + bytes_field(2, name.encode())
    return bytes_field(2, text + bytes_field(3, key.encode()))


def child(node: int, name: str = "child") -> bytes:
    return bytes_field(1, integer_field(1, node) + bytes_field(2, name.encode()))


def slot(original: int, node: int, name: str = "m") -> bytes:
    slot_variable = integer_field(1, original) + bytes_field(2, name.encode())
    return bytes_field(3, slot_variable + integer_field(3, node))


def object_graph(nodes: Iterable[bytes]) -> bytes:
    return b"".join(bytes_field(1, node) for node in nodes)


def graph_of(keys: Mapping[str, str]) -> bytes:
    """A root, every variable, and every variable once more, as real graphs have them."""
    variables = [attribute(name, key) for name, key in keys.items()]
    root = b"".join(child(number + 1) for number in range(len(variables)))
    return object_graph([root, *variables, *variables])


def string_record(content: bytes, *, shard: int = 0, offset: int = 0) -> tuple[bytes, bytes]:
    """The record and the data of a scalar string tensor."""
    length = struct.pack("<I", len(content))
    behind = struct.pack("<I", masked_crc32c(length)) + content
    data = varint(len(content)) + behind
    record = tensor_record(STRING, (), data, shard=shard, offset=offset)
    return record + fixed32_field(6, masked_crc32c(length + behind)), data


def write_saved_model(
    folder: Path,
    variables: Mapping[str, np.ndarray],
    *,
    keys: Mapping[str, str] | None = None,
    resolution: int | None = None,
    shards: int = 1,
) -> Path:
    """Write ``{full name: array}`` as the variables of the SavedModel ``folder``, and return it.

    keys: of the variables in the bundle; None: as TensorFlow would choose them.
    resolution: what the SavedModel's metadata say of the images; None: there are none.
    """
    (folder / "variables").mkdir(parents=True)
    keys = saved_model_keys(variables) if keys is None else keys
    tensors = {keys[name]: array for name, array in variables.items()}
    write_object_bundle(folder / "variables" / "variables", tensors, graph_of(keys), shards=shards)
    if resolution is not None:
        write_metadata(folder, [None, resolution, resolution, 3])
    return folder


def write_metadata(folder: Path, shape: Sequence[int | None]) -> None:
    """The metadata of a SavedModel: JSON texts within messages, of which one tells the shape."""
    sizes = ", ".join("null" if size is None else str(size) for size in shape)
    text = f'{{"class_name": "InputLayer", "config": {{"batch_input_shape": [{sizes}]}}}}'
    content = bytes_field(1, b"\x08\x00\x12\x04root" + bytes_field(5, text.encode()))
    (folder / "keras_metadata.pb").write_bytes(content)


def write_object_bundle(
    prefix: Path, tensors: Mapping[str, np.ndarray], graph: bytes, *, shards: int = 1
) -> Path:
    """Write tensors by their keys, dealt out over the shards, and the graph in the last one."""
    records = {b"": header_record(shards)}
    paths = [Path(f"{prefix}.data-{shard:05d}-of-{shards:05d}") for shard in range(shards)]
    files = [path.open("wb") for path in paths]
    for number, (key, array) in enumerate(tensors.items()):
        file, content = files[number % shards], np.ascontiguousarray(array)
        records[key.encode()] = tensor_record(
            DTYPE_CODES[array.dtype.name],
            array.shape,
            content.reshape(-1).view(np.uint8).data,
            shard=number % shards,
            offset=file.tell(),
        )
        file.write(content.data)
    record, data = string_record(graph, shard=shards - 1, offset=files[-1].tell())
    files[-1].write(data)
    for file in files:
        file.close()
    Path(f"{prefix}.index").write_bytes(table({**records, GRAPH_KEY: record}))
    return prefix
