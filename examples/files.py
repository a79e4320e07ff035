"""Files that are written whole or not at all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write to; what is there at the end takes the place of `path`, and is on the disk.

    If anything fails, `path` is as it was.
    """
    temporary = path.with_name(f"{path.name}.new")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names of files in `folder`, new ones too, on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_name(path: Path, state: str) -> Path:
    """A name that says in which state `path` is, and that nothing has yet."""
    names = (f"{path.name}.{state}{number or ''}" for number in itertools.count())
    return next(name for name in map(path.with_name, names) if not os.path.lexists(name))


def new_numbered_folder(folder: Path) -> Path:
    """Make `FOLDER/1`, `FOLDER/2` or whatever comes after those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    for number in itertools.count(max(taken, default=0) + 1):
        try:
            (folder / str(number)).mkdir()
            return folder / str(number)
        except FileExistsError:  # made by another run meanwhile
            continue
    raise AssertionError("numbers do not end")
