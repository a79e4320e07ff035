"""Write docs/gpu_kernels.md: `python benchmarks/gpu_kernels.py`, minutes of compiling, no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.gpu_kernels import DOCUMENT, format_tables

if __name__ == "__main__":
    DOCUMENT.write_text(format_tables())
