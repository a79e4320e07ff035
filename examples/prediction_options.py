"""The command line of predict.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from classifier_options import RUNS, positive

import moat_kernels

FAILED = 1  # the exit code of an error; 2 says that images were left out


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(FAILED, f"error: {message}\n")


def parse_options(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked as far as each other tells; ends the program where they are wrong."""
    summary, _, explanation = description.partition("\n")
    parser = _Parser(
        description=summary,
        epilog=explanation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(parser)
    _add_results(parser)
    _add_speed(parser)
    options = parser.parse_args(arguments)
    if options.checkpoint is None and options.model is None:
        parser.error("--checkpoint FILE_OR_FOLDER is needed, or --model NAME to try it out")
    return options


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="the trained weights: whatever create_model(checkpoint=...) takes",
    )
    add(
        "--model",
        choices=moat_kernels.list_models(),
        metavar="NAME",
        help="moat_0 .. moat_4, tiny_moat_0 .. tiny_moat_3: of which model a checkpoint is that "
        "does not tell it; without a checkpoint random weights, to try things out",
    )
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the classes: one a line, a .csv file with a column 'name' or a .json list "
        "(default: those in the checkpoint, else their numbers)",
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="FOLDER", help="searched with all below it")
    number = parser.add_mutually_exclusive_group()
    number.add_argument(
        "--top",
        type=positive(int),
        default=5,
        metavar="K",
        help="the K best classes of each image, by softmax (default: 5)",
    )
    number.add_argument(
        "--threshold",
        type=_share,
        metavar="T",
        help="instead, all tags whose score, by sigmoid, is above T",
    )
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where the results go; a run that was interrupted goes on from there (default: a new "
        f"folder in {RUNS}/)",
    )
    add(
        "--resolution",
        type=positive(int),
        metavar="PIXELS",
        help="side of the square that the model sees (default: the checkpoint's)",
    )


def _add_speed(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch", type=positive(int), default=8, metavar="N", help="default: 8")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what the model computes in (default: float32)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--workers",
        type=positive(int),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="threads that decode images (default: one per core)",
    )
    add("--no-freeze", action="store_true", help="on a CPU: run the model itself, not a frozen one")


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be within 0 .. 1 and below 1, got {text}")
    return value


_share.__name__ = "float"
