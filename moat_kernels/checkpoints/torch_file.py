"""Files that ``torch.save`` wrote, whatever they are called: what is in them, as plain data."""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import CheckpointError
from .files import open_regular

_ZIP_MAGIC = b"PK\x03\x04"
# The opcode PROTO, and the protocols that torch.save may be given.
_PICKLE_MAGICS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
# Beyond every real checkpoint, whose tensors' data lies outside the pickle.
_MAXIMUM_PICKLE_BYTES = 1 << 22
_PICKLE_NAME = "data.pkl"
# Within torch's advice of several lines, which is not for users of load_checkpoint.
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+) was not an allowed global")
_UNPICKLER_ERROR = re.compile(r"WeightsUnpickler error:\s*(\S.*)")


def is_torch_file(begin: bytes) -> bool:
    """Whether a file whose first bytes are ``begin`` is a zip archive or a pickle."""
    return begin.startswith((_ZIP_MAGIC, *_PICKLE_MAGICS))


def load_torch_file(path: Path) -> Any:
    """What ``torch.save`` stored in ``path``, on the CPU.

    Nothing in the file is executed (``weights_only=True``). Beside what torch allows, the file may
    hold an ``argparse.Namespace``, which training scripts store beside their weights.

    Raises:
        CheckpointError: the file is damaged, compressed, or holds more than plain data.
    """
    with open_regular(path) as file:
        is_archive = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        if is_archive:
            _check_archive(file, path)
        file.seek(0)
        source: Any = file if is_archive else _LimitedPickle(file)
        try:
            # The file, not its path: torch would judge by the ending of its name.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch.load has no error of its own: bytes that are no checkpoint end in any exception.
            raise CheckpointError(
                f"{path}: not a state_dict that torch.load can read safely: {_reason(error)}"
            ) from error


def _check_archive(file: BinaryIO, path: Path) -> None:
    """Refuse archives that unpack to more than their size; torch.save never compresses."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: truncated or damaged: {error}") from None
    if sum(member.file_size for member in members) > file.seek(0, os.SEEK_END):
        raise CheckpointError(f"{path}: a compressed archive, which torch.save does not write")
    for member in members:
        is_pickle = member.filename.rpartition("/")[2] == _PICKLE_NAME
        if is_pickle and member.file_size > _MAXIMUM_PICKLE_BYTES:
            raise CheckpointError(f"{path}: {_too_large(member.file_size)}")


class _LimitedPickle:
    """A file of torch's older format, of which no more is unpickled than a checkpoint can have.

    One byte of a pickle may stand for 64 bytes of memory. The tensors' data does not count: torch
    reads it through the file's descriptor.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._bytes = 0

    def read(self, size: int = -1) -> bytes:
        return self._counted(self._file.read(size))

    def readline(self) -> bytes:
        return self._counted(self._file.readline())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _counted(self, data: bytes) -> bytes:
        self._bytes += len(data)
        if self._bytes > _MAXIMUM_PICKLE_BYTES:
            raise CheckpointError(_too_large(self._bytes))
        return data


def _too_large(size: int) -> str:
    return f"{size} bytes are too many for what a checkpoint has beside its tensors' data"


def _reason(error: Exception) -> str:
    if refused := _REFUSED_GLOBAL.search(str(error)):
        return (
            f"it holds a {refused[1]}, which is not plain data; if you trust the file, allow it "
            "with torch.serialization.add_safe_globals, or load the file yourself with "
            "weights_only=False and save only its state_dict"
        )
    if stopped := _UNPICKLER_ERROR.search(str(error)):
        return stopped[1]
    return str(error).partition("\n")[0] or type(error).__name__
