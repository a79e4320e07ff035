"""Opening files: regular ones only, looked at before they are opened."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import BinaryIO

from .errors import CheckpointError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """``path``, open for reading in binary.

    Opening a named pipe would wait for a writer, and a device has no end.

    Raises:
        CheckpointError: it is a folder, a named pipe, a socket or a device.
        OSError: it does not exist, or cannot be read.
    """
    check_regular(path)
    return path.open("rb")


def check_regular(path: Path) -> None:
    """Raise what :func:`open_regular` raises if ``path`` is no regular file."""
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise CheckpointError(f"{path}: {_KINDS.get(kind, 'a special file')}, not a regular file")
