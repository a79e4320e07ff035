"""torchvision's compiled operators beside a CPU build of the PyTorch that they were made for.

The package that PyPI has is linked to libraries of CUDA builds, which a CPU build lacks. Its CPU
operators need nothing of those, so empty libraries under their names let it load: with functions
bound when they are called, what is missing is missed by nobody.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

import torch

# The only variable (not function) of those libraries that is referred to.
_SOURCES = {
    "libc10_cuda.so": "void *_ZN3c104cuda20CUDACachingAllocator9allocatorE;",
    "libtorch_cuda.so": "",
}
_PAIRED = 15  # torchvision 0.28 is made for torch 2.13, and so on


def load_operators() -> bool:
    """Load them before torchvision is imported; returns whether that could be done."""
    spec = importlib.util.find_spec("torchvision")
    compiler = shutil.which("cc") or shutil.which("g++")
    if spec is None or spec.origin is None or compiler is None or torch.version.cuda:
        return False
    package = Path(spec.origin).parent
    runtimes = sorted(package.with_name("torchvision.libs").glob("libcudart*.so.*"))
    if not (package / "_C.so").is_file() or len(runtimes) != 1 or not _is_pair():
        return False
    with tempfile.TemporaryDirectory() as folder:
        libraries = [Path(folder, name) for name in _SOURCES]
        for library, source in zip(libraries, _SOURCES.values(), strict=True):
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-xc", "-"]
            subprocess.run([*command, "-o", library], input=source, text=True, check=True)
        return all(map(_open, [*runtimes, *libraries, package / "_C.so"]))


def _is_pair() -> bool:
    """Whether this torchvision was made for this torch: others would crash when called."""
    minors = [int(version.split(".")[1]) for version in (torch.__version__, _torchvision_version())]
    return minors[0] - minors[1] == -_PAIRED


def _torchvision_version() -> str:
    return metadata.version("torchvision")


def _open(library: Path) -> bool:
    """By the C library's own call: ctypes.CDLL binds functions at once, and some are missing."""
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.restype, dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    return bool(dlopen(os.fsencode(library), os.RTLD_LAZY | os.RTLD_GLOBAL))
