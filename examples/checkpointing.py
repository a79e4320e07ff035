"""Checkpoints of a run of one or many processes, by torch.distributed.checkpoint.

A checkpoint gets its name when it is whole, and only then do older ones go: whenever a run is
killed, the latest `step_*` can be resumed, by any number of processes. checkpoint_folder.py says
what is in a folder of them.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import processes
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_folder import (
    RUN,
    discard,
    is_own,
    latest_checkpoint,
    leftovers,
    name_of,
    named,
    read_run,
    remove,
    write_json,
)
from files import free_name
from training import Trainer, TrainingError

KEPT = 2  # checkpoints; the last one but one is for those who find the last one spoilt


class CheckpointError(TrainingError):
    """A checkpoint could not be written; training may go on."""


def save_checkpoint(folder: Path, trainers: Sequence[Trainer], step: int) -> None:
    """Write all of a run after `step` steps; every process calls this.

    CheckpointError, in every process, if it cannot be written: then nothing of it is left.
    """
    final = folder / name_of(step)
    run = {
        "settings": asdict(trainers[0].settings),
        "step": step,
        "trainers": {trainer.blocks: trainer.history() for trainer in trainers},
    }
    try:
        unfinished = processes.first_alone(lambda: _begin(final, step))
        try:
            with _quiet_alone():
                dcp.save(
                    _tensors(trainers),
                    checkpoint_id=unfinished,
                    no_dist=not dist.is_initialized(),
                )
            processes.first_alone(lambda: _finish(unfinished, final, run))
        except BaseException:
            if processes.rank() == 0:
                discard(unfinished)
            raise
    except dcp.api.CheckpointException as error:
        raise _cause(error, final) from error
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {final}: {error}") from error


def _begin(final: Path, step: int) -> Path:
    """Make the folder to write to, which says what it is before it has anything in it."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in leftovers(final.parent):
        discard(leftover)
    unfinished = free_name(final, "unfinished")
    unfinished.mkdir()
    try:
        write_json(unfinished / RUN, {"step": step})
    except BaseException:
        discard(unfinished)
        raise
    return unfinished


def _finish(unfinished: Path, final: Path, run: dict[str, Any]) -> None:
    """Complete run.json, give the checkpoint its name, and remove older ones."""
    sizes = {path.name: path.stat().st_size for path in unfinished.iterdir() if path.name != RUN}
    write_json(unfinished / RUN, {**run, "files": sizes})
    if os.path.lexists(final):
        if not is_own(final, run["step"]):
            raise FileExistsError("there is something that this program did not write")
        remove(final)
    unfinished.rename(final)
    up_to_this = {s: path for s, path in named(final.parent).items() if s <= run["step"]}
    own = [path for step, path in up_to_this.items() if is_own(path, step)]
    for old in own[:-KEPT]:
        try:
            remove(old)
        except OSError as error:
            print(f"warning: cannot remove the old checkpoint {old}: {error}", file=sys.stderr)


def load_checkpoint(path: Path, trainers: Sequence[Trainer]) -> int:
    """Put the trainers where a run left them; returns the number of steps done.

    path: a checkpoint, or a folder of them, of which the latest is taken.

    The learning rate follows this run's --steps and --lr: only with the same arguments does the
    resumed run repeat the uninterrupted one.
    """
    if not os.path.lexists(path / RUN):
        path = latest_checkpoint(path)
    run = read_run(path)
    settings = trainers[0].settings
    for name, wanted in (("model", settings.model), ("classes", settings.classes)):
        saved = run["settings"][name]
        if saved != wanted:
            raise TrainingError(f"--resume {path} has {name} {saved}, this run has {wanted}")
    missing = [trainer.blocks for trainer in trainers if trainer.blocks not in run["trainers"]]
    if missing:
        raise TrainingError(
            f"--resume {path} was made with --blocks {'|'.join(run['trainers'])}, "
            f"it has no {' or '.join(missing)} blocks"
        )
    if run["step"] >= settings.steps:
        raise TrainingError(f"--resume {path} has done {run['step']} steps already; raise --steps")
    tensors = _tensors(trainers)
    try:
        with _quiet_alone():
            dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (OSError, dcp.api.CheckpointException) as error:
        raise TrainingError(f"--resume {path} cannot be read: {error}") from error
    for trainer in trainers:
        trainer.load(tensors[trainer.blocks], run["trainers"][trainer.blocks])
    return run["step"]


@contextmanager
def _quiet_alone() -> Iterator[None]:
    """Without the warning that there is one process only, which is no accident."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: dcp.api.CheckpointException, path: Path) -> BaseException:
    """What went wrong in one of the processes while they wrote `path`."""
    causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, KeyboardInterrupt):
            return cause
    # torch.save says of a full disk where in the file it was.
    reason = causes[0].__context__ if isinstance(causes[0].__context__, OSError) else causes[0]
    return CheckpointError(f"cannot write the checkpoint {path}: {reason}")


def _tensors(trainers: Sequence[Trainer]) -> dict[str, Any]:
    return {trainer.blocks: trainer.tensors() for trainer in trainers}
