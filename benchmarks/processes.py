"""A comparison in a process of its own, which crashes, hangs and leaks without harm to the next."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import device
import torch
from interleaved import Comparison, DeviceLost, Row

# Seconds that a process may take for its imports and for what the contenders share.
START_LIMIT = 120.0
# The most that a contender's turn may take: torch.compile and Triton begin with empty caches.
TURN_LIMIT = 300.0
# The most that a comparison may take, all its processes together.
GROUP_LIMIT = 900.0
# For a process that has reported everything to end by itself.
END_LIMIT = 10.0


def measure_apart(
    comparison: Comparison, names: Sequence[str], report: Callable[[Row], Any]
) -> None:
    """`comparison.measure` in another process, with this one's device, dtype and threads.

    A contender whose process crashes or hangs is reported as failed. The others are then measured
    in a new one, all of them, because only rows of one process can be compared: a later row of a
    contender replaces an earlier one.
    """
    deadline = time.monotonic() + GROUP_LIMIT
    rest, answered = list(names), set()

    def keep(row: Row) -> None:
        answered.add(row["contender"])
        if "failure" in row:
            rest.remove(row["contender"])
        report(row)

    def fail(name: str, reason: str) -> None:
        keep({"contender": name, "failure": reason, "traceback": ""})

    while rest:
        current = None
        for kind, value in _events(comparison, tuple(rest), deadline):
            if kind == "begin":
                current = value
            elif kind == "row":
                keep(value)
            elif kind == "finished":
                return
            elif kind == "stopped":
                # Before the first turn, in what all share; it may also die of an earlier failure.
                for name in [name for name in rest if current in (name, None)]:
                    fail(name, value)
            elif kind == "late":
                for name in [name for name in rest if name not in answered]:
                    fail(name, f"not measured: its group took more than {GROUP_LIMIT:g} s")
                return


def _events(
    comparison: Comparison, names: Sequence[str], deadline: float
) -> Iterator[tuple[str, Any]]:
    """What one process tells, the last being why there is no more.

    ("begin", contender), ("row", row); at the end one of ("finished", None), ("lost", None) where
    the device was lost to a contender whose row said so, ("stopped", reason), and ("late", None)
    past the deadline.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    # Pickled here, so that the comparison's module is imported after the device was chosen.
    settings = (device.chosen(), torch.get_default_dtype(), torch.get_num_threads())
    process = context.Process(
        target=_measure, args=(sender, settings, pickle.dumps(comparison), names)
    )
    process.start()
    sender.close()
    limit = START_LIMIT
    try:
        while True:
            left = max(0.0, deadline - time.monotonic())
            if not wait([receiver, process.sentinel], min(limit, left)):
                yield ("late", None) if left < limit else ("stopped", f"no answer in {limit:g} s")
                return
            limit = TURN_LIMIT
            try:
                # What a process wrote before it died can still be read.
                event = receiver.recv() if receiver.poll() else None
            except EOFError:
                event = None
            if event is None:
                process.join()
                yield "stopped", f"its process died: {_describe_exit(process.exitcode)}"
                return
            yield event
            if event[0] in ("finished", "lost"):
                process.join(END_LIMIT)
                return
    finally:
        process.kill()
        process.join()
        receiver.close()


def _measure(
    sender: Connection,
    settings: tuple[str, torch.dtype, int],
    pickled: bytes,
    names: Sequence[str],
) -> None:
    """The other process."""
    name, dtype, threads = settings
    device.choose(name)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    comparison: Comparison = pickle.loads(pickled)
    try:
        comparison.measure(
            names,
            report=lambda row: sender.send(("row", row)),
            begin=lambda contender: sender.send(("begin", contender)),
        )
    except DeviceLost:
        sender.send(("lost", None))
    else:
        sender.send(("finished", None))


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit status {code}"
