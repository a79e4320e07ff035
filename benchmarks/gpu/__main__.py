"""Everything that a GPU can tell about this project, in a given time: `make gpu`.

    python -m benchmarks.gpu --output FOLDER --minutes 10

needs torch with CUDA, Triton and the packages that the tests need, and neither a network nor an
installed moat_kernels. Each section is a process of its own with a time limit; what it found is in
FOLDER the moment it exists, so that a run that is cut off keeps what it had. Called again with the
same folder it goes on where it ended. docs/gpu.md describes the sections.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
for _path in (ROOT / "tests", ROOT):
    sys.path.insert(0, str(_path))

from benchmarks.gpu import archive  # noqa: E402
from benchmarks.gpu.prepare import ARCHIVE  # noqa: E402
from benchmarks.gpu.runner import Plan, Section, run  # noqa: E402
from benchmarks.gpu.sections import sections  # noqa: E402

BUILD_SECONDS = 240


def main() -> None:
    options = _parse()
    deadline = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ.pop("MOAT_KERNELS_LAUNCH_TABLE", None)
    cache = ROOT / "build" / "gpu-run-cache"
    environment = {
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "TRITON_INTERPRET": str(int(options.rehearse)),
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONUNBUFFERED": "1",
    }
    if options.archive.exists():
        try:
            print(f"unpacked: {archive.unpack(options.archive, cache)}", flush=True)
        except ValueError as error:
            print(f"{options.archive} is not used: {error}", flush=True)
    if not options.rehearse and not (ROOT / archive.LIBRARY[0]).exists():
        _build(options.output / "log.txt")
    plan = Plan(_choose(options), deadline, environment, options.rehearse)
    run(plan, options.output)
    print((options.output / "tables.md").read_text())


def _choose(options: argparse.Namespace) -> list[Section]:
    """The sections asked for, in that order, with the limits asked for."""
    known = {section.name: section for section in sections(options.output)}
    chosen = []
    for text in options.sections or known:
        name, _, seconds = text.partition("=")
        if name not in known:
            sys.exit(f"--sections: {name!r} is none of {', '.join(known)}")
        section = known[name]
        chosen.append(dataclasses.replace(section, seconds=float(seconds or section.seconds)))
    return chosen


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", help="a folder")
    parser.add_argument("--minutes", type=float, default=10.0, help="that all of it may take")
    parser.add_argument(
        "--sections",
        nargs="+",
        metavar="NAME[=SECONDS]",
        help="those to run, in this order, and what each may take (default: all, see docs/gpu.md)",
    )
    parser.add_argument(
        "--archive",
        type=Path,
        default=ARCHIVE,
        help="of compiled kernels, by `python -m benchmarks.gpu.prepare` (default: %(default)s)",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, at tiny sizes, with an invented clock"
    )
    return parser.parse_args()


def _build(log: Path) -> None:
    """The native library, where the archive had none for this machine."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    with log.open("ab") as file:
        try:
            subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=BUILD_SECONDS
            )
        except subprocess.TimeoutExpired:
            print(f"the native library was not built within {BUILD_SECONDS} s", flush=True)


if __name__ == "__main__":
    main()
