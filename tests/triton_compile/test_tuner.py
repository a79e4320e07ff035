"""The tuner leaves out launches that spill, seen on kernels compiled without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.compile_only_driver import (
    Launch,
    compile_launches,
    nvidia_usage,
    record_launches,
)

from moat_kernels.ops.mbconv.triton.kernels.expand import expand
from moat_kernels.ops.mbconv.triton.launch_table import GemmBlocks
from moat_kernels.ops.triton_support.launch_table import LAUNCH_TABLES, LaunchTable
from moat_kernels.ops.triton_support.launching import observing
from moat_kernels.ops.triton_support.tuning import Tuner

ARCHITECTURE = 90
# A thread of the first would hold 512 sums, and has at most 255 registers.
SPILLING, LEAN = GemmBlocks(256, 256, 32, 4, 3), GemmBlocks(64, 64, 32, 4, 3)


def test_a_launch_that_spills_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LaunchTable, "neighbours", lambda *_: iter((LEAN, SPILLING)))
    rows = torch.empty(4096, 96, dtype=torch.bfloat16, device="meta")
    weight, bias = rows.new_empty(384, 96), rows.new_empty(384, dtype=torch.float32)
    # The later, the faster: whatever may be chosen is.
    times = iter((3.0, 2.0, 1.0))
    with record_launches(ARCHITECTURE) as launches:

        class CompileOnlyTuner(Tuner):
            def spills(self, launched: Launch) -> bool:
                (compiled,) = compile_launches([launched], ARCHITECTURE)
                return nvidia_usage(compiled, ARCHITECTURE).stack > 0

            def agrees(self, *_: object) -> bool:
                return True  # nothing is computed

        entries = []
        tuner = CompileOnlyTuner(LAUNCH_TABLES, lambda _: next(times), entries.append)
        with observing(tuner):
            expand(rows, weight, bias, "gelu", measure=False)
    assert {launch.constants["BLOCK_ROWS"] for launch in launches} == {64, 128, 256}
    (entry,) = entries
    assert (entry.blocks, entry.microseconds, entry.static_microseconds) == (LEAN, 2.0, 3.0)
