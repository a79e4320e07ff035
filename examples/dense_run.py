"""What the runs of segment.py and detect.py share: options, the folder of results, the loop."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from classifier_options import positive, seed
from files import new_numbered_folder
from pretrained import backbone_from
from progress import Progress
from torch import nn
from training import Trainer, TrainingError
from weights import Weights, put_aside

import moat_kernels

RUNS = Path("runs")
INTERRUPTED = 130  # the exit code that shells use after Ctrl-C
BEST, LAST = "{}_best.safetensors", "{}_last.safetensors"  # in --output, of a kind of blocks


class Add(Protocol):
    """`add_argument` of a parser."""

    def __call__(self, *names: str, **options: Any) -> object: ...


def new_parser(documentation: str) -> argparse.ArgumentParser:
    """A parser that explains a program by its docstring, with the options of model and weights."""
    summary, _, explanation = documentation.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=explanation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--blocks", choices=("stock", "fused", "both"), default="fused")
    parser.add_argument(
        "--model",
        choices=moat_kernels.list_models(),
        default="tiny_moat_0",
        metavar="NAME",
        help="moat_0 .. moat_4, tiny_moat_0 .. tiny_moat_3 (default: tiny_moat_0)",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a classifier's weights for the backbone to start from: an official TensorFlow "
        "checkpoint, .safetensors or .pt",
    )
    return parser


def add_run_options(add: Add) -> None:
    """Learning rate, seed, device and folder."""
    add("--lr", type=positive(float), default=2e-3, metavar="RATE", help="default: 0.002")
    add("--seed", type=seed, default=0, metavar="N", help="default: 0")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"where weights, picture and numbers go (default: a new folder in {RUNS}/)",
    )


def device_of(options: argparse.Namespace) -> str:
    """ "cuda" or "cpu"; TrainingError if there is none of what was asked for."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch finds no CUDA device here")
    return "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"


def kinds(blocks: str) -> tuple[str, ...]:
    """The kinds of blocks that are trained."""
    return ("stock", "fused") if blocks == "both" else (blocks,)


def start_alike(
    trainers: Sequence[Trainer], backbone: nn.Module, checkpoint: str | None, model: str
) -> None:
    """Give all the very same weights.

    backbone: that of the first, which starts from `checkpoint` if there is one.
    """
    if checkpoint:
        print(backbone_from(backbone, Path(checkpoint), model))
    for trainer in trainers[1:]:
        trainer.model.load_state_dict(trainers[0].model.state_dict())


def make_output(options: argparse.Namespace) -> Path:
    """Before training, not after it, is the time to find that nothing can be written."""
    wanted = options.output or RUNS
    try:
        folder = options.output or new_numbered_folder(RUNS)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for name in (BEST, LAST):
            for blocks in kinds(options.blocks):
                put_aside(folder / name.format(blocks))
        return folder
    except OSError as error:
        raise TrainingError(f"--output: cannot write to {wanted}: {error}") from error


def train(
    trainers: Sequence[Any],
    batch_of_step: Callable[[int], Sequence[Any]],
    test_and_save: Callable[[Any], None],
    tests: int,
    quality: Callable[[Sequence[Any]], str],
) -> None:
    """All steps of all trainers, in turns.

    tests: how often in the run `test_and_save` is called of each. quality: of the last tests, in
    words, empty before the first.
    """
    steps = trainers[0].settings.steps
    progress = Progress(0, steps)
    for step in range(steps):
        batch = batch_of_step(step)
        # Who goes first alternates too.
        for trainer in trainers if step % 2 == 0 else reversed(trainers):
            trainer.step(step, *batch)
        done = step + 1
        if done * tests // steps > step * tests // steps:
            for trainer in trainers:
                test_and_save(trainer)
        progress.show(done, _latest(trainers) + quality(trainers))


def save(trainer: Any, weights: Weights, is_best: bool, metadata: Mapping[str, str]) -> None:
    """The weights of a trainer, with the model, the classes and the step beside `metadata`."""
    settings = trainer.settings
    about = {
        "model": settings.model,
        "classes": json.dumps(settings.classes),
        "step": str(len(trainer.losses)),
        **metadata,
    }
    if is_best:
        weights.save(trainer.model, BEST.format(trainer.blocks), about)
    weights.save(trainer.model, LAST.format(trainer.blocks), about)


def report_weights(weights: Weights, output: Path) -> None:
    """Say where they are; TrainingError if some could not be written."""
    if failure := weights.failure():
        raise TrainingError(failure)
    print(f"weights  {', '.join(sorted(str(path) for path in output.glob('*.safetensors')))}")


def _latest(trainers: Sequence[Any]) -> str:
    """Of each kind of blocks the last loss and time."""
    blocks, losses, seconds = (
        "/".join(values)
        for values in (
            [one.blocks for one in trainers],
            [f"{one.losses[-1]:.3f}" for one in trainers],
            [f"{one.step_seconds[-1]:.2f}" for one in trainers],
        )
    )
    return f"{blocks}: loss {losses}, {seconds} s"
