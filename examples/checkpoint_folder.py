"""What is in a folder of checkpoints, and whose it is.

    FOLDER/step_00000100/    all tensors, each process's share in a file of its own
    FOLDER/step_00000100/run.json    settings, step, losses, and the names and sizes of the files
    FOLDER/step_00000150.unfinished/    being written, or left by a run that was killed meanwhile
    FOLDER/step_00000050.old/    being removed, or left likewise

Only what this program wrote is removed: folders named exactly so whose run.json is of that step
and lists all that is in them. All else in FOLDER is somebody's, such as `step_00000100_best`, or a
checkpoint with a note put into it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import processes
from files import free_name, written_whole
from training import TrainingError

RUN = "run.json"


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, the latest last."""
    return [path for step, path in named(folder).items() if _is_whole(path, step)]


def latest_checkpoint(folder: Path) -> Path:
    """The latest whole checkpoint in a folder of them. Warns of later ones that are not whole."""
    for step, path in reversed(named(folder).items()):
        try:
            read_run(path, step)
            return path
        except TrainingError as flaw:
            if processes.rank() == 0:
                print(f"warning: passed over, {flaw}", file=sys.stderr)
    raise TrainingError(
        f"--resume {folder} is no checkpoint of this program and has none that is whole"
    )


def refuse_strangers(folder: Path, is_due: Callable[[int], bool]) -> None:
    """TrainingError if a checkpoint will be due where there is something that is not ours."""
    for step, path in named(folder).items():
        if is_due(step) and not is_own(path, step):
            raise TrainingError(
                f"--output: {path} is needed for a checkpoint and holds something that this "
                "program did not write, or that was changed since; move it away"
            )


def name_of(step: int) -> str:
    """The name of a checkpoint."""
    return f"step_{step:08d}"


def named(folder: Path) -> dict[int, Path]:
    """All that is named as a checkpoint is, whatever it be, by its step in order."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise TrainingError(f"cannot read the folder {folder}: {error}") from error
    found = {}
    for name in names:
        match = re.fullmatch("step_([0-9]{8,18})", name)
        if match and name == name_of(int(match[1])):
            found[int(match[1])] = folder / name
    return dict(sorted(found.items()))


def leftovers(folder: Path) -> Iterator[Path]:
    """What runs that were killed left half written or half removed in `folder`."""
    for path in folder.iterdir():
        match = re.fullmatch(r"(step_[0-9]+)\.(unfinished|old)[0-9]*", path.name)
        if match and not path.is_symlink():
            with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
                if match[1] == name_of(json.loads((path / RUN).read_text())["step"]):
                    yield path


def write_json(path: Path, content: dict[str, Any]) -> None:
    """In one step, and on the disk when it is done."""
    with written_whole(path) as new:
        new.write_text(json.dumps(content))


def read_run(path: Path, step: int | None = None) -> dict[str, Any]:
    """What a checkpoint says of itself; TrainingError if it is none, or not whole.

    step: which it must be of; None: any.
    """
    try:
        run = json.loads((path / RUN).read_text())
        own_name = name_of(run["step"])
        run["settings"]["model"], run["settings"]["classes"]
        for history in run["trainers"].values():
            history["losses"], history["step_seconds"]
        sizes = run.get("files", {}).items()  # none in those that older versions wrote
        damaged = [name for name, size in sizes if _size(path / name) != size]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise TrainingError(f"{path} is no checkpoint of this program: {error!r}") from error
    if damaged:
        raise TrainingError(f"{path} is damaged: {', '.join(damaged)} not as written")
    if step not in (None, run["step"]):
        raise TrainingError(f"{path} is a copy of {own_name}")
    return run


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _is_whole(path: Path, step: int) -> bool:
    try:
        return bool(read_run(path, step))
    except TrainingError:
        return False


def is_own(path: Path, step: int) -> bool:
    """Whether this program wrote the checkpoint of a step and nobody changed it since."""
    try:
        files = {RUN, *read_run(path, step).get("files", ())}
        return set(os.listdir(path)) == files and not path.is_symlink()
    except (OSError, TrainingError):
        return False


def remove(path: Path) -> None:
    """Under another name at once: what is left of it if we are killed is no checkpoint."""
    old = free_name(path, "old")
    path.rename(old)
    _empty(old)


def discard(path: Path) -> None:
    """As far as possible; the next checkpoint tries again."""
    with suppress(OSError):
        _empty(path)


def _empty(folder: Path) -> None:
    """Remove a folder of files, last the one that says whose they are."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RUN):
        path.unlink()
    folder.rmdir()
