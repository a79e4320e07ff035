"""Train a detector, Cascade Mask R-CNN on a MOAT, and find objects: their boxes and their masks.

    python examples/detect.py --blocks both
    python examples/detect.py --model moat_0 --checkpoint FILE --data FOLDER --steps 5000

The default data are nuclei under a microscope, in one image: a part of it is held out. With "both",
two detectors start from the same weights and see the same batches; their steps alternate, so that
whatever else the machine does slows both alike. Results go to --output.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    import dense_run
    from average_precision import best_step
    from cascade_mask_rcnn import Sizes
    from classifier_options import positive
    from coco_folder import CocoFolder
    from detection_picture import SHOWN, draw_picture
    from detection_report import PRECISION_ROWS, DetectorMeasurements
    from detector_training import Settings, Target, Trainer, peak_of_step
    from memory import saved_for_backward
    from photographs import DataError
    from report import format_table, write_json
    from scenes import Microscopy, Scenes, training_batch
    from torch import Tensor
    from training import TrainingError
    from weights import Weights
except ModuleNotFoundError as error:
    sys.exit(
        f"error: {error}; beside torch and torchvision this example needs: pip install pillow; "
        "pip install --no-deps -r requirements-examples.txt"
    )
except ImportError as error:
    sys.exit(f"error: {error}")


TESTS = 5  # on what is held out, while training; after the first steps there is nothing to see
# Nuclei are small, all alike, and many.
FOR_NUCLEI = Sizes(
    channels=64,
    mask_channels=32,
    hidden=256,
    anchor=24,
    proposals=200,
    samples=64,
    objects=0.5,
    detections=100,
)


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
        help="a folder with images/ and annotations.json in COCO's format; a fifth of the images "
        "is held out (default: nuclei under a microscope, from the stardist package)",
    )
    add("--steps", type=positive(int), default=300, metavar="N", help="default: 300")
    add("--batch-size", type=positive(int), default=2, metavar="N", help="default: 2")
    add(
        "--resolution",
        type=positive(int),
        default=192,
        metavar="PIXELS",
        help="side of the square crops that are trained on, a multiple of 32 (default: 192)",
    )
    dense_run.add_run_options(add)
    return parser


def _run(options: argparse.Namespace) -> int:
    scenes = CocoFolder(options.data) if options.data else Microscopy()
    settings = _settings(options, scenes)
    trainers = _trainers(options.blocks, settings)
    output = dense_run.make_output(options)
    print(
        f"{settings.model} in Cascade Mask R-CNN on {scenes.name}, {settings.steps} steps of "
        f"{settings.batch_size} crops of {settings.resolution} x {settings.resolution} pixels, "
        f"{settings.device}",
        flush=True,
    )
    weights = Weights(output)
    try:
        dense_run.train(
            trainers,
            lambda step: _batch(settings, scenes, step),
            lambda trainer: _test_and_save(trainer, scenes, weights),
            TESTS,
            _quality,
        )
        shown = list(itertools.islice(scenes.held_out(), SHOWN))
        found = [[trainer.detect(scene.image) for scene in shown] for trainer in trainers]
        results = _measure(trainers, scenes)
    except KeyboardInterrupt:
        print(f"\nstopped; weights that were saved until then are in {output}")
        return dense_run.INTERRUPTED
    try:
        print(format_table(results, settings.device, PRECISION_ROWS), flush=True)
        write_json(output / "results.json", results, settings)
        print(f"\nnumbers  {output / 'results.json'}")
        drawn = draw_picture(output / "picture.png", results, shown, found, settings)
    except OSError as error:
        raise TrainingError(f"--output: cannot write to {output}: {error}") from error
    print(f"picture  {output / 'picture.png' if drawn else 'not drawn: no matplotlib'}")
    dense_run.report_weights(weights, output)
    return 0


def _settings(options: argparse.Namespace, scenes: Scenes) -> Settings:
    if options.resolution % 32:
        raise TrainingError(
            f"--resolution {options.resolution} must be a multiple of 32, the stride of the "
            "coarsest map"
        )
    return Settings(
        model=options.model,
        classes=scenes.classes,
        sizes=Sizes() if options.data else FOR_NUCLEI,
        resolution=options.resolution,
        batch_size=options.batch_size,
        steps=options.steps,
        lr=options.lr,
        seed=options.seed,
        device=dense_run.device_of(options),
        checkpoint=str(options.checkpoint) if options.checkpoint else None,
    )


def _trainers(blocks: str, settings: Settings) -> list[Trainer]:
    """The detectors to train, all with the very same weights."""
    trainers = [Trainer(kind, settings) for kind in dense_run.kinds(blocks)]
    moat = trainers[0].model.backbone.moat
    dense_run.start_alike(trainers, moat, settings.checkpoint, settings.model)
    return trainers


def _test_and_save(trainer: Trainer, scenes: Scenes, weights: Weights) -> None:
    latest = trainer.test(scenes)
    is_best = len(trainer.losses) == best_step(trainer.precisions)
    metadata = {"box_ap": str(latest.box), "mask_ap": str(latest.mask)}
    dense_run.save(trainer, weights, is_best, metadata)


def _batch(settings: Settings, scenes: Scenes, step: int) -> tuple[list[Tensor], list[Target]]:
    """Images and targets of a step, on the device."""
    images, targets = training_batch(
        scenes,
        seed=settings.seed,
        step=step,
        batch_size=settings.batch_size,
        size=settings.resolution,
    )
    return (
        [image.to(settings.device) for image in images],
        [{name: each.to(settings.device) for name, each in one.items()} for one in targets],
    )


def _quality(trainers: Sequence[Trainer]) -> str:
    """Of each kind of blocks the last average precision."""
    if not all(one.precisions for one in trainers):
        return ""
    last = [list(one.precisions.values())[-1] for one in trainers]
    boxes, masks = (
        "/".join(f"{getattr(one, kind):.3f}" for one in last) for kind in ("box", "mask")
    )
    return f", AP of boxes {boxes}, of masks {masks}"


def _measure(trainers: Sequence[Trainer], scenes: Scenes) -> list[DetectorMeasurements]:
    """What the report tells, memory with the first batch."""
    print("measuring memory", flush=True)
    images, targets = _batch(trainers[0].settings, scenes, 0)
    return [
        DetectorMeasurements(
            blocks=trainer.blocks,
            losses=trainer.losses,
            step_seconds=trainer.step_seconds,
            precisions=trainer.precisions,
            saved_bytes=saved_for_backward(trainer, images, targets),
            peak_bytes=peak_of_step(trainer, images, targets),
        )
        for trainer in trainers
    ]


if __name__ == "__main__":
    sys.exit(main())
