"""Train a MOAT classifier on photographs, with stock blocks, fused blocks, or both side by side.

    python examples/train_classifier.py --blocks both
    python examples/train_classifier.py --model moat_0 --checkpoint FILE --data FOLDER --steps 5000
    python examples/train_classifier.py --model moat_0 --checkpoint FILE --data FOLDER --evaluate
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 4 --max-restarts 3 \\
        examples/train_classifier.py --data FOLDER --output FOLDER

With "both", two models start from the same weights and see the same batches; their steps
alternate, so that whatever else the machine does slows both alike. Results go to --output.
Under torchrun each process takes its share of every batch. With --max-restarts all start again if
one dies, and continue from the last state saved in --output.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import processes
import torch
from chart import draw_chart
from checkpoint_folder import checkpoints, refuse_strangers
from checkpointing import CheckpointError, load_checkpoint, save_checkpoint
from classifier_options import RUNS, parse_options
from classifier_report import ClassifierMeasurements, accuracy_rows
from files import new_numbered_folder
from memory import peak_of_step, saved_for_backward
from photographs import (
    DataError,
    Example,
    Photographs,
    bundled_photographs,
    folder_photographs,
    training_batch,
    unusable,
)
from pretrained import evaluate_from, start_from
from progress import Progress
from report import format_table, write_json
from torch import Tensor
from training import Settings, Trainer, TrainingError
from validation import best_of, validate
from weights import Weights, put_aside

import moat_kernels
from moat_kernels.preprocessing import Preprocessing

INTERRUPTED = 130  # the exit code that shells use after Ctrl-C
NAMED = 20  # photographs that cannot be used, at most; the others are counted
BEST, LAST = "{}_best.safetensors", "{}_last.safetensors"  # in --output, of a kind of blocks


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure and report; returns the exit code (2: what it prints as an error)."""
    options = parse_options(__doc__ or "", arguments)
    try:
        return _run(options)
    except (DataError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    photographs = folder_photographs(options.data) if options.data else bundled_photographs()
    if not photographs.training and not options.evaluate:
        raise DataError(
            f"--data: {options.data / 'val'} has classes, {options.data / 'train'} has none: "
            "there is nothing to train on"
        )
    settings = _settings(options, photographs)
    with processes.joined_processes(settings.device):
        if options.evaluate:
            return _evaluate(options, photographs, settings)
        return _train_and_report(options, photographs, settings)


def _evaluate(options: argparse.Namespace, photographs: Photographs, settings: Settings) -> int:
    trainers = _trainers(options, settings)
    _check_photographs(photographs.held_out)
    for trainer in trainers:
        result = validate(trainer, photographs.held_out, 0)
        if result is None:
            raise DataError("none of the photographs can be read any more")
        _say(
            f"{settings.model}, {trainer.blocks} blocks: top-1 {result.accuracy:.1%} of "
            f"{result.pictures} held out of {len(settings.classes)} classes, loss {result.loss:.4f}"
        )
    return 0


def _train_and_report(
    options: argparse.Namespace, photographs: Photographs, settings: Settings
) -> int:
    if settings.batch_size % processes.count():
        raise TrainingError(
            f"--batch-size {settings.batch_size} must be a multiple of the "
            f"{processes.count()} processes"
        )
    try:
        trainers = _trainers(options, settings)
        source = _resumed_from(options)
        done = _resume(trainers, source, options)
        _check_photographs([*photographs.training, *photographs.held_out])
        output = _make_output(options, source)
        _say(
            f"{settings.model} on {len(photographs.training)} photographs of "
            f"{len(photographs.classes)} classes, {settings.steps} steps of {settings.batch_size} "
            f"crops of {settings.resolution} x {settings.resolution} pixels, {settings.device}"
        )
        measured_on = _training_batch(photographs, settings, 0)
        unsaved = _train(trainers, photographs, done, options, output)
        results = _measure(trainers, *measured_on)
    except KeyboardInterrupt:
        kept = options.output and checkpoints(options.output)
        _say(
            f"\nstopped; --resume {options.output} continues from {kept[-1].name}"
            if kept
            else "\nstopped; with --output the state would be saved, for --resume"
        )
        return INTERRUPTED
    try:
        # The others wait: torchrun ends all when one of them ends with an error.
        processes.first_alone(lambda: _report(results, settings, output))
    except OSError as error:
        raise TrainingError(f"--output: cannot write to {output}: {error}") from error
    if unsaved:
        raise unsaved
    return 0


def _check_photographs(examples: Sequence[Example]) -> None:
    """All can be read, or DataError: hours later it would be too late to find out."""
    files = list(dict.fromkeys(example.path for example in examples))
    share = files[processes.rank() :: processes.count()]
    reasons = processes.from_all(unusable(share))
    if reasons:
        more = [f"and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else []
        lines = "\n  ".join([*reasons[:NAMED], *more])
        raise DataError(
            f"{len(reasons)} of {len(files)} photographs cannot be used, mend them or move them "
            f"away:\n  {lines}"
        )


def _report(results: Sequence[ClassifierMeasurements], settings: Settings, folder: Path) -> None:
    print(format_table(results, settings.device, accuracy_rows(results)), flush=True)
    write_json(folder / "results.json", results, settings)
    print(f"\nnumbers  {folder / 'results.json'}")
    if draw_chart(folder / "chart.png", results, settings):
        print(f"chart    {folder / 'chart.png'}")
    else:
        print("chart    not drawn: matplotlib is not installed")
    for one in results:
        files = [folder / name.format(one.blocks) for name in (BEST, LAST)]
        written = [str(file) for file in files if file.exists()]
        print(f"weights  {'  '.join(written)}")


def _say(text: str) -> None:
    """Print once, however many processes there are."""
    if processes.rank() == 0:
        print(text, flush=True)


def _resumed_from(options: argparse.Namespace) -> Path | None:
    """Where to continue: at --resume, or, if torchrun restarts us, at our own last checkpoint."""
    earlier = checkpoints(options.output) if options.output else []
    if processes.may_restart() and earlier:
        return options.output
    if earlier and options.resume is None:
        raise TrainingError(
            f"--output {options.output} holds checkpoints of another run; continue it with "
            "--resume, or choose another folder"
        )
    return options.resume


def _resume(trainers: Sequence[Trainer], source: Path | None, options: argparse.Namespace) -> int:
    """Go to where the run shall continue; returns the number of steps done."""
    done = load_checkpoint(source, trainers) if source else 0
    if options.output:
        refuse_strangers(options.output, lambda step: step > done and _is_due(step, options))
    return done


def _is_due(step: int, options: argparse.Namespace) -> bool:
    """Whether a checkpoint is written after `step` steps."""
    return step == options.steps or (step < options.steps and step % options.checkpoint_every == 0)


def _settings(options: argparse.Namespace, photographs: Photographs) -> Settings:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch finds no CUDA device here")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    return Settings(
        model=options.model,
        classes=photographs.classes,
        resolution=options.resolution or moat_kernels.get_preprocessing(options.model).resolution,
        batch_size=options.batch_size,
        steps=options.steps,
        lr=options.lr,
        seed=options.seed,
        amp=options.amp,
        recompute=options.recompute,
        device=device,
        checkpoint=str(options.checkpoint) if options.checkpoint else None,
    )


def _make_output(options: argparse.Namespace, source: Path | None) -> Path:
    """Before training, not after it, is the time to find that nothing can be written."""

    def make() -> Path:
        folder = options.output or new_numbered_folder(RUNS)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if not source or folder.resolve() not in (source.resolve(), source.resolve().parent):
            for name, blocks in itertools.product((BEST, LAST), _kinds(options)):
                put_aside(folder / name.format(blocks))
        return folder

    try:
        return processes.first_alone(make)
    except OSError as error:
        wanted = options.output or RUNS
        raise TrainingError(f"--output: cannot write to {wanted}: {error}") from error


def _kinds(options: argparse.Namespace) -> tuple[str, ...]:
    return ("stock", "fused") if options.blocks == "both" else (options.blocks,)


def _trainers(options: argparse.Namespace, settings: Settings) -> list[Trainer]:
    """The models to train, all with the very same weights."""
    trainers = [Trainer(kind, settings) for kind in _kinds(options)]
    if options.checkpoint:
        load = evaluate_from if options.evaluate else start_from
        _say(load(trainers[0].model, options.checkpoint, settings))
    for trainer in trainers[1:]:
        trainer.model.load_state_dict(trainers[0].model.state_dict())
    for trainer in trainers:
        trainer.model.describe_images(_preprocessing(settings))
    return trainers


def _preprocessing(settings: Settings) -> Preprocessing:
    """How the held out photographs are prepared: what the files of the weights tell."""
    own = moat_kernels.get_preprocessing(settings.model)
    return dataclasses.replace(own, resolution=settings.resolution, crop_pct=1.0)


def _train(
    trainers: Sequence[Trainer],
    photographs: Photographs,
    done: int,
    options: argparse.Namespace,
    output: Path,
) -> TrainingError | None:
    """Train to the end; returns what of the end could not be written, if anything could not."""
    unsaved: TrainingError | None = None
    settings, weights = trainers[0].settings, Weights(output)
    every = options.validate_every or max(1, settings.steps // 10)
    progress = Progress(done, settings.steps)
    for step in range(done, settings.steps):
        batch = _training_batch(photographs, settings, step)
        # Who goes first alternates too.
        for trainer in trainers if step % 2 == 0 else reversed(trainers):
            trainer.step(step, *batch)
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            for trainer in trainers:
                _validate_and_save(trainer, photographs.held_out, step + 1, weights)
        if processes.rank() == 0:
            progress.show(step + 1, _latest(trainers))
        if options.output and _is_due(step + 1, options):
            unsaved = _try_to_save(output, trainers, step + 1)
    if not unsaved and (failure := weights.failure()):
        return TrainingError(failure)
    return unsaved


def _validate_and_save(
    trainer: Trainer, held_out: Sequence[Example], step: int, weights: Weights
) -> None:
    latest = validate(trainer, held_out, step)
    metadata = {
        "model": trainer.settings.model,
        "classes": json.dumps(trainer.settings.classes),
        "resolution": str(trainer.settings.resolution),
        "step": str(step),
    }
    if latest:
        trainer.validations.append(latest)
        metadata["accuracy"] = str(latest.accuracy)
        if latest is best_of(trainer.validations):
            weights.save(trainer.model, BEST.format(trainer.blocks), metadata)
    weights.save(trainer.model, LAST.format(trainer.blocks), metadata)


def _try_to_save(folder: Path, trainers: Sequence[Trainer], step: int) -> CheckpointError | None:
    """Write a checkpoint, or say why that fails: what was trained so far is not given up for it."""
    try:
        save_checkpoint(folder, trainers, step)
    except CheckpointError as error:
        if processes.rank() == 0:
            print(f"\nwarning: {error}", file=sys.stderr)
        return error
    return None


def _latest(trainers: Sequence[Trainer]) -> str:
    """Of each kind of blocks the last loss, time and accuracy."""
    kinds = "/".join(one.blocks for one in trainers)
    losses = "/".join(f"{one.losses[-1]:.3f}" for one in trainers)
    seconds = "/".join(f"{one.step_seconds[-1]:.2f}" for one in trainers)
    text = f"{kinds}: loss {losses}, {seconds} s"
    if all(one.validations for one in trainers):
        text += ", top-1 " + "/".join(f"{one.validations[-1].accuracy:.0%}" for one in trainers)
    return text


def _training_batch(
    photographs: Photographs, settings: Settings, step: int
) -> tuple[Tensor, Tensor]:
    """This process's share of the batch of a step."""
    images, labels = training_batch(
        photographs.training,
        seed=settings.seed,
        step=step,
        batch_size=settings.batch_size,
        resolution=settings.resolution,
        preprocessing=moat_kernels.get_preprocessing(settings.model),
        share=(processes.rank(), processes.count()),
    )
    return images.to(settings.device), labels.to(settings.device)


def _measure(
    trainers: Sequence[Trainer], images: Tensor, labels: Tensor
) -> list[ClassifierMeasurements]:
    """What the report tells, memory with a batch; afterwards the trainers are used up."""
    _say("measuring memory")
    results = []
    for trainer in trainers:
        # Of many processes on one machine none could be told from the others.
        peak = peak_of_step(trainer, images, labels) if processes.count() == 1 else None
        end = [one for one in trainer.validations if one.step == trainer.settings.steps]
        results.append(
            ClassifierMeasurements(
                blocks=trainer.blocks,
                losses=trainer.losses,
                step_seconds=trainer.step_seconds,
                accuracy=end[0].accuracy if end else None,
                held_out=end[0].pictures if end else 0,
                saved_bytes=saved_for_backward(trainer, images, labels),
                peak_bytes=peak,
                validations=trainer.validations,
            )
        )
    return results


if __name__ == "__main__":
    sys.exit(main())
