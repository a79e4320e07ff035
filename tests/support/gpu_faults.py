"""A section of `make gpu` in which every kind of thing goes wrong."""

from __future__ import annotations

import os
import signal
import time

from benchmarks.gpu.bench import Bench, Skipped, Step
from benchmarks.gpu.journal import Row


def steps(bench: Bench) -> list[Step]:
    return [
        Step("good", lambda: [{"found": 1}]),
        Step("raises", _raises),
        Step("does not apply", _does_not_apply),
        Step("loses the context", _loses_the_context),
        Step("crashes", _crashes),
        Step("exits", lambda: os._exit(7)),
        Step("hangs", lambda: time.sleep(600), seconds=0.3),
        Step("last", lambda: [{"found": 2}]),
    ]


def _raises() -> list[Row]:
    raise ValueError("a bad number")


def _does_not_apply() -> list[Row]:
    raise Skipped("there is no such thing here")


def _loses_the_context() -> list[Row]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _crashes() -> list[Row]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return []
