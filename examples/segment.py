"""Train a segmentation model, DeepLabv3+ on a MOAT: what is in each pixel of an image.

    python examples/segment.py --blocks both
    python examples/segment.py --model moat_0 --checkpoint FILE --data FOLDER --crop 641 \\
        --steps 5000

The default data are nuclei under a microscope, in one image: a part of it is held out. With "both",
two models start from the same weights and see the same batches; their steps alternate, so that
whatever else the machine does slows both alike. Results go to --output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import dense_run
from classifier_options import positive
from labelled_images import LabelledImages, Microscopy, training_batch
from mask_folder import MaskFolder
from memory import saved_for_backward
from photographs import DataError
from report import format_table, write_json
from segmentation_picture import draw_picture
from segmentation_scores import (
    Confusion,
    Scores,
    SegmentationMeasurements,
    best_step,
    otsu,
    score_rows,
)
from segmentation_training import Trainer, peak_of_step
from torch import Tensor
from training import Settings, TrainingError
from weights import Weights

import moat_kernels

TESTS = 10  # on what is held out, while training


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, test and report; returns the exit code (2: what it prints as an error)."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (DataError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = dense_run.new_parser(__doc__ or "")
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="a folder with images/ and, of the same names, masks/*.png of class indices (255: "
        "ignored); a fifth is held out (default: nuclei under a microscope, from the stardist "
        "package)",
    )
    add("--steps", type=positive(int), default=200, metavar="N", help="default: 200")
    add("--batch-size", type=_at_least_two, default=4, metavar="N", help="from 2 on (default: 4)")
    add(
        "--crop",
        type=positive(int),
        default=161,
        metavar="PIXELS",
        help="side of the square crops that are trained on; the MOAT paper has 641 (default: 161)",
    )
    add("--amp", action="store_true", help="autocast to bfloat16")
    dense_run.add_run_options(add)
    return parser


def _at_least_two(text: str) -> int:
    """Of one image the batch norm of what is pooled over the whole map would know nothing."""
    if (value := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"must be 2 or more, got {text}")
    return value


def _run(options: argparse.Namespace) -> int:
    images = MaskFolder(options.data) if options.data else Microscopy()
    settings = _settings(options, images)
    trainers = _trainers(options.blocks, settings)
    output = dense_run.make_output(options)
    print(
        f"{settings.model} in DeepLabv3+ on {images.name}, {settings.steps} steps of "
        f"{settings.batch_size} crops of {settings.resolution} x {settings.resolution} pixels, "
        f"{settings.device}",
        flush=True,
    )
    weights = Weights(output)
    try:
        dense_run.train(
            trainers,
            lambda step: _batch(settings, images, step),
            lambda trainer: _test_and_save(trainer, images, weights),
            TESTS,
            _quality,
        )
        results = _measure(trainers, images)
    except KeyboardInterrupt:
        print(f"\nstopped; weights that were saved until then are in {output}")
        return dense_run.INTERRUPTED
    try:
        print(format_table(results, settings.device, score_rows(settings.classes)))
        if baseline := results[0].baseline:
            print(f"\nfor comparison, {_in_words(baseline, settings.classes)}")
        write_json(output / "results.json", results, settings)
        print(f"\nnumbers  {output / 'results.json'}")
        drawn = draw_picture(output / "picture.png", results, trainers, images)
    except OSError as error:
        raise TrainingError(f"--output: cannot write to {output}: {error}") from error
    print(f"picture  {output / 'picture.png' if drawn else 'not drawn: no matplotlib'}")
    dense_run.report_weights(weights, output)
    return 0


def _settings(options: argparse.Namespace, images: LabelledImages) -> Settings:
    return Settings(
        model=options.model,
        classes=images.classes,
        resolution=options.crop,
        batch_size=options.batch_size,
        steps=options.steps,
        lr=options.lr,
        seed=options.seed,
        amp=options.amp,
        recompute="auto",
        device=dense_run.device_of(options),
        checkpoint=str(options.checkpoint) if options.checkpoint else None,
    )


def _trainers(blocks: str, settings: Settings) -> list[Trainer]:
    """The models to train, all with the very same weights."""
    trainers = [Trainer(kind, settings) for kind in dense_run.kinds(blocks)]
    backbone = trainers[0].model.backbone
    dense_run.start_alike(trainers, backbone, settings.checkpoint, settings.model)
    return trainers


def _test_and_save(trainer: Trainer, images: LabelledImages, weights: Weights) -> None:
    latest = trainer.test(images)
    is_best = latest is not None and len(trainer.losses) == best_step(trainer.scores)
    dense_run.save(trainer, weights, is_best, {"mean_iou": str(latest and latest.mean_iou)})


def _batch(settings: Settings, images: LabelledImages, step: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a step, on the device."""
    pixels, labels = training_batch(
        images,
        seed=settings.seed,
        step=step,
        batch_size=settings.batch_size,
        size=settings.resolution,
        preprocessing=moat_kernels.get_preprocessing(settings.model),
    )
    return pixels.to(settings.device), labels.to(settings.device)


def _quality(trainers: Sequence[Trainer]) -> str:
    """Of each kind of blocks the last mean IoU."""
    if not all(one.scores for one in trainers):
        return ""
    last = (list(one.scores.values())[-1] for one in trainers)
    return f", mean IoU {'/'.join(f'{one.mean_iou:.3f}' for one in last)}"


def _measure(trainers: Sequence[Trainer], images: LabelledImages) -> list[SegmentationMeasurements]:
    """What the report tells, memory with the first batch."""
    print("measuring memory", flush=True)
    batch, baseline = _batch(trainers[0].settings, images, 0), _baseline(images)
    return [
        SegmentationMeasurements(
            blocks=trainer.blocks,
            losses=trainer.losses,
            step_seconds=trainer.step_seconds,
            scores=trainer.scores,
            baseline=baseline,
            saved_bytes=saved_for_backward(trainer, *batch),
            peak_bytes=peak_of_step(trainer, *batch),
        )
        for trainer in trainers
    ]


def _baseline(images: LabelledImages) -> Scores | None:
    """What brightness alone tells, where one class is brighter than the other."""
    if images.bright is None:
        return None
    confusion = Confusion(len(images.classes))
    for one in images.held_out():
        if (found := otsu(one.image, images.bright)) is None:
            return None
        confusion.add(found, one.labels)
    return confusion.scores()


def _in_words(baseline: Scores, classes: Sequence[str]) -> str:
    each = ", ".join(f"{name} {iou:.3f}" for name, iou in zip(classes, baseline.iou, strict=True))
    return f"Otsu's threshold: mean IoU {baseline.mean_iou:.3f} ({each})"


if __name__ == "__main__":
    sys.exit(main())
