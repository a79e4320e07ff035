"""The command line of train_classifier.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import moat_kernels

RUNS = Path("runs")


def parse_options(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked as far as each other tells; ends the program where they are wrong."""
    summary, _, explanation = description.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=explanation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(parser.add_argument)
    _add_training(parser.add_argument)
    _add_files(parser.add_argument)
    options = parser.parse_args(arguments)
    if options.evaluate and not options.checkpoint:
        parser.error("--evaluate needs the weights to evaluate: --checkpoint FILE")
    if options.evaluate and (options.resume or options.output):
        parser.error("--evaluate trains and writes nothing: leave --resume and --output out")
    if options.resume and options.checkpoint:
        parser.error("--resume goes on with the weights of its run: leave --checkpoint out")
    return options


def _add_model(add: Callable[..., object]) -> None:
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
        help="weights to start from: an official TensorFlow checkpoint, .safetensors or .pt; a "
        "classifier of other classes is left out",
    )
    add(
        "--evaluate",
        action="store_true",
        help="only test the weights of --checkpoint on what is held out",
    )


def _add_training(add: Callable[..., object]) -> None:
    add(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="a folder with one subfolder of images per class, of each of which a fifth is held "
        "out, or with train/ and val/, each such a folder (default: twelve photographs that come "
        "with scikit-image, each a class)",
    )
    add("--steps", type=positive(int), default=60, metavar="N", help="default: 60")
    add(
        "--batch-size",
        type=positive(int),
        default=8,
        metavar="N",
        help="of all processes together (default: 8)",
    )
    add(
        "--resolution",
        type=positive(int),
        metavar="PIXELS",
        help="side of the square crops (default: the model's own)",
    )
    add("--lr", type=positive(float), default=1e-3, metavar="RATE", help="default: 0.001")
    add("--seed", type=seed, default=0, metavar="N", help="default: 0")
    add("--amp", action="store_true", help="autocast to bfloat16")
    add(
        "--recompute",
        choices=("auto", "none", "expand", "block"),
        default="auto",
        help="what the fused blocks compute again in the backward pass instead of keeping it",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _add_files(add: Callable[..., object]) -> None:
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where all of the run goes: best and last weights, chart and numbers and, for "
        f"--resume, its whole state (default: a new folder in {RUNS}/, without the state)",
    )
    add(
        "--validate-every",
        type=positive(int),
        metavar="N",
        help="steps between tests on what is held out (default: a tenth of the steps)",
    )
    add(
        "--checkpoint-every",
        type=positive(int),
        default=50,
        metavar="N",
        help="steps between saves of the whole state (default: 50)",
    )
    add(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="continue from the last state saved there, an earlier --output",
    )


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """A parser of numbers above 0."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def seed(text: str) -> int:
    """A parser of seeds that every generator takes."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be within 0 .. 2147483647, got {text}")
    return value
