"""Capturing calls in CUDA graphs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

# Devices whose calls are captured.
CAPTURED = ("cuda",)
# As PyTorch asks for before a capture: kernels are compiled and loaded, states made.
WARM_UP = 3

Result = TypeVar("Result")


def autocast_for_capture(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast in `dtype`, or none, even inside of one.

    Without the cache, which would hand out the same casts of parameters in every replay.
    """
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


@contextlib.contextmanager
def restoring(tensors: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Afterwards the tensors and the random numbers of `device` are as they were before."""
    saved = [tensor.detach().clone() for tensor in tensors]
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, saved, strict=True):
                    tensor.copy_(value)


class Recorder:
    """Where calls are warmed up and captured: on one stream, into one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Any]) -> None:
        """Call it, uncaptured."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                function()
        finally:
            current.wait_stream(self.stream)

    def rehearse(self, function: Callable[[], Any]) -> None:
        """The same, with a RuntimeError if the host waits for the GPU.

        A capture would fail there too, and leave PyTorch without random numbers on the GPU.
        """
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
            try:
                self.run(function)
            finally:
                torch.cuda.set_sync_debug_mode(before)

    def capture(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """(what replays it, its result, which every replay writes anew)."""
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: that of a data loader may allocate pinned memory meanwhile.
        capture = torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        )
        # A capture that fails does not go back to the stream that was current.
        with torch.cuda.stream(torch.cuda.current_stream(self.device)), capture:
            result = function()
        return graph.replay, result
