"""The table of what kernels issue follows from counts, and comes near to them."""

from __future__ import annotations

import pytest
import torch
from support import issue_fit, issue_table
from support.roofline import predicted_instructions

from moat_kernels.ops.triton_support.traffic import Crossing, Pass
from moat_kernels.plan import GPUS, issue_seconds
from moat_kernels.plan.issue import INSTRUCTIONS
from moat_kernels.plan.operators import OperatorPass

TOTALS = issue_fit.read_file()


def test_the_table_is_what_the_counts_give() -> None:
    found = issue_fit.fit(TOTALS)
    rounded = {
        kernel: (float(f"{for_byte:.3g}"), float(f"{for_flop:.3g}"))
        for kernel, (for_byte, for_flop) in found.items()
    }
    assert rounded == INSTRUCTIONS


def test_the_step_that_the_page_has_is_among_them() -> None:
    rows = issue_fit.totals(issue_table.STEP, issue_table.read_file())
    assert rows == [row for row in TOTALS if row.step == issue_table.STEP]


@pytest.mark.parametrize("step", issue_fit.STEPS, ids=lambda step: step[0])
@pytest.mark.parametrize("others", ["depthwise_", "cuda_depthwise_"])
def test_a_step_by_the_table_issues_what_was_counted(
    step: tuple[str, int, int], others: str
) -> None:
    """Single kernels err more: tiles do not fill every shape as well."""
    rows = [row for row in TOTALS if row.step == step and not row.kernel.startswith(others)]
    counted = sum(row.instructions for row in rows)
    assert sum(map(predicted_instructions, rows)) == pytest.approx(counted, rel=0.05)


def test_bytes_and_products_take_instructions() -> None:
    """926.64 a ns on an H100."""
    for_byte, for_flop = INSTRUCTIONS["project_kernel"]
    kilobytes = (Crossing(torch.Size([10**6]), 10**6),)
    ours = Pass("project_kernel", kilobytes, kilobytes, 10**9, "bfloat16")
    theirs = OperatorPass("mm", kilobytes, (), 10**9, "bfloat16")
    expected = (for_byte * 2e6 + for_flop * 1e9) / 926.64e9
    assert issue_seconds([ours, theirs], GPUS["h100"]) == pytest.approx(expected)


def test_two_equations_of_two_unknowns_are_solved() -> None:
    made = ((3, 5), (40, 7), (20, 90))
    rows = [
        issue_fit.Total("", 0, 0, "a", 1, moved, done, 2 * moved + 3 * done) for moved, done in made
    ]
    assert issue_fit.fit(rows)["a"] == pytest.approx((2, 3))


def test_nothing_takes_less_than_no_instructions() -> None:
    """The best fit would have -1 for each FLOP."""
    rows = [
        issue_fit.Total("", 0, 0, "a", 1, moved, done, 4 * moved - done)
        for moved, done in ((10, 1), (10, 9), (30, 5))
    ]
    for_byte, for_flop = issue_fit.fit(rows)["a"]
    assert for_byte > 0 and for_flop == 0
