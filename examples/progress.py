"""A progress bar: one line that moves in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import shutil
import sys
import time

WIDTH = 16  # characters of the bar
LINES = 10  # of a whole run, where standard output is no terminal


class Progress:
    """Shows how far a run of `total` steps is, of which `done` were done before."""

    def __init__(self, done: int, total: int) -> None:
        self.done = done
        self.total = total
        self.start = time.perf_counter()
        self.tenths = done * LINES // total

    def show(self, step: int, text: str) -> None:
        """Report that `step` steps are done; `text` says what is new."""
        per_step = (time.perf_counter() - self.start) / (step - self.done)
        minutes, seconds = divmod(round(per_step * (self.total - step)), 60)
        filled = WIDTH * step // self.total
        bar = "#" * filled + "." * (WIDTH - filled)
        counter = f"{step:>{len(str(self.total))}}/{self.total}"
        line = f"[{bar}] {counter}  {minutes}:{seconds:02d} left  {text}"
        if sys.stdout.isatty():
            line = line[: shutil.get_terminal_size().columns - 1]  # one that wraps would not move
            end = "\n" if step == self.total else ""
            print(f"\r\x1b[2K{line}", end=end, flush=True)  # the code erases the line
        elif step * LINES // self.total > self.tenths:
            self.tenths = step * LINES // self.total
            print(line, flush=True)
