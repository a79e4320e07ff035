"""The C++ compiler and torch that the native kernels are built with, or why there are none."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

# The oldest torch whose stable ABI has what csrc/ uses; the built library runs on it and on newer.
MINIMUM_TORCH = (2, 11)
TORCH_TARGET_VERSION = (MINIMUM_TORCH[0] << 56) | (MINIMUM_TORCH[1] << 48)


def is_set(variable: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(variable, "0") not in ("", "0")


def compiler() -> str | None:
    """The C++ compiler's command: $CXX, or the first usual name on PATH."""
    commands = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((command for command in commands if shutil.which(shlex.split(command)[0])), None)


@functools.cache
def reason_not_built() -> str:
    """Why this build leaves the native kernels out; empty if it does not."""
    if is_set("MOAT_KERNELS_SKIP_EXT"):
        return "MOAT_KERNELS_SKIP_EXT is set"
    if sys.platform == "win32":
        return "they need GCC or Clang, and Windows is not supported"
    if reason := _reason_torch_is_unsuitable():
        return reason
    if compiler() is None:
        return f"no C++ compiler found (looked for {os.environ.get('CXX') or 'c++, g++, clang++'})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h not found (on Debian and Ubuntu: package python3-dev)"
    return ""


def _reason_torch_is_unsuitable() -> str:
    if importlib.util.find_spec("torch") is None:
        return (
            "torch is not installed in the build environment "
            "(use `pip install --no-build-isolation` where torch is installed)"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        return f"torch {version} is older than {'.'.join(map(str, MINIMUM_TORCH))}"
    return ""


def choose_tools() -> None:
    """Name the compiler, and put ninja on PATH, for all that torch and setuptools run."""
    command = compiler()
    assert command is not None
    # torch's ninja build and setuptools' linker step would otherwise each choose their own.
    os.environ["CXX"] = command
    if importlib.util.find_spec("ninja"):
        import ninja

        # pip does not put the environment's own scripts on PATH.
        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR
