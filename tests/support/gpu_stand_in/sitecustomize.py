"""A GPU for tests of the benchmarks where there is none.

Python runs this first in every process that has this folder, and benchmarks/, on its PYTHONPATH.
What torch.cuda is asked for is made up: `seconds` is the time on the GPU, which contenders advance,
and once it is `lost`, nothing can be waited for. Tensors are the CPU's.
"""

from __future__ import annotations

import device
import torch

seconds = 0.0
lost = False
PEAK_BYTES = 3 * 2**20


class Event:
    """Takes a microsecond to record."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        global seconds
        seconds += 1e-6
        self.at = seconds

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def synchronize() -> None:
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


torch.cuda.Event = Event
torch.cuda.synchronize = synchronize
torch.cuda.get_device_name = lambda: "Stand-in"
torch.cuda.reset_peak_memory_stats = lambda: None
torch.cuda.memory_allocated = lambda: 2**20
torch.cuda.max_memory_allocated = lambda: 2**20 + PEAK_BYTES
device.placed = lambda: torch.device("cpu")

import floor  # noqa: E402  (it asks where tensors are placed)

floor.PEAK_SIDES["cuda"] = 64
