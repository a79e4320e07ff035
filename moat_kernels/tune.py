"""Measure the GPU kernels' launches on this machine's GPU: `python -m moat_kernels.tune`.

    python -m moat_kernels.tune --model moat_0 --batch 64

runs the named model, and for every kernel that it launches tries the launch tables' neighbours
(triton_support/launch_table.py), checks that they compute the same, and writes the fastest to the
user's launch table, which every later process on the same GPU reads. Kernels that lose the most
against the time of their bytes come first, and each is written as soon as it is measured. It takes
some tens of minutes, mostly compiling, or as long as `--seconds` says, and needs the memory of a
training step. Sums are formed in the order that a launch says, so results change in their last
bits.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moat_kernels.models import create_model
from moat_kernels.ops.common.backends import backend_status, use_backend
from moat_kernels.ops.triton_support import user_table
from moat_kernels.ops.triton_support.launch_table import LAUNCH_TABLES, Problem
from moat_kernels.ops.triton_support.launching import Observer, device_name, observing
from moat_kernels.ops.triton_support.tuning import Survey, Tuner, time_on_gpu
from moat_kernels.ops.triton_support.user_table import Entry, LaunchTableError
from moat_kernels.variants import get_preprocessing, list_models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Which passes run depends on what is recomputed: z1 is stored, or it is not.
RECOMPUTE = ("none", "expand")
# Problems are tuned in rounds: those that lose at least the largest loss over this, then the next.
ROUND = 4


def tune(
    models: Sequence[nn.Module],
    x: Tensor,
    measure: Callable[[Callable[[], Any]], float],
    report: Callable[[Entry], None],
    *,
    bandwidth: float = math.inf,
    seconds: float = math.inf,
    autocast: torch.dtype | None = None,
) -> None:
    """Report the fastest launches of models on a batch x, in evaluation and training.

    Those that lose the most come first.

    measure: the time that a function takes on the GPU, in microseconds.
    report: is called with every launch that was measured, at once.
    bandwidth: bytes per second of a copy, for the losses.
    seconds: after which the search ends.
    autocast: the dtype that the models run under; None: their own.
    """
    until = time.monotonic() + seconds
    where: dict[Problem, nn.Module] = {}
    losses: dict[Problem, float] = {}
    for model in models:
        survey = Survey(measure, bandwidth)
        _run(model, x, survey, autocast)
        for problem, lost in survey.losses.items():
            where.setdefault(problem, model)
            losses[problem] = max(lost, losses.get(problem, 0.0))

    def out_of_time() -> bool:
        return time.monotonic() >= until

    tuner = Tuner(LAUNCH_TABLES, measure, report, out_of_time)
    while losses and not out_of_time():
        least = max(losses.values()) / ROUND
        tuner.wanted = frozenset(name for name, lost in losses.items() if lost >= least)
        for model in dict.fromkeys(where[problem] for problem in tuner.wanted):
            _run(model, x, tuner, autocast)
        losses = {name: lost for name, lost in losses.items() if name not in tuner.wanted}


def _run(model: nn.Module, x: Tensor, observer: Observer, autocast: torch.dtype | None) -> None:
    """A training step and evaluation, with their launches handed to the observer."""
    low_precision = (
        contextlib.nullcontext()
        if autocast is None
        else torch.autocast(x.device.type, autocast, cache_enabled=False)
    )
    # Launches are observed in this thread only: so the backward pass must run here too.
    with (
        use_backend("triton"),
        observing(observer),
        torch.autograd.set_multithreading_enabled(False),
    ):
        # Training first: what a kernel is launched for in both is tuned as it is there.
        with low_precision:
            loss = model.train()(x).float().sum()
        loss.backward()
        model.zero_grad()
        with low_precision, torch.no_grad():
            model.eval()(x)


def describe(entry: Entry) -> str:
    """A measurement in one line."""
    problem = entry.problem
    sizes = " x ".join(map(str, problem.sizes))
    dtype = str(problem.dtype).removeprefix("torch.")
    return (
        f"{problem.op} {problem.kernel}, {sizes}, {dtype}: {entry.microseconds:.1f} us "
        f"(static {entry.static_microseconds:.1f} us) {entry.blocks}"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moat_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=list_models(), default="moat_0")
    parser.add_argument("--resolution", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--batch", type=int, default=64, help="images (default: 64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of the search, at most")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with a reason where nothing can be measured or kept."""
    options = _parse(arguments)
    reason = backend_status()["triton"].reason
    if not torch.cuda.is_available():
        reason = "no CUDA device that torch can use"
    if reason:
        sys.exit(f"nothing can be measured here: {reason}. The static launch tables are in use.")
    try:
        user_table.check_writable()
        _tune_here(options)
    except LaunchTableError as error:
        sys.exit(
            f"the launch table {user_table.location()} cannot take what is measured: {error}. "
            f"Move it away, or name another file by {user_table.ENVIRONMENT_VARIABLE}"
        )


def _tune_here(options: argparse.Namespace) -> None:
    """Tune on the current CUDA device and write what is found."""
    device, dtype = torch.device("cuda", torch.cuda.current_device()), DTYPES[options.dtype]
    resolution = options.resolution or get_preprocessing(options.model).resolution
    models = [
        create_model(options.model, recompute=recompute).to(device, dtype)
        for recompute in RECOMPUTE
    ]
    x = torch.randn(options.batch, 3, resolution, resolution, device=device, dtype=dtype)
    written = 0

    def report(entry: Entry) -> None:
        nonlocal written
        print(describe(entry), flush=True)
        # At once: what was measured is kept when the rest is interrupted.
        user_table.write(device_name(device), [entry])
        written += 1

    tune(
        models,
        x.to(memory_format=torch.channels_last),
        time_on_gpu,
        report,
        bandwidth=copy_bandwidth(device),
        seconds=options.seconds,
    )
    print(f"{written} launches for {device_name(device)} written to {user_table.location()}")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy larger than any cache."""
    source = torch.empty(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2e6 * source.numel() / time_on_gpu(lambda: target.copy_(source))


if __name__ == "__main__":
    main()
