"""The sections of `make gpu`, in their order, and what each may take of the time."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.runner import Section

LAUNCH_TABLE = "launches.json"


def sections(folder: Path) -> list[Section]:
    """folder: of the output, where the measured launch table is."""
    # The user's own table must not decide what is measured.
    no_table = {"XDG_CONFIG_HOME": str(folder.absolute() / "no-table")}
    table = {"MOAT_KERNELS_LAUNCH_TABLE": str((folder / LAUNCH_TABLE).absolute())}
    return [
        Section("machine", "benchmarks.gpu.machine", 40.0, no_table),
        Section("smoke", "benchmarks.gpu.smoke", 90.0, no_table),
        Section("headline", "benchmarks.gpu.headline", 220.0, no_table),
        Section("kernels", "benchmarks.gpu.kernels", 240.0, no_table),
        Section("attention", "benchmarks.gpu.attention", 120.0, no_table),
        Section("checks", "benchmarks.gpu.checks", 420.0, no_table),
        Section("tune", "benchmarks.gpu.tuning", 150.0, table),
        Section("tuned", "benchmarks.gpu.tuned", 60.0, table),
    ]
