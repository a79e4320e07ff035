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
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

try:
    import torch
    from average_precision import best_step
    from cascade_mask_rcnn import Sizes
    from classifier_options import positive, seed
    from coco_folder import CocoFolder
    from detection_picture import SHOWN, draw_picture
    from detection_report import PRECISION_ROWS, DetectorMeasurements
    from detector_training import Settings, Target, Trainer, peak_of_step
    from files import new_numbered_folder
    from memory import saved_for_backward
    from photographs import DataError
    from pretrained import backbone_from
    from progress import Progress
    from report import format_table, write_json
    from scenes import Microscopy, Scenes, training_batch
    from torch import Tensor
    from training import TrainingError
    from weights import Weights, put_aside
except ModuleNotFoundError as error:
    sys.exit(
        f"error: {error}; beside torch and torchvision this example needs: pip install pillow; "
        "pip install --no-deps -r requirements-examples.txt"
    )
except ImportError as error:
    sys.exit(f"error: {error}")

import moat_kernels

RUNS = Path("runs")
INTERRUPTED = 130  # the exit code that shells use after Ctrl-C
BEST, LAST = "{}_best.safetensors", "{}_last.safetensors"  # in --output, of a kind of blocks
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
    summary, _, explanation = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=explanation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--blocks", choices=("stock", "fused", "both"), default="fused")
    add(
        "--model",
        choices=moat_kernels.list_models(),
        default="tiny_moat_0",
        metavar="NAME",
        help="moat_0 .. moat_4, tiny_moat_0 .. tiny_moat_3 (default: tiny_moat_0)",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a classifier's weights for the backbone to start from: an official TensorFlow "
        "checkpoint, .safetensors or .pt",
    )
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
    add("--lr", type=positive(float), default=2e-3, metavar="RATE", help="default: 0.002")
    add("--seed", type=seed, default=0, metavar="N", help="default: 0")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"where weights, picture and numbers go (default: a new folder in {RUNS}/)",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    scenes = CocoFolder(options.data) if options.data else Microscopy()
    settings = _settings(options, scenes)
    trainers = _trainers(options.blocks, settings)
    output = _make_output(options)
    print(
        f"{settings.model} in Cascade Mask R-CNN on {scenes.name}, {settings.steps} steps of "
        f"{settings.batch_size} crops of {settings.resolution} x {settings.resolution} pixels, "
        f"{settings.device}",
        flush=True,
    )
    weights = Weights(output)
    try:
        _train(trainers, scenes, weights)
        shown = list(itertools.islice(scenes.held_out(), SHOWN))
        found = [[trainer.detect(scene.image) for scene in shown] for trainer in trainers]
        results = _measure(trainers, scenes)
    except KeyboardInterrupt:
        print(f"\nstopped; weights that were saved until then are in {output}")
        return INTERRUPTED
    try:
        print(format_table(results, settings.device, PRECISION_ROWS), flush=True)
        write_json(output / "results.json", results, settings)
        print(f"\nnumbers  {output / 'results.json'}")
        drawn = draw_picture(output / "picture.png", results, shown, found, settings)
    except OSError as error:
        raise TrainingError(f"--output: cannot write to {output}: {error}") from error
    print(f"picture  {output / 'picture.png' if drawn else 'not drawn: no matplotlib'}")
    if failure := weights.failure():
        raise TrainingError(failure)
    print(f"weights  {', '.join(sorted(str(path) for path in output.glob('*.safetensors')))}")
    return 0


def _settings(options: argparse.Namespace, scenes: Scenes) -> Settings:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch finds no CUDA device here")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
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
        device=device,
        checkpoint=str(options.checkpoint) if options.checkpoint else None,
    )


def _trainers(blocks: str, settings: Settings) -> list[Trainer]:
    """The detectors to train, all with the very same weights."""
    trainers = [Trainer(kind, settings) for kind in _kinds(blocks)]
    if settings.checkpoint:
        moat = trainers[0].model.backbone.moat
        print(backbone_from(moat, Path(settings.checkpoint), settings.model))
    for trainer in trainers[1:]:
        trainer.model.load_state_dict(trainers[0].model.state_dict())
    return trainers


def _kinds(blocks: str) -> tuple[str, ...]:
    return ("stock", "fused") if blocks == "both" else (blocks,)


def _make_output(options: argparse.Namespace) -> Path:
    """Before training, not after it, is the time to find that nothing can be written."""
    wanted = options.output or RUNS
    try:
        folder = options.output or new_numbered_folder(RUNS)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for name in (BEST, LAST):
            for blocks in _kinds(options.blocks):
                put_aside(folder / name.format(blocks))
        return folder
    except OSError as error:
        raise TrainingError(f"--output: cannot write to {wanted}: {error}") from error


def _train(trainers: Sequence[Trainer], scenes: Scenes, weights: Weights) -> None:
    settings = trainers[0].settings
    progress = Progress(0, settings.steps)
    for step in range(settings.steps):
        batch = _batch(settings, scenes, step)
        # Who goes first alternates too.
        for trainer in trainers if step % 2 == 0 else reversed(trainers):
            trainer.step(step, *batch)
        done = step + 1
        if done * TESTS // settings.steps > step * TESTS // settings.steps:
            for trainer in trainers:
                _test_and_save(trainer, scenes, weights)
        progress.show(done, _latest(trainers))


def _test_and_save(trainer: Trainer, scenes: Scenes, weights: Weights) -> None:
    latest = trainer.test(scenes)
    settings, step = trainer.settings, len(trainer.losses)
    metadata = {
        "model": settings.model,
        "classes": json.dumps(settings.classes),
        "step": str(step),
        "box_ap": str(latest.box),
        "mask_ap": str(latest.mask),
    }
    if step == best_step(trainer.precisions):
        weights.save(trainer.model, BEST.format(trainer.blocks), metadata)
    weights.save(trainer.model, LAST.format(trainer.blocks), metadata)


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


def _latest(trainers: Sequence[Trainer]) -> str:
    """Of each kind of blocks the last loss, time and average precision."""

    def each(value: Callable[[Trainer], str]) -> str:
        return "/".join(map(value, trainers))

    text = f"{each(lambda one: one.blocks)}: loss {each(lambda one: f'{one.losses[-1]:.3f}')}, "
    text += f"{each(lambda one: f'{one.step_seconds[-1]:.2f}')} s"
    if not all(one.precisions for one in trainers):
        return text
    last = [list(one.precisions.values())[-1] for one in trainers]
    boxes, masks = (
        "/".join(f"{getattr(one, kind):.3f}" for one in last) for kind in ("box", "mask")
    )
    return f"{text}, AP of boxes {boxes}, of masks {masks}"


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
