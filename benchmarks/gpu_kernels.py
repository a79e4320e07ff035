"""Write docs/gpu_kernels.csv and .md: `python benchmarks/gpu_kernels.py`; it needs no GPU.

A quarter of an hour of compiling on two cores the first time; Triton keeps what it has compiled
on disk.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import triton
from support.gpu_kernels import SUMMARY, compile_all, summarise, write_table

if __name__ == "__main__":
    table, wrong = compile_all(report=lambda line: print(line, flush=True))
    write_table(table)
    SUMMARY.write_text(summarise(table, triton.__version__))
    sys.exit(len(wrong) > 0)
