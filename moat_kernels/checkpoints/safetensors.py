"""The .safetensors format: a JSON header and raw little-endian tensor data, nothing executable.

Layout: the length of the header (8 bytes, little-endian), the header (UTF-8 JSON, padded with
spaces), the data. The header maps each name to ``{"dtype", "shape", "data_offsets": [begin,
end]}``, offsets counted from the end of the header; ``"__metadata__"`` maps strings to strings. The
tensors fill the data exactly, without gaps and without overlap.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from moat_kernels.configuration import (
    ConfigurationError,
    configurations_of,
    encode,
    with_configurations,
)

from .errors import CheckpointError
from .files import open_regular
from .safetensors_header import (
    CONFIGURATION_KEY,
    DTYPES,
    METADATA_KEY,
    TensorPlace,
    parse_header,
)

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_ALIGNMENT = 8
# The limit of the format's own library.
_MAXIMUM_HEADER_BYTES = 100_000_000


def save_safetensors(
    state_dict: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``state_dict`` to ``path``, whole or not at all (a temporary file is renamed).

    Tensors may be on any device and have any strides; tensors that share storage are each written
    in full. ``metadata`` is stored in the header, and what a model's own ``state_dict`` says of its
    configuration, under the key ``moat_kernels``.

    Raises:
        CheckpointError: a dtype, layout or name that the format cannot hold.
    """
    names = sorted(state_dict, key=lambda name: (-_itemsize(name, state_dict[name]), name))
    if configurations := configurations_of(state_dict):
        metadata = {**(metadata or {}), CONFIGURATION_KEY: encode(configurations)}
    header = _encode_header({name: state_dict[name] for name in names}, metadata)
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("xb") as file:
            file.write(struct.pack("<Q", len(header)))
            file.write(header)
            for name in names:
                flat = state_dict[name].detach().cpu().contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
            # Otherwise a power failure could leave the new name with an empty file.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors in ``path``, by name, in the order of the file; their configuration as metadata.

    The file is memory-mapped privately: data is read when it is used, and writing to a tensor does
    not change the file. While the tensors live the file may be replaced, but must not be
    overwritten.

    Raises:
        CheckpointError: the file is truncated, damaged, not a .safetensors file, or has a dtype
            that is not supported.
    """
    with open_regular(Path(path)) as file:
        try:
            return _load(file)
        except (CheckpointError, ConfigurationError) as error:
            raise CheckpointError(f"{path}: {error}") from None


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What :func:`save_safetensors` stored as ``metadata``; empty if the file has none.

    Raises:
        CheckpointError: as :func:`load_safetensors` of a file without a good header.
    """
    with open_regular(Path(path)) as file:
        try:
            header, _, _ = _read_header(file)
            parse_header(header)  # raises for what json alone would take
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
    return json.loads(header).get(METADATA_KEY) or {}


def is_safetensors(begin: bytes) -> bool:
    """Whether a file whose first bytes are ``begin`` starts like a .safetensors file."""
    if len(begin) <= _LENGTH_BYTES:
        return False
    (length,) = struct.unpack_from("<Q", begin)
    return length <= _MAXIMUM_HEADER_BYTES and begin[_LENGTH_BYTES] in b"{ \t\r\n"


def _itemsize(name: str, tensor: torch.Tensor) -> int:
    if not isinstance(name, str) or name == METADATA_KEY:
        raise CheckpointError(f"{name!r} cannot be the name of a tensor")
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
    if tensor.dtype not in _CODES:
        supported = ", ".join(str(dtype) for dtype in _CODES)
        raise CheckpointError(f"{name!r} has dtype {tensor.dtype}; supported are {supported}")
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{name!r} is {tensor.layout} on {tensor.device}, it has no dense data"
        )
    return tensor.itemsize


def _encode_header(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None
) -> bytes:
    header: dict[str, Any] = {}
    if metadata is not None:
        if not all(isinstance(text, str) for item in metadata.items() for text in item):
            raise CheckpointError(f"metadata must map strings to strings: {metadata!r}")
        header[METADATA_KEY] = dict(metadata)
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % _ALIGNMENT)


def _load(file: BinaryIO) -> dict[str, torch.Tensor]:
    text, data_begin, data_size = _read_header(file)
    header = parse_header(text)
    places = sorted(header.places, key=lambda place: (place.begin, place.end))
    position = 0
    for place in places:
        if place.begin != position:
            raise CheckpointError(
                f"{place.name!r} begins at byte {place.begin} of the data, expected {position} "
                "(a gap or an overlap)"
            )
        position = place.end
    if position != data_size:
        raise CheckpointError(
            f"the tensors take {position} bytes, the file has {data_size} (truncated or damaged)"
        )
    data = np.asarray(np.memmap(file, dtype=np.uint8, mode="c"))[data_begin:]
    tensors = {place.name: _tensor(place, data) for place in places}
    if header.configuration is None:
        return tensors
    return with_configurations(tensors, header.configuration)


def _read_header(file: BinaryIO) -> tuple[bytes, int, int]:
    """The header, the position of the data and its size in bytes."""
    available = file.seek(0, os.SEEK_END) - _LENGTH_BYTES
    file.seek(0)
    if available < 0:
        raise CheckpointError("not a .safetensors file: shorter than the length of its header")
    (length,) = struct.unpack("<Q", file.read(_LENGTH_BYTES))
    # Compared before anything is allocated.
    if length > available:
        raise CheckpointError(
            f"not a .safetensors file, or truncated: a header of {length} bytes is announced, "
            f"{available} bytes follow"
        )
    if length > _MAXIMUM_HEADER_BYTES:
        raise CheckpointError(
            f"its header has {length} bytes, at most {_MAXIMUM_HEADER_BYTES} are read"
        )
    return file.read(length), _LENGTH_BYTES + length, available - length


def _tensor(place: TensorPlace, data: np.ndarray) -> torch.Tensor:
    if place.begin == place.end:
        # Without bytes there is nothing that could be aligned.
        return torch.empty(place.shape, dtype=place.dtype)
    stored = data[place.begin : place.end]
    if stored.ctypes.data % place.dtype.itemsize:
        # The format does not promise alignment.
        stored = stored.copy()
    if place.dtype is torch.bool and stored.max(initial=0) > 1:
        raise CheckpointError(f"{place.name!r} is BOOL, but has bytes other than 0 and 1")
    return torch.from_numpy(stored).view(place.dtype).reshape(place.shape)
