"""Kernels compiled without a GPU, and the native library, in one file for a machine with one.

Triton finds compiled kernels by a hash of their source, its own files, the architecture and the
options: no path and no device. So they can be compiled here and carried there, if Triton, Python
and this tree are the same. Paths stand only in the lists of each kernel's files; they are written
anew where the archive is unpacked. In the C launchers of Triton 3.6 only the processor counts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# In place of the folder in which the lists of files were written.
FOLDER = "@FOLDER@"
LIBRARY = ("moat_kernels/_C.abi3.so", "moat_kernels/_build_record.json")
MANIFEST = "manifest.json"


def versions() -> dict[str, str]:
    """What must be the same on both machines for the kernels to be found."""
    triton = importlib.metadata.version("triton")
    return {"triton": triton, "python": f"{sys.version_info.major}.{sys.version_info.minor}"}


def pack(cache: Path, launchers: Iterable[tuple[str, Path]], archive: Path) -> dict[str, Any]:
    """Write the archive: the kernels of a Triton cache, launchers (source, library), the library.

    Returns its manifest.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kernels = 0
        for entry in sorted(cache.iterdir()):
            files = [*entry.glob("*.cubin"), *entry.glob("*.json")]
            if not any(file.suffix == ".cubin" for file in files):
                continue
            target = folder / "triton" / entry.name
            target.mkdir(parents=True)
            kernels += 1
            for file in files:
                if file.name.startswith("__grp__"):
                    (target / file.name).write_text(_relocatable(file, str(cache)))
                else:
                    shutil.copy(file, target)
        (folder / "launchers").mkdir()
        count = 0
        for count, (source, library) in enumerate(launchers, 1):
            (folder / "launchers" / f"{count}.c").write_text(source)
            shutil.copy(library, folder / "launchers" / f"{count}.so")
        carried = [name for name in LIBRARY if (ROOT / name).exists()]
        manifest = {**versions(), "kernels": kernels, "launchers": count, "library": carried}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive, "w:xz", preset=9) as file:
            for name in (MANIFEST, "triton", "launchers"):
                file.add(folder / name, name)
            for name in carried:
                file.add(ROOT / name, name)
    return manifest


def _relocatable(listing: Path, cache: str) -> str:
    """A list of a kernel's files with FOLDER for the cache's, without those that are not packed."""
    paths = json.loads(listing.read_text())["child_paths"]
    kept = {
        name: path.replace(cache, FOLDER, 1)
        for name, path in paths.items()
        if name.endswith((".cubin", ".json"))
    }
    return json.dumps({"child_paths": kept})


def unpack(archive: Path, cache: Path) -> dict[str, Any]:
    """Fill a Triton cache, and put the native library into the tree where it has none.

    Returns the manifest. Raises ValueError where other versions run here.
    """
    with tempfile.TemporaryDirectory(dir=_existing(cache.parent)) as temporary:
        folder = Path(temporary)
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        here = versions()
        if any(manifest[name] != version for name, version in here.items()):
            packed = {name: manifest[name] for name in here}
            raise ValueError(f"the archive was packed with {packed}, here run {here}")
        shutil.copytree(folder / "triton", cache, dirs_exist_ok=True)
        for listing in cache.glob("*/__grp__*.json"):
            listing.write_text(listing.read_text().replace(FOLDER, str(cache)))
        for source in sorted((folder / "launchers").glob("*.c")):
            _place_launcher(source, cache)
        if not all((ROOT / name).exists() for name in manifest["library"]):
            for name in manifest["library"]:
                shutil.copy(folder / name, ROOT / name)
    return manifest


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _place_launcher(source: Path, cache: Path) -> None:
    """Where Triton looks for the library of this source: see triton/runtime/build.py."""
    import sysconfig

    from triton.runtime.build import platform_key
    from triton.runtime.cache import _base32

    text = source.read_text()
    key = _base32(hashlib.sha256((text + platform_key()).encode()).hexdigest())
    name = "cuda_utils" if "PyInit_cuda_utils" in text else "__triton_launcher"
    target = cache / key
    target.mkdir(exist_ok=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    shutil.copy(source.with_suffix(".so"), target / f"{name}{suffix}")
