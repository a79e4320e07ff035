"""Classify or tag a folder of images with a trained MOAT.

    python examples/predict.py --checkpoint FILE_OR_FOLDER --images FOLDER
    python examples/predict.py --checkpoint FOLDER --labels selected_tags.csv --threshold 0.35 \\
        --images FOLDER --output RUN
    python examples/predict.py --model tiny_moat_0 --images FOLDER

Images are searched in all folders below, hidden ones excepted. The results are predictions.csv,
predictions.json and, for images that cannot be read, errors.csv in --output. A run that was
interrupted, in whatever way, goes on where it was if it is started again with the same --output.
Exit codes: 0 all done, 1 error, 2 some images could not be read, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from classifier_options import RUNS
from dense_run import INTERRUPTED, device_of
from files import new_numbered_folder
from photographs import DataError
from prediction_files import ERRORS, JOURNAL, opened_run, write_results
from prediction_images import Decoded, decoded_batches, image_names, state_of
from prediction_journal import Journal, Record
from prediction_model import (
    Classifier,
    chosen,
    known_labels,
    labels_of,
    load_model,
    make_classifier,
    preprocessing_of,
)
from prediction_options import FAILED, parse_options
from progress import Progress
from torch import Tensor
from training import TrainingError

LEFT_OUT = 2  # the exit code if some images could not be read


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict and write the results; returns the exit code."""
    options = parse_options(__doc__ or "", arguments)
    try:
        return _run(options)
    except (DataError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except torch.OutOfMemoryError as error:
        print(f"error: with --batch {options.batch}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:  # before the first image, or while results are written
        print("\nstopped")
        return INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    names = image_names(options.images)
    classifier = _classifier(options)
    output = options.output or _new_folder()
    with opened_run(output, _settings(options, classifier)) as journal:
        batches = _batches(options, names, journal)
        resolution = classifier.preprocessing.resolution
        print(f"{len(classifier.labels)} classes, {resolution} x {resolution} pixels")
        _tell_beginning(options, names, batches, journal)
        stopped = False
        try:
            _predict(options, classifier, batches, journal)
        except KeyboardInterrupt:
            stopped = True
        failed = sorted(set(names).intersection(journal.failed()))
        write_results(output, journal, failed)
        known = len(journal.predicted())
    print(f"results  {known} images in {output}")
    if stopped:
        print(f"stopped; the same command with --output {output} goes on")
        return INTERRUPTED
    if failed:
        print(f"{len(failed)} images were left out, see {output / ERRORS}", file=sys.stderr)
    return LEFT_OUT if failed else 0


def _classifier(options: argparse.Namespace) -> Classifier:
    labels = known_labels(options.labels, options.checkpoint)
    model = load_model(options.model, options.checkpoint, None if labels is None else len(labels))
    return make_classifier(
        model,
        labels_of(model, labels),
        preprocessing_of(model, options.resolution),
        getattr(torch, options.dtype),
        device_of(options),
        freeze=not options.no_freeze,
    )


def _new_folder() -> Path:
    try:
        return new_numbered_folder(RUNS)
    except OSError as error:
        raise DataError(f"--output: cannot write to {RUNS}: {error}") from error


def _settings(options: argparse.Namespace, classifier: Classifier) -> dict[str, Any]:
    """All that, with the images, determines the results."""
    return {
        "checkpoint": str(options.checkpoint) if options.checkpoint else None,
        "weights": classifier.weights,
        "labels": hashlib.sha256(json.dumps(classifier.labels).encode()).hexdigest(),
        "images": str(options.images.resolve()),
        "top": options.top if options.threshold is None else None,
        "threshold": options.threshold,
        **dataclasses.asdict(classifier.preprocessing),
        "batch": options.batch,
        "dtype": options.dtype,
        "device": classifier.device,
        "frozen": classifier.frozen,
    }


def _batches(
    options: argparse.Namespace, names: Sequence[str], journal: Journal
) -> list[list[str]]:
    """What is still to be done of each batch; images that failed before come last.

    An image is in the same batch in every run: its results depend, in the last digit, on that.
    """
    batches = [
        names[start : start + options.batch] for start in range(0, len(names), options.batch)
    ]
    left = [
        [name for name in batch if not _is_done(options.images / name, name, journal)]
        for batch in batches
    ]
    return sorted(filter(None, left), key=lambda batch: all(name in journal for name in batch))


def _is_done(path: Path, name: str, journal: Journal) -> bool:
    """Whether there are predictions of the image, and it has not changed since."""
    try:
        return journal.is_predicted(name, state_of(path))
    except OSError:  # decoding will tell why
        return False


def _tell_beginning(
    options: argparse.Namespace,
    names: Sequence[str],
    batches: Sequence[Sequence[str]],
    journal: Journal,
) -> None:
    """What is there, and how it differs from what an earlier start left."""
    left = sum(map(len, batches))
    done = f", {len(names) - left} of them done before" if left < len(names) else ""
    print(f"{len(names)} images in {options.images}{done}", flush=True)
    if journal.torn:
        print(f"the last {journal.torn} bytes of {JOURNAL} are of an interrupted batch: left out")
    if gone := sorted(set(journal.predicted()).difference(names)):
        print(
            f"warning: {len(gone)} images were deleted since they were predicted, {gone[0]!r} "
            "among them; their predictions stay",
            file=sys.stderr,
        )


def _predict(
    options: argparse.Namespace,
    classifier: Classifier,
    batches: Sequence[Sequence[str]],
    journal: Journal,
) -> None:
    """Predict all batches; the journal has each before it is told that it is done."""
    total, done, predicted, start = sum(map(len, batches)), 0, 0, time.perf_counter()
    if not total:
        return
    progress = Progress(0, total)
    for batch in decoded_batches(
        options.images, batches, classifier.preprocessing, options.workers
    ):
        records = list(_records(batch, classifier, options))
        journal.append(records)
        _tell_errors(records)
        done += len(batch)
        predicted += sum(not record.error for record in records)
        seconds = time.perf_counter() - start
        progress.show(done, f"{predicted / seconds:.1f} images/s")
    print(
        f"{predicted} images in {seconds:.1f} s, {predicted / seconds:.1f} images per second, "
        f"batch {options.batch}, {options.dtype}, {classifier.device}"
        f"{', frozen' if classifier.frozen else ''}"
    )


def _records(
    batch: Sequence[Decoded], classifier: Classifier, options: argparse.Namespace
) -> Iterator[Record]:
    """What is to be written of each image, in their order."""
    pixels = [one.pixels for one in batch if one.pixels is not None]
    results = iter(_results(torch.stack(pixels), classifier, options) if pixels else ())
    for one in batch:
        result = one.error if one.pixels is None else next(results)
        if isinstance(result, str):
            yield Record(one.name, one.state, error=result)
        else:
            yield Record(one.name, one.state, *result)


def _results(
    pixels: Tensor, classifier: Classifier, options: argparse.Namespace
) -> Iterator[tuple[list[str], list[float]] | str]:
    """Of each image labels and scores, or why there are none."""
    logits = classifier.logits(pixels)
    finite = logits.isfinite().all(1).tolist()
    rows = chosen(logits, options.top, options.threshold)
    for (indices, scores), is_finite in zip(rows, finite, strict=True):
        if is_finite:
            yield [classifier.labels[index] for index in indices], scores
        else:
            yield _not_finite(options)


def _not_finite(options: argparse.Namespace) -> str:
    advice = "" if options.dtype == "float32" else "; --dtype float32 may help"
    return f"the model's outputs for it are not finite in {options.dtype}{advice}"


def _tell_errors(records: Sequence[Record]) -> None:
    before = "\n" if sys.stdout.isatty() else ""  # behind the progress bar
    for record in records:
        if record.error:
            print(f"{before}left out: {record.image}: {record.error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
