"""The oldest versions that the package supports, as far as the tests need them: `make oldest`.

`python tests/support/oldest.py` puts into build/oldest what is not there yet: Triton in a folder of
its own, which PYTHONPATH puts before the environment's; and the headers of PyTorch, out of its
wheel for macOS, which has the same and is the smallest.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "oldest"
TRITON_VERSION = "3.6.0"
TRITON = FOLDER / f"triton-{TRITON_VERSION}"
TORCH_VERSION = "2.11.0"
TORCH_HEADERS = FOLDER / f"torch-{TORCH_VERSION}"
# How the headers lie in the wheel.
INCLUDE = "torch/include/"

PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")


def reason_no_triton() -> str:
    """Why tests cannot run under the oldest Triton; empty if they can."""
    return "" if TRITON.exists() else "`make oldest` has not put the oldest Triton into build/"


def reason_no_torch_headers() -> str:
    """Why tests cannot compile against the oldest PyTorch; empty if they can."""
    if TORCH_HEADERS.exists():
        return ""
    return "`make oldest` has not put the headers of the oldest PyTorch into build/"


def _install_triton(target: Path) -> None:
    options = ("--no-deps", "--only-binary=:all:", f"--target={target}")
    subprocess.run([*PIP, "install", *options, f"triton=={TRITON_VERSION}"], check=True)


def _unpack_torch_headers(target: Path) -> None:
    platform = ("--platform=macosx_11_0_arm64", "--python-version=3.12", "--only-binary=:all:")
    options = ("--no-deps", "--no-cache-dir", *platform, f"--dest={target}")
    subprocess.run([*PIP, "download", *options, f"torch=={TORCH_VERSION}"], check=True)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        headers = [name for name in archive.namelist() if name.startswith(INCLUDE)]
        archive.extractall(target, headers)
    wheel.unlink()


def main() -> None:
    """Fetch what is missing; a folder is there as a whole or not at all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for folder, fetch in ((TRITON, _install_triton), (TORCH_HEADERS, _unpack_torch_headers)):
        if not folder.exists():
            print(f"Fetching {folder.name} into build/oldest")
            with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
                fetch(Path(temporary) / folder.name)
                (Path(temporary) / folder.name).rename(folder)


if __name__ == "__main__":
    main()
