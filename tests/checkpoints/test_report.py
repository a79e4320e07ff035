"""The printed account of a conversion."""

from __future__ import annotations

from moat_kernels.checkpoints import CheckpointReport


def test_a_report_counts_and_gives_reasons() -> None:
    report = CheckpointReport(
        "model.ckpt-7",
        loaded={"qkv": ("q", "k", "v"), "norm.weight": ("gamma",), "norm.counter": ()},
        source={"qkv": "ema", "norm.weight": "raw", "norm.counter": "initial"},
        skipped={f"slot_{i}": "optimizer slot" for i in range(5)} | {"step": "not a variable"},
        assumed=["resolution 448"],
    )
    assert str(report).splitlines() == [
        "checkpoint model.ckpt-7",
        "loaded 3 tensors (1 ema, 1 initial, 1 raw) from 4 variables",
        "skipped 5: optimizer slot: slot_0, slot_1, slot_2, ...",
        "skipped 1: not a variable: step",
        "assumed: resolution 448",
    ]
