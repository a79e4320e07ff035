"""The launch tables of all ops, by the op's name."""

from __future__ import annotations

from moat_kernels.ops.layer_norm.triton.launches import LAUNCHES as LAYER_NORM
from moat_kernels.ops.mbconv.triton.launches import LAUNCHES as MBCONV
from moat_kernels.ops.triton_support.launch_table import LaunchTable
from moat_kernels.ops.window_attention.triton.launches import LAUNCHES as WINDOW_ATTENTION

LAUNCH_TABLES: dict[str, LaunchTable] = {
    table.op: table for table in (MBCONV, WINDOW_ATTENTION, LAYER_NORM)
}
