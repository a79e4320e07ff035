"""Write docs/issue_time.csv: `python benchmarks/issue.py`, some minutes of compiling, no GPU.

Needs nvcc for the stencils of CUDA C++, and g++.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.issue import count_launches, recorded
from support.issue_table import write_file

if __name__ == "__main__":
    write_file(count_launches(recorded(), report=lambda line: print(line, flush=True)))
