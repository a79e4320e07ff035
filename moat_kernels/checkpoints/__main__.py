"""python -m moat_kernels.checkpoints SOURCE [DESTINATION.safetensors] [--ema] [--list]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import CheckpointError
from .loading import load_tensorflow
from .safetensors import save_safetensors
from .tensorflow_bundle import TensorBundle


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert or list a checkpoint; returns the exit code (0 done, 1 the file is bad, 2 usage)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list == (options.destination is not None):
        parser.error("give either DESTINATION or --list")
    if options.list and options.ema:
        parser.error("--ema is for conversion; --list shows all tensors")
    if options.destination is not None and options.destination.suffix != ".safetensors":
        parser.error(f"DESTINATION must end in .safetensors, not {options.destination.name!r}")
    try:
        if options.list:
            _list(options.source)
        else:
            _convert(options.source, options.destination, options.ema)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moat_kernels.checkpoints",
        description="Convert an official TensorFlow V2 checkpoint of MOAT to .safetensors.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="prefix of the checkpoint (.../model.ckpt-1234), its .index file, or its folder",
    )
    parser.add_argument(
        "destination",
        metavar="DESTINATION",
        type=Path,
        nargs="?",
        help="the .safetensors file to write",
    )
    parser.add_argument(
        "--ema", action="store_true", help="take the moving averages where the file has them"
    )
    parser.add_argument(
        "--list", action="store_true", help="print names, shapes and dtypes; convert nothing"
    )
    return parser


def _convert(source: Path, destination: Path, ema: bool) -> None:
    converted = load_tensorflow(source, ema=ema)
    metadata = {
        "format": "pt",
        "source": Path(converted.report.origin).name,
        "weights": "ema" if ema else "raw",
    }
    save_safetensors(converted.state_dict, destination, metadata)
    print(converted.report)
    print(f"wrote {destination}")


def _list(source: Path) -> None:
    bundle = TensorBundle(source)
    for name, entry in bundle.entries.items():
        print(f"{name}  {list(entry.shape)}  {entry.dtype}")
    for name, reason in bundle.skipped.items():
        print(f"{name}  skipped: {reason}")


if __name__ == "__main__":
    sys.exit(main())
