"""The native kernels as compiled for each instruction set: all tests marked `each_isa`."""

from __future__ import annotations

import pytest
from support.instruction_sets import INSTRUCTION_SETS, run_marked_tests
from support.native import needs_extension


@needs_extension
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_marked_tests_pass(isa: str) -> None:
    run_marked_tests(isa)
