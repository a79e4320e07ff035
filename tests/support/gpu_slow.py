"""A section of `make gpu` that is cut off in its second step, the first time."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.gpu.bench import Bench, Step
from benchmarks.gpu.journal import Row


def steps(bench: Bench) -> list[Step]:
    mark = Path(os.environ["SLOW_ONCE"])

    def slow() -> list[Row]:
        if not mark.exists():
            mark.touch()
            time.sleep(600)
        return [{"found": "the second time"}]

    return [Step("first", lambda: [{"found": "at once"}]), Step("second", slow)]
