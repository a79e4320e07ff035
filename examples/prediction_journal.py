"""What is known of each image, in a file that only grows and that an interruption cannot harm."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from files import sync_folder
from prediction_images import State


class JournalError(ValueError):
    """The journal cannot be used; the text says why."""


@dataclass(frozen=True)
class Record:
    """Labels and scores of an image, best first, or why there are none (`error`)."""

    image: str
    state: State
    labels: Sequence[str] = ()
    scores: Sequence[float] = ()
    error: str = ""


class Journal:
    """Records by the paths of images; of several of one image the last counts.

    A line is a record, and `left` in it says how many of its batch follow. Batches are written as a
    whole and are on the disk when `append` returns. Opening cuts off what an interruption left of
    the last one (`torn` bytes), so the batch is computed again with the very same images in it:
    results may depend on these in the last digit.

    In memory are places of records only, not the records.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[str, int] = {}
        self._states: dict[str, State] = {}  # of images with predictions
        end = self._read()
        self.torn = self._file.seek(0, os.SEEK_END) - end
        self._file.truncate(end)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, image: str) -> bool:
        return image in self._places

    def predicted(self) -> list[str]:
        """The images that have predictions, sorted."""
        return sorted(self._states)

    def failed(self) -> list[str]:
        """The images that have none, sorted."""
        return sorted(self._places.keys() - self._states.keys())

    def is_predicted(self, image: str, state: State) -> bool:
        """Whether there are predictions of `image` as it is now, in `state`."""
        return self._states.get(image) == state

    def read(self, image: str) -> Record:
        """The last record of `image`."""
        self._file.seek(self._places[image])
        return _parsed(self._file.readline())[0]

    def append(self, records: Sequence[Record]) -> None:
        """Write a batch. OSError if the disk does not take it; the journal is then used up."""
        place = self._file.seek(0, os.SEEK_END)
        lines = [
            json.dumps({**asdict(record), "left": len(records) - number}).encode() + b"\n"
            for number, record in enumerate(records, start=1)
        ]
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        for record, line in zip(records, lines, strict=True):
            self._know(record, place)
            place += len(line)

    def _read(self) -> int:
        """Find all records; returns where the last whole batch ends."""
        end, place = 0, 0
        batch: list[tuple[Record, int]] = []
        self._file.seek(0)
        for line in self._file:
            try:
                record, left = _parsed(line)
            except JournalError:
                break
            batch.append((record, place))
            place += len(line)
            if left == 0:
                for one in batch:
                    self._know(*one)
                batch, end = [], place
        return end

    def _know(self, record: Record, place: int) -> None:
        self._places[record.image] = place
        if record.error:
            self._states.pop(record.image, None)
        else:
            self._states[record.image] = record.state


@contextmanager
def opened_journal(path: Path) -> Iterator[Journal]:
    """The journal at `path`, made if there is none, for one process at a time.

    Raises JournalError if another one has it open, OSError if it cannot be read or written.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(f"another run is writing to {path.parent}") from error
        sync_folder(path.parent)
        yield Journal(file)


def _parsed(line: bytes) -> tuple[Record, int]:
    """A record, and how many of its batch follow. JournalError for anything else."""
    try:
        if not line.endswith(b"\n"):
            raise ValueError("the line has no end")
        entry = json.loads(line)
        left, (size, modified) = int(entry.pop("left")), entry.pop("state")
        return Record(state=(int(size), int(modified)), **entry), left
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise JournalError(f"not a record: {line[:80]!r}") from error
