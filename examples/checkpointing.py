"""Checkpoints of a run of one or many processes, by torch.distributed.checkpoint.

    FOLDER/step_00000100/    all tensors, each process's share in a file of its own
    FOLDER/step_00000100/run.json    settings, step, losses
    FOLDER/step_00000150.unfinished/    being written, or left by a run that was killed meanwhile

A checkpoint gets its name when it is whole, and only then do older ones go: whenever a run is
killed, the latest `step_*` can be resumed, by any number of processes.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import processes
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from training import Trainer, TrainingError

KEPT = 2  # checkpoints; the last one but one is for those who find the last one spoilt
RUN = "run.json"


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, the latest last."""
    return sorted(path for path in folder.glob("step_*") if path.suffix != ".unfinished")


def save_checkpoint(folder: Path, trainers: Sequence[Trainer], step: int) -> None:
    """Write all of a run after `step` steps; every process calls this."""
    final = folder / f"step_{step:08d}"
    unfinished = final.with_suffix(".unfinished")
    if processes.rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    processes.wait_for_all()
    with _quiet_alone():
        dcp.save(_tensors(trainers), checkpoint_id=unfinished, no_dist=not dist.is_initialized())
    if processes.rank() == 0:
        run = {
            "settings": asdict(trainers[0].settings),
            "step": step,
            "trainers": {trainer.blocks: trainer.history() for trainer in trainers},
        }
        (unfinished / RUN).write_text(json.dumps(run))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        for old in checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old)
    processes.wait_for_all()


def load_checkpoint(path: Path, trainers: Sequence[Trainer]) -> int:
    """Put the trainers where a run left them; returns the number of steps done.

    path: a checkpoint, or a folder of them, of which the latest is taken.

    The learning rate follows this run's --steps and --lr: only with the same arguments does the
    resumed run repeat the uninterrupted one.
    """
    path, run = _read_run(path)
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


def _read_run(path: Path) -> tuple[Path, dict[str, Any]]:
    if not (path / RUN).exists() and checkpoints(path):
        path = checkpoints(path)[-1]
    try:
        run = json.loads((path / RUN).read_text())
        run["settings"], run["step"], run["trainers"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TrainingError(f"--resume {path} is no checkpoint of this program: {error}") from error
    return path, run


def _tensors(trainers: Sequence[Trainer]) -> dict[str, Any]:
    return {trainer.blocks: trainer.tensors() for trainer in trainers}
