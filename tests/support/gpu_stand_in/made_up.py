"""Benchmarks of made-up contenders, most of which fail in their own way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import device
import interleaved
import processes
import pytest
import sitecustomize
import torch
from interleaved import Comparison, Contender, Group, contenders_of

interleaved.SECONDS = 0.0
processes.TURN_LIMIT = 5.0

CALL_SECONDS = {"floor": 0.001, "ours": 0.002}


def computes(name: str) -> None:
    sitecustomize.seconds += CALL_SECONDS[name]
    if device.chosen() == "cpu":
        time.sleep(CALL_SECONDS[name])


def raises() -> None:
    raise ValueError("channels must be positive, got -3")


def loses_the_device() -> None:
    sitecustomize.lost = True


def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs() -> None:
    time.sleep(3600)


def prepares() -> None:
    """Takes time that is no contender's."""
    sitecustomize.seconds += 0.010


FAILING: dict[str, Callable[[], None]] = {
    "raises": raises,
    "loses the device": loses_the_device,
    "crashes": crashes,
    "hangs": hangs,
}


def make_group(names: Sequence[str]) -> Group:
    note("group")

    def make(name: str) -> Contender:
        if name == "cannot be made":
            raise torch.OutOfMemoryError("made up")
        return Contender(FAILING.get(name) or partial(computes, name), prepares)

    return Group(names, make, flops=1e6)


def make_nothing(names: Sequence[str]) -> Group:
    note("nothing")
    raise RuntimeError("no model of this name")


def make_without_peer(names: Sequence[str]) -> Group:
    note("without peer")
    pytest.skip("the peer is not installed")


def note(made: str) -> None:
    """In a file that all processes write to."""
    with Path(os.environ["MADE"]).open("a") as file:
        file.write(f"{made}\n")


names = ("floor", "cannot be made", *(FAILING if device.chosen() == "cuda" else ("raises",)))
COMPARISONS = [
    Comparison("group", make_group, (*names, "ours")),
    Comparison("nothing", make_nothing, ("floor", "ours")),
    Comparison("without peer", make_without_peer, ("floor", "ours")),
]


@pytest.mark.parametrize(("comparison", "contender"), contenders_of(COMPARISONS))
def test_made_up(measure: Any, comparison: Comparison, contender: str) -> None:
    measure(comparison, contender)
