"""The folder of a run of predict.py: settings, what was computed so far, and the results of it."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from files import sync_folder, written_whole
from photographs import DataError
from prediction_journal import Journal, JournalError, opened_journal

SETTINGS, JOURNAL = "run.json", "journal.jsonl"
PREDICTIONS_CSV, PREDICTIONS_JSON = "predictions.csv", "predictions.json"
ERRORS = "errors.csv"
FREE = "checkpoint"  # of the settings: where the weights lie may change, they may not


@contextmanager
def opened_run(folder: Path, settings: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of the run in `folder`, a new one or one of the same settings to go on with.

    Raises DataError where it is of others, or cannot be read or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(folder)
        with opened_journal(folder / JOURNAL) as journal:
            _agree_on_settings(folder / SETTINGS, settings, empty=not len(journal))
            yield journal
    except (OSError, JournalError) as error:
        raise DataError(f"--output {folder}: {error}") from error


def _refuse_strangers(folder: Path) -> None:
    """DataError if results of something else lie where those of the run would be written."""
    if os.path.lexists(folder / SETTINGS):
        return
    for name in (PREDICTIONS_CSV, PREDICTIONS_JSON, ERRORS):
        if os.path.lexists(folder / name):
            raise DataError(
                f"--output {folder} has a {name}, but no {SETTINGS} of a run that it would be "
                "from: choose another folder"
            )


def _agree_on_settings(path: Path, settings: Mapping[str, Any], empty: bool) -> None:
    """Write the settings of a new run, or check those of one to go on with: DataError."""
    wanted = json.loads(json.dumps(settings))
    if path.exists() and not empty:
        differing = _differences(_read_settings(path), wanted)
        if differing:
            raise DataError(
                f"--output {path.parent} holds a run of other settings ({'; '.join(differing)}): "
                "choose another folder, or start with the same"
            )
        return
    with written_whole(path) as new:
        new.write_text(json.dumps(wanted, indent=2) + "\n")
    sync_folder(path.parent)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path} is damaged: it holds no settings")
    return settings


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {json.dumps(found.get(name))}, is {json.dumps(wanted.get(name))}"
        for name in dict.fromkeys([*found, *wanted])
        if name != FREE and found.get(name) != wanted.get(name)
    ]


def write_results(folder: Path, journal: Journal, failed: Sequence[str]) -> None:
    """What the journal knows, sorted by the paths of images, and the reasons of those that failed.

    A function of the records alone: however often a run was interrupted, its files are the same.
    Each is written whole or not at all (OSError).
    """
    with written_whole(folder / PREDICTIONS_CSV) as new, _text(new) as file:
        _write_rows(file, ("image", "label", "score"), _scored_rows(journal))
    with written_whole(folder / PREDICTIONS_JSON) as new, _text(new) as file:
        _write_json(file, journal)
    with written_whole(folder / ERRORS) as new, _text(new) as file:
        _write_rows(
            file, ("image", "reason"), ((name, journal.read(name).error) for name in failed)
        )


def _text(path: Path) -> TextIO:
    # The bytes of names that are no UTF-8 stay as they are.
    return path.open("w", encoding="utf-8", errors="surrogateescape", newline="")


def _write_rows(file: TextIO, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)


def _scored_rows(journal: Journal) -> Iterator[tuple[str, str, float | str]]:
    """A row for each label; one without for an image that has none."""
    for name in journal.predicted():
        record = journal.read(name)
        scored = zip(record.labels, record.scores, strict=True)
        yield from ((name, *pair) for pair in scored) if record.labels else [(name, "", "")]


def _write_json(file: TextIO, journal: Journal) -> None:
    """A list of images, a line each, each with the list of its labels."""
    separator = "[\n"
    for name in journal.predicted():
        record = journal.read(name)
        predictions = [
            {"label": label, "score": score}
            for label, score in zip(record.labels, record.scores, strict=True)
        ]
        file.write(separator + json.dumps({"image": name, "predictions": predictions}))
        separator = ",\n"
    file.write("[]\n" if separator == "[\n" else "\n]\n")
