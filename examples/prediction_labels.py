"""The names of a classifier's classes, or of a tagger's tags."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from photographs import DataError

COLUMN = "name"  # of a .csv file, as in the selected_tags.csv of taggers


def read_labels(path: Path) -> list[str]:
    """The names in a file, in the order of the model's outputs.

    A .csv file with a column "name", a .json file of a list, or any other with one name a line.
    Raises DataError for a file that cannot be read or is none of these.
    """
    readers = {".csv": _from_csv, ".json": _from_json}
    try:
        text = path.read_text(encoding="utf-8-sig")
        labels = readers.get(path.suffix.lower(), _from_lines)(text)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"--labels {path} cannot be read: {error}") from error
    if not labels:
        raise DataError(f"--labels {path} has no names")
    if "" in labels:
        raise DataError(f"--labels {path}: name {labels.index('') + 1} is empty")
    return labels


def _from_csv(text: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if COLUMN not in (rows.fieldnames or ()):
        raise ValueError(f"it has no column {COLUMN!r}, but {rows.fieldnames or 'none'}")
    return [(row[COLUMN] or "").strip() for row in rows]


def _from_json(text: str) -> list[str]:
    labels = json.loads(text)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError("it must be a list of names")
    return [label.strip() for label in labels]


def _from_lines(text: str) -> list[str]:
    """Of a line that other separators of Unicode break the whole is the name."""
    return [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
