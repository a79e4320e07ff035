"""Files that are not what their names say, and what reading one costs."""

from __future__ import annotations

import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from moat_kernels.checkpoints import CheckpointError

#: What may stand where a file is expected, and how messages call it.
SPECIAL_FILES = {"folder": "a folder", "pipe": "a named pipe", "socket": "a socket"}


def make_special_file(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        # The address of a socket has at most 107 bytes, so it is given relative to its folder.
        monkeypatch.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)


def peak_of_refusal(read: Callable[[], object], complaint: str) -> int:
    """The most bytes that Python and numpy held while ``read`` came to refuse its file."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=complaint):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
