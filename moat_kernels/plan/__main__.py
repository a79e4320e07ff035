"""Memory and time of a training step on a GPU, predicted without one.

Prints, for stock and for fused blocks, the largest batch that fits (or the batch given), the memory
it takes, how many kernels its step launches, a lower bound of its time, and forecasts: in a CUDA
graph and eager. Exit status: 0; 1 if no row fits the GPU or the step cannot be traced; 2 for an
argument it does not know.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

from moat_kernels.plan.batch import largest_batch
from moat_kernels.plan.gpus import GPUS
from moat_kernels.plan.report import (
    NOTES,
    Prediction,
    capacity,
    format_kernels,
    format_predictions,
)
from moat_kernels.plan.step import BLOCKS, OPTIMIZERS, PRECISIONS, TrainingStep
from moat_kernels.variants import get_preprocessing, list_models


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


# argparse names the type in its message: "invalid number of pixels value: '0'".
_positive.__name__ = "positive number"


def _batch(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


_batch.__name__ = "batch size"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moat_kernels.plan", description=__doc__)
    parser.add_argument("--model", required=True, choices=list_models())
    parser.add_argument("--gpu", required=True, choices=GPUS)
    parser.add_argument(
        "--resolution", type=_positive, help="pixels along each side; the model's own otherwise"
    )
    parser.add_argument(
        "--batch", type=_batch, help="images, or auto: the largest batch that fits (default)"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="bfloat16",
        help="of autocast; float32 means without it (default: %(default)s)",
    )
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw", help="(default: %(default)s)"
    )
    parser.add_argument("--kernels", action="store_true", help="print every kernel's share")
    return parser


def _predict(options: argparse.Namespace, resolution: int, blocks: str) -> Prediction:
    gpu = GPUS[options.gpu]
    traced = TrainingStep(
        *(options.model, resolution, blocks),
        precision=options.precision,
        optimizer=options.optimizer,
        architecture=gpu.architecture,
    )
    trace = functools.cache(traced.trace)
    batch = options.batch
    if batch is None:
        batch = largest_batch(lambda size: trace(size).peak, capacity(gpu))
    step = trace(batch) if batch else None
    return Prediction(blocks, batch, step, gpu, options.precision)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    gpu = GPUS[options.gpu]
    resolution = options.resolution or get_preprocessing(options.model).resolution
    try:
        predictions = [_predict(options, resolution, blocks) for blocks in BLOCKS]
    except ValueError as error:
        parser.error(str(error))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    autocast = "float32" if options.precision == "float32" else f"autocast {options.precision}"
    print(
        f"Predicted, not measured: a training step of {options.model} at {resolution} px on "
        f"{gpu.name}\n({gpu.bandwidth / 1e12:g} TB/s, "
        f"{gpu.peaks['bfloat16'] / 1e12:g} TFLOP/s bfloat16), {autocast}, {options.optimizer}\n"
    )
    print(format_predictions(predictions))
    if options.kernels:
        for prediction in predictions:
            print(f"\n{format_kernels(prediction)}")
    print(f"\n{NOTES}")
    return 0 if any(prediction.fits for prediction in predictions) else 1


if __name__ == "__main__":
    sys.exit(main())
