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
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from classifier_options import positive, seed
from files import new_numbered_folder
from labelled_images import LabelledImages, Microscopy, training_batch
from mask_folder import MaskFolder
from memory import saved_for_backward
from photographs import DataError
from pretrained import backbone_from
from progress import Progress
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
from weights import Weights, put_aside

import moat_kernels

RUNS = Path("runs")
INTERRUPTED = 130  # the exit code that shells use after Ctrl-C
BEST, LAST = "{}_best.safetensors", "{}_last.safetensors"  # in --output, of a kind of blocks
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
    add("--lr", type=positive(float), default=2e-3, metavar="RATE", help="default: 0.002")
    add("--seed", type=seed, default=0, metavar="N", help="default: 0")
    add("--amp", action="store_true", help="autocast to bfloat16")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"where weights, picture and numbers go (default: a new folder in {RUNS}/)",
    )
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
    output = _make_output(options)
    print(
        f"{settings.model} in DeepLabv3+ on {images.name}, {settings.steps} steps of "
        f"{settings.batch_size} crops of {settings.resolution} x {settings.resolution} pixels, "
        f"{settings.device}",
        flush=True,
    )
    weights = Weights(output)
    try:
        _train(trainers, images, weights)
        results = _measure(trainers, images)
    except KeyboardInterrupt:
        print(f"\nstopped; weights that were saved until then are in {output}")
        return INTERRUPTED
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
    if failure := weights.failure():
        raise TrainingError(failure)
    print(f"weights  {', '.join(sorted(str(path) for path in output.glob('*.safetensors')))}")
    return 0


def _settings(options: argparse.Namespace, images: LabelledImages) -> Settings:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch finds no CUDA device here")
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
        device="cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu",
        checkpoint=str(options.checkpoint) if options.checkpoint else None,
    )


def _trainers(blocks: str, settings: Settings) -> list[Trainer]:
    """The models to train, all with the very same weights."""
    trainers = [Trainer(kind, settings) for kind in _kinds(blocks)]
    if settings.checkpoint:
        backbone = trainers[0].model.backbone
        print(backbone_from(backbone, Path(settings.checkpoint), settings.model))
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


def _train(trainers: Sequence[Trainer], images: LabelledImages, weights: Weights) -> None:
    settings = trainers[0].settings
    progress = Progress(0, settings.steps)
    for step in range(settings.steps):
        batch = _batch(settings, images, step)
        # Who goes first alternates too.
        for trainer in trainers if step % 2 == 0 else reversed(trainers):
            trainer.step(step, *batch)
        done = step + 1
        if done * TESTS // settings.steps > step * TESTS // settings.steps:
            for trainer in trainers:
                _test_and_save(trainer, images, weights)
        progress.show(done, _latest(trainers))


def _test_and_save(trainer: Trainer, images: LabelledImages, weights: Weights) -> None:
    latest = trainer.test(images)
    settings, step = trainer.settings, len(trainer.losses)
    metadata = {
        "model": settings.model,
        "classes": json.dumps(settings.classes),
        "step": str(step),
        "mean_iou": str(latest and latest.mean_iou),
    }
    if latest and step == best_step(trainer.scores):
        weights.save(trainer.model, BEST.format(trainer.blocks), metadata)
    weights.save(trainer.model, LAST.format(trainer.blocks), metadata)


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


def _latest(trainers: Sequence[Trainer]) -> str:
    """Of each kind of blocks the last loss, time and mean IoU."""

    def each(value: Callable[[Trainer], str]) -> str:
        return "/".join(map(value, trainers))

    text = f"{each(lambda one: one.blocks)}: loss {each(lambda one: f'{one.losses[-1]:.3f}')}, "
    text += f"{each(lambda one: f'{one.step_seconds[-1]:.2f}')} s"
    if not all(one.scores for one in trainers):
        return text
    last = each(lambda one: f"{list(one.scores.values())[-1].mean_iou:.3f}")
    return f"{text}, mean IoU {last}"


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
