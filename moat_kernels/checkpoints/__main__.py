"""python -m moat_kernels.checkpoints convert SOURCE DESTINATION.safetensors; or list SOURCE"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moat_kernels.preprocessing import CHANNEL_ORDERS

from .converting import SourceOptions, describe, read_source, write_converted
from .errors import CheckpointError
from .keras import WindowSize

_PROGRAM = "python -m moat_kernels.checkpoints"
_SOURCE = (
    "a TensorFlow checkpoint: its prefix (.../model.ckpt-1234), its .index file, its folder, or a "
    "SavedModel; or a file of torch.save or .safetensors, whatever it is called"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert or list a checkpoint; returns the exit code (0 done, 1 the file is bad, 2 usage)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            print("\n".join(describe(options.source, options.key)))
            return 0
        if options.destination.suffix != ".safetensors":
            parser.error(f"DESTINATION must end in .safetensors, not {options.destination.name!r}")
        converted = read_source(
            options.source,
            SourceOptions(
                key=options.key,
                ema=options.ema,
                resolution=options.resolution,
                window_size=options.window_size,
                channel_order=options.channel_order,
            ),
        )
        write_converted(converted, options.source, options.destination)
        print(converted.report)
        print(f"wrote {options.destination}")
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Checkpoints of MOAT.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="convert | list")
    convert = commands.add_parser(
        "convert",
        help="write a .safetensors file",
        description="Convert a checkpoint of MOAT to .safetensors, its configuration included.",
    )
    _add_source(convert)
    convert.add_argument(
        "destination", metavar="DESTINATION", type=Path, help="the .safetensors file to write"
    )
    convert.add_argument(
        "--ema", action="store_true", help="take the moving averages where the file has them"
    )
    keras = convert.add_argument_group("Keras models, whose weights do not tell")
    keras.add_argument(
        "--resolution",
        metavar="N",
        type=int,
        help="side of the images it was trained on, in pixels (as the SavedModel says, or 448)",
    )
    keras.add_argument(
        "--window-size",
        metavar="N|none",
        type=_window_size,
        default="auto",
        help="side of stage 3's windows, in tokens (a thirty-second of the resolution)",
    )
    keras.add_argument(
        "--channel-order", choices=CHANNEL_ORDERS, help="the order of colours in its images (bgr)"
    )
    listing = commands.add_parser(
        "list",
        help="print names, shapes and dtypes",
        description="Print names, shapes and dtypes of all tensors; of TensorFlow 2's object "
        "checkpoints the names of variables too.",
    )
    _add_source(listing)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help=_SOURCE)
    parser.add_argument(
        "--key", help="where in a file of torch.save the state_dict is, if several would do"
    )


def _window_size(text: str) -> WindowSize:
    if text in ("none", "auto"):
        return None if text == "none" else "auto"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or none, not {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
