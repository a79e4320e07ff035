"""Processes on this machine that form a torch.distributed world (gloo), for many tests."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 180.0  # of one call on all ranks; a test takes a second where nothing hangs


class Ranks:
    """`size` processes that wait for functions to run; use it as a context manager."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, size, str(folder / "store")), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def run(self, function: Callable[..., Any], *arguments: Any, each: Any = ()) -> list[Any]:
        """The results of `function(*arguments, each[rank])` by rank, without `each[rank]` if none.

        function: importable by name. Raises AssertionError with the traceback of a failing rank.
        """
        for rank, connection in enumerate(self.connections):
            own = (each[rank],) if each else ()
            connection.send_bytes(pickle.dumps((function, (*arguments, *own))))
        results, failures = [], []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(TIMEOUT_SECONDS):
                self.__exit__()  # what it still waits for would confuse the next test
                raise AssertionError(f"rank {rank} hangs; standard error has its stack")
            result, failure = pickle.loads(connection.recv_bytes())
            results.append(result)
            failures += [f"rank {rank}:\n{failure}"] if failure else []
        assert not failures, "\n".join(failures)
        return results


def _serve(connection: Connection, rank: int, size: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        torch.manual_seed(0)
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
            faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 5)
            result = function(*arguments), ""
        except Exception:
            result = None, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(pickle.dumps(result))
