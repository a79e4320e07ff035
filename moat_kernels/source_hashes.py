"""What the native library of a checkout is built from, to tell one that is out of date.

Of the standard library only: the build runs this file where torch may be missing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


def source_hashes(root: Path) -> dict[str, str]:
    """A hash of each source of the native library below `root`, by its path from there.

    Empty where there is no checkout, but an installed package.
    """
    if not (root / "pyproject.toml").exists():
        return {}
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((root / "csrc").rglob("*"))
        if path.suffix in _SUFFIXES
    }
