"""Write docs/issue_time.csv and docs/issue_steps.csv: `python benchmarks/issue.py`, without a GPU.

Takes ten minutes of compiling. Needs nvcc for the stencils of CUDA C++, and g++. Prints the table
of moat_kernels/plan/issue.py as the counts would have it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import issue_fit, issue_table
from support.issue import countable, recorded

if __name__ == "__main__":
    totals = []
    for step in issue_fit.STEPS:
        rows = countable(recorded(*step), report=lambda line: print(line, flush=True))
        totals += issue_fit.totals(step, rows)
        if step == issue_table.STEP:
            issue_table.write_file(rows)
    issue_fit.write_file(totals)
    for kernel, (for_byte, for_flop) in issue_fit.fit(totals).items():
        print(f'    "{kernel}": ({for_byte:.3g}, {for_flop:.3g}),')
