"""One section in a process of its own: `python -m benchmarks.gpu.section MODULE --output FOLDER`.

Runs the steps that have not ended yet, one after the other. A step that raises is recorded and the
next one runs; after an error that leaves the GPU's context unusable this process ends, and the
runner starts another for the steps that are left.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench, Skipped, Step
from benchmarks.gpu.journal import Journal, Row
from benchmarks.gpu.tables import write_tables

CONTEXT_LOST = 3  # exit status
_FATAL = ("CUDA error", "an illegal memory access", "device-side assert", "unspecified launch")
KERNELS = "kernels compiled or loaded"


def run(name: str, steps: list[Step], journal: Journal) -> bool:
    """Whether all steps had their turn; False: the GPU's context is lost."""
    done = journal.finished(name)
    for step in steps:
        if step.name in done:
            continue
        print(f"-- {name}: {step.name}", flush=True)
        journal.begin(name, step.name, step.seconds)
        start, rows, reason, lost = time.perf_counter(), [], "", False
        try:
            rows = step.run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            status = "done"
        except Skipped as skipped:
            status, reason = "skipped", str(skipped)
        except Exception as error:
            traceback.print_exc()
            status, reason, lost = "failed", _spell(error), _is_fatal(error)
        journal.end(name, step.name, status, rows, reason, time.perf_counter() - start)
        write_tables(journal)
        if lost:
            return False
    return True


def _spell(error: Exception) -> str:
    """The first lines of its message, and where in this project it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename]
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    message = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {message}{place}"


def _is_fatal(error: Exception) -> bool:
    text = f"{type(error).__name__} {error}"
    return "AcceleratorError" in text or any(sign in text for sign in _FATAL)


@contextlib.contextmanager
def counted_kernels(name: str, journal: Journal) -> Iterator[None]:
    """Record how many Triton kernels of a section came from the cache on disk."""
    from moat_kernels.ops.triton_support.launching import triton_missing

    if triton_missing():
        yield
        return
    from triton import knobs

    found: list[tuple[str, bool, float]] = []

    def listen(*, src, metadata, metadata_group, times, cache_hit) -> None:  # type: ignore[no-untyped-def]
        if not src.name.startswith("triton_"):  # those are torch.compile's own
            found.append((src.name, cache_hit, times.total / 1e6))

    knobs.compilation.listener = listen
    try:
        yield
    finally:
        missed = [(kernel, seconds) for kernel, hit, seconds in found if not hit]
        for kernel, seconds in missed:
            print(f"   compiled {kernel} in {seconds:.2f} s")
        row: Row = {
            "kernels": len(found),
            "from the cache": len(found) - len(missed),
            "compiled": len(missed),
            "seconds compiling": round(sum(seconds for _, seconds in missed), 2),
        }
        if found:
            journal.end(name, KERNELS, "done", [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", help="has a function `steps(bench)`")
    parser.add_argument("--name", required=True, help="of the section in the records")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    faulthandler.enable()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    journal = Journal(options.output)
    bench = Bench(journal, options.rehearse)
    with contextlib.ExitStack() as stack:
        if options.rehearse:
            torch.set_num_threads(1)
            stack.enter_context(interpreted())
        steps = importlib.import_module(options.module).steps(bench)
        with counted_kernels(options.name, journal):
            complete = run(options.name, steps, journal)
    write_tables(journal)
    sys.exit(0 if complete else CONTEXT_LOST)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Triton's interpreter with the corrections that the tests give it."""
    import pytest
    from support import triton_interpreter

    with pytest.MonkeyPatch.context() as patch:
        triton_interpreter.install(patch)
        yield


if __name__ == "__main__":
    main()
