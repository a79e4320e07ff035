"""Train a MOAT classifier on photographs, with stock blocks, fused blocks, or both side by side.

    python examples/train_classifier.py --blocks both
    python examples/train_classifier.py --blocks fused --model moat_0 --data FOLDER --steps 5000
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 4 --max-restarts 3 \\
        examples/train_classifier.py --checkpoint FOLDER

With "both", two models start from the same weights and see the same batches; their steps
alternate, so that whatever else the machine does slows both alike. Results go to --output.
Under torchrun each process takes its share of every batch. With --max-restarts all start again if
one dies, and continue from the last checkpoint in --checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import processes
import torch
from chart import draw_chart
from checkpoint_folder import checkpoints, refuse_strangers
from checkpointing import CheckpointError, load_checkpoint, save_checkpoint
from memory import peak_of_step, saved_for_backward
from photographs import (
    DataError,
    Photographs,
    bundled_photographs,
    folder_photographs,
    held_out_batch,
    training_batch,
    unusable,
)
from progress import Progress
from report import Measurements, format_table, write_json
from torch import Tensor
from training import Settings, Trainer, TrainingError

import moat_kernels

INTERRUPTED = 130  # the exit code that shells use after Ctrl-C
NAMED = 20  # photographs that cannot be used, at most; the others are counted


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure and report; returns the exit code (2: what it prints as an error)."""
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
        "--data",
        type=Path,
        metavar="FOLDER",
        help="a folder with one subfolder of images per class (default: twelve photographs that "
        "come with scikit-image, each a class)",
    )
    add("--steps", type=_positive(int), default=60, metavar="N", help="default: 60")
    add(
        "--batch-size",
        type=_positive(int),
        default=8,
        metavar="N",
        help="of all processes together (default: 8)",
    )
    add(
        "--resolution",
        type=_positive(int),
        metavar="PIXELS",
        help="side of the square crops (default: the model's own)",
    )
    add("--lr", type=_positive(float), default=1e-3, metavar="RATE", help="default: 0.001")
    add("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    add("--amp", action="store_true", help="autocast to bfloat16")
    add(
        "--recompute",
        choices=("auto", "none", "expand", "block"),
        default="auto",
        help="what the fused blocks compute again in the backward pass instead of keeping it",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="write the whole state of the run there, now and then and at the end",
    )
    add(
        "--checkpoint-every",
        type=_positive(int),
        default=50,
        metavar="N",
        help="steps between checkpoints (default: 50)",
    )
    add("--resume", type=Path, metavar="FOLDER", help="continue from the last checkpoint there")
    add(
        "--output",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="where the chart and the numbers go (default: runs)",
    )
    return parser


def _positive(kind: type[int] | type[float]):
    def parse(text: str) -> int | float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be within 0 .. 2147483647, got {text}")
    return value


def _run(options: argparse.Namespace) -> int:
    photographs = folder_photographs(options.data) if options.data else bundled_photographs()
    settings = _settings(options, photographs)
    _make_folders(options)
    with processes.joined_processes(settings.device):
        return _train_and_report(options, photographs, settings)


def _train_and_report(
    options: argparse.Namespace, photographs: Photographs, settings: Settings
) -> int:
    if settings.batch_size % processes.count():
        raise TrainingError(
            f"--batch-size {settings.batch_size} must be a multiple of the "
            f"{processes.count()} processes"
        )
    try:
        trainers = _trainers(options.blocks, settings)
        done = _resume(trainers, options)
        _check_photographs(photographs)
        _say(
            f"{settings.model} on {len(photographs.training)} photographs of "
            f"{len(photographs.classes)} classes, {settings.steps} steps of {settings.batch_size} "
            f"crops of {settings.resolution} x {settings.resolution} pixels, {settings.device}"
        )
        measured_on = _training_batch(photographs, settings, 0)
        unsaved = _train(trainers, photographs, done, options)
        results = _measure(trainers, photographs, *measured_on)
    except KeyboardInterrupt:
        _say("\nstopped; --resume continues from the last checkpoint, if --checkpoint wrote one")
        return INTERRUPTED
    try:
        # The others wait: torchrun ends all when one of them ends with an error.
        processes.first_alone(lambda: _report(results, settings, options.output))
    except OSError as error:
        raise TrainingError(f"--output: cannot write to {options.output}: {error}") from error
    if unsaved:
        raise unsaved
    return 0


def _check_photographs(photographs: Photographs) -> None:
    """All can be read, or DataError: hours later it would be too late to find out."""
    examples = [*photographs.training, *photographs.held_out]
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


def _report(results: Sequence[Measurements], settings: Settings, folder: Path) -> None:
    print(format_table(results, settings), flush=True)
    write_json(folder / "results.json", results, settings)
    print(f"\nnumbers  {folder / 'results.json'}")
    if draw_chart(folder / "chart.png", results, settings):
        print(f"chart    {folder / 'chart.png'}")
    else:
        print("chart    not drawn: matplotlib is not installed")


def _say(text: str) -> None:
    """Print once, however many processes there are."""
    if processes.rank() == 0:
        print(text, flush=True)


def _resumed_from(options: argparse.Namespace) -> Path | None:
    """Where to continue: at --resume, or, if torchrun restarts us, at our own last checkpoint."""
    earlier = checkpoints(options.checkpoint) if options.checkpoint else []
    if processes.may_restart() and earlier:
        return options.checkpoint
    if earlier and options.resume is None:
        raise TrainingError(
            f"--checkpoint {options.checkpoint} holds checkpoints of another run; continue it with "
            "--resume, or choose another folder"
        )
    return options.resume


def _resume(trainers: Sequence[Trainer], options: argparse.Namespace) -> int:
    """Go to where the run shall continue; returns the number of steps done."""
    source = _resumed_from(options)
    done = load_checkpoint(source, trainers) if source else 0
    if options.checkpoint:
        refuse_strangers(options.checkpoint, lambda step: step > done and _is_due(step, options))
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
    )


def _make_folders(options: argparse.Namespace) -> None:
    """Before training, not after it, is the time to find that nothing can be written."""
    wanted = {"--output": options.output}
    if options.checkpoint:
        wanted["--checkpoint"] = options.checkpoint
    for argument, folder in wanted.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{argument}: cannot make the folder {folder}: {error}") from error
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise TrainingError(f"{argument}: cannot write to {folder}: {error}") from error


def _trainers(blocks: str, settings: Settings) -> list[Trainer]:
    """The models to train, all with the very same weights."""
    kinds = ("stock", "fused") if blocks == "both" else (blocks,)
    trainers = [Trainer(kind, settings) for kind in kinds]
    for trainer in trainers[1:]:
        trainer.model.load_state_dict(trainers[0].model.state_dict())
    return trainers


def _train(
    trainers: Sequence[Trainer], photographs: Photographs, done: int, options: argparse.Namespace
) -> CheckpointError | None:
    """Train to the end; returns why the last checkpoint could not be written, if it could not."""
    unsaved = None
    settings = trainers[0].settings
    progress = Progress(done, settings.steps)
    for step in range(done, settings.steps):
        batch = _training_batch(photographs, settings, step)
        # Who goes first alternates too.
        for trainer in trainers if step % 2 == 0 else reversed(trainers):
            trainer.step(step, *batch)
        if processes.rank() == 0:
            progress.show(step + 1, _latest(trainers))
        if options.checkpoint and _is_due(step + 1, options):
            unsaved = _try_to_save(options.checkpoint, trainers, step + 1)
    return unsaved


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
    return "loss of " + ", ".join(
        f"{one.blocks} {one.losses[-1]:.3f} in {one.step_seconds[-1]:.2f} s" for one in trainers
    )


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
    trainers: Sequence[Trainer], photographs: Photographs, images: Tensor, labels: Tensor
) -> list[Measurements]:
    """Accuracy, and memory with a batch; afterwards the trainers are used up."""
    _say("testing on what was held out, and measuring memory")
    results = []
    for trainer in trainers:
        right, tested = _test(trainer, photographs)
        # Of many processes on one machine none could be told from the others.
        peak = peak_of_step(trainer, images, labels) if processes.count() == 1 else None
        results.append(
            Measurements(
                blocks=trainer.blocks,
                losses=trainer.losses,
                step_seconds=trainer.step_seconds,
                accuracy=right / tested if tested else None,
                held_out=tested,
                saved_bytes=saved_for_backward(trainer, images, labels),
                peak_bytes=peak,
            )
        )
    return results


def _test(trainer: Trainer, photographs: Photographs) -> tuple[int, int]:
    """How many held-out pictures are classified right, of how many."""
    settings, right, tested = trainer.settings, 0, 0
    preprocessing = moat_kernels.get_preprocessing(settings.model)
    for start in range(0, len(photographs.held_out), settings.batch_size):
        examples = photographs.held_out[start : start + settings.batch_size]
        images, labels = held_out_batch(examples, settings.resolution, preprocessing)
        if len(images):
            right += int((trainer.predict(images) == labels).sum())
            tested += len(images)
    return right, tested


if __name__ == "__main__":
    sys.exit(main())
