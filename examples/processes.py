"""The processes of a run: one, or as many as `torchrun` starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


@contextmanager
def joined_processes(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started know each other; a process alone does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if may_restart() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _warn_of_stale_addresses()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def may_restart() -> bool:
    """Whether torchrun starts all processes again when one dies.

    Which start this is cannot be told: every machine counts only the deaths of its own processes.
    """
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def _warn_of_stale_addresses() -> None:
    """torchrun of torch 2.13 keeps one store over restarts, with the dead processes' addresses."""
    if os.environ["RANK"] == "0":
        print(
            "warning: restarted processes may fail to find each other; start torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment",
            file=sys.stderr,
        )


def first_alone(function: Callable[[], Result]) -> Result:
    """Let the first process do something while all wait; all get its result, or its OSError."""
    outcome: list[Any] = [None]
    if rank() == 0:
        try:
            outcome = [function()]
        except OSError as error:
            outcome = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], OSError):
        raise outcome[0]
    return outcome[0]


def from_all(value: list[Any]) -> list[Any]:
    """Every process's list, one behind the other."""
    if not dist.is_initialized():
        return value
    values: list[list[Any]] = [[] for _ in range(count())]
    dist.all_gather_object(values, value)
    return [each for one in values for each in one]


def mean_over_processes(value: torch.Tensor) -> float:
    """The mean of every process's `value`, a tensor without dimensions."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= count()
    return value.item()


def sums_over_processes(*values: float) -> list[float]:
    """For each value its sum over all processes."""
    return [sum(each) for each in zip(*from_all([values]), strict=True)]
