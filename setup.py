"""Builds the native kernels in csrc/; everything else about the package is in pyproject.toml.

Every csrc/cpu/isa/*.cpp is compiled once per instruction set, into objects whose symbols lie in
a namespace of that instruction set; csrc/cpu/host/dispatch.cpp chooses between them at run time.

The kernels are optional: where they cannot be built, one line says why and the package installs
without them. MOAT_KERNELS_SKIP_EXT=1 leaves them out on purpose; CXX and MAX_JOBS work as usual.
MOAT_KERNELS_SANITIZE=address or =thread builds them for `make sanitize`, with GCC's
AddressSanitizer and UndefinedBehaviorSanitizer or with its ThreadSanitizer.

Beside a CUDA build of torch, and with nvcc (CUDA_HOME, or on PATH), the library gets the CUDA
kernels too, for the architectures of TORCH_CUDA_ARCH_LIST, unless MOAT_KERNELS_SKIP_CUDA=1 is set.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# The oldest torch whose stable ABI has what csrc/ uses; the built library runs on it and on newer.
MINIMUM_TORCH = (2, 11)
TORCH_TARGET_VERSION = (MINIMUM_TORCH[0] << 56) | (MINIMUM_TORCH[1] << 48)

SOURCES = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/host/*.cpp"))
KERNEL_SOURCES = sorted(glob("csrc/cpu/isa/*.cpp"))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/cuda/*.cuh"))
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cpp"))
CUDA_KERNEL_SOURCES = sorted(glob("csrc/cuda/*.cu"))

COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]
SANITIZERS = {
    "": [],
    # The checks of null and alignment at every vector access are left out: with them GCC takes
    # minutes per file. So is AddressSanitizer's inline code, in favour of calls.
    "address": [
        "-fsanitize=address,bounds,shift,signed-integer-overflow,integer-divide-by-zero,"
        "float-cast-overflow,return",
        "-fno-sanitize-recover=all",
        "--param=asan-instrumentation-with-call-threshold=0",
    ],
    "thread": ["-fsanitize=thread"],
}
SANITIZE = SANITIZERS[os.environ.get("MOAT_KERNELS_SANITIZE", "")]
if SANITIZE:
    # Line numbers for the reports; the runtime library comes from LD_PRELOAD.
    COMPILE_FLAGS += [*SANITIZE, "-g1", "-O1", "-fno-omit-frame-pointer"]

# Keep in step with the checks in csrc/cpu/host/dispatch.cpp.
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    ]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# As in TORCH_CUDA_ARCH_LIST. With code for 8.0 also 8.6 and 8.9 run; PTX serves what is newer.
CUDA_ARCHITECTURES = "8.0 9.0+PTX"
OLDEST_CUDA_ARCHITECTURE = 80


def compiler() -> str | None:
    """The C++ compiler's command: $CXX, or the first usual name on PATH."""
    commands = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((command for command in commands if shutil.which(shlex.split(command)[0])), None)


def reason_torch_is_unsuitable() -> str:
    if importlib.util.find_spec("torch") is None:
        return (
            "torch is not installed in the build environment "
            "(use `pip install --no-build-isolation` where torch is installed)"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        return f"torch {version} is older than {'.'.join(map(str, MINIMUM_TORCH))}"
    return ""


@functools.cache
def reason_not_built() -> str:
    """Why this build leaves the native kernels out; empty if it does not."""
    if os.environ.get("MOAT_KERNELS_SKIP_EXT", "0") not in ("", "0"):
        return "MOAT_KERNELS_SKIP_EXT is set"
    if sys.platform == "win32":
        return "they need GCC or Clang, and Windows is not supported"
    if reason := reason_torch_is_unsuitable():
        return reason
    if compiler() is None:
        return f"no C++ compiler found (looked for {os.environ.get('CXX') or 'c++, g++, clang++'})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h not found (on Debian and Ubuntu: package python3-dev)"
    return ""


def nvcc() -> str | None:
    """CUDA's compiler: in CUDA_HOME if that is set, or else on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def toolkit_flags(name: str) -> list[str]:
    """nvcc's own -I ("INCLUDES") or -L ("LIBRARIES") flags, wherever its toolkit lies."""
    command = [nvcc(), "--dryrun", CUDA_KERNEL_SOURCES[0], "-o", "unused"]
    plan = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr
    (line,) = re.findall(rf"^#\$ {name}=(.*)$", plan, re.MULTILINE)
    return shlex.split(line)


def cuda_architectures() -> list[tuple[int, bool]]:
    """(80, False) for "8.0", (90, True) for "9.0+PTX"; without those too old for the kernels."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    architectures = []
    for name in re.split("[ ;]+", names.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", name)
        if match is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST has {name!r}; supported are numbers like 8.0 or 9.0+PTX"
            )
        architectures.append((10 * int(match[1]) + int(match[2]), bool(match[3])))
    return [both for both in architectures if both[0] >= OLDEST_CUDA_ARCHITECTURE]


@functools.cache
def reason_cuda_not_built() -> str:
    """Why this build leaves the CUDA kernels out; empty if it does not."""
    if reason := reason_not_built():
        return reason
    if os.environ.get("MOAT_KERNELS_SKIP_CUDA", "0") not in ("", "0"):
        return "MOAT_KERNELS_SKIP_CUDA is set"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if nvcc() is None:
        return "nvcc not found (looked in CUDA_HOME and on PATH)"
    if not cuda_architectures():
        return "TORCH_CUDA_ARCH_LIST names nothing from 8.0 on"
    return ""


def compile_cuda_kernels(directory: str) -> list[str]:
    """The objects of csrc/cuda/*.cu."""
    os.makedirs(directory, exist_ok=True)
    targets = []
    for number, ptx in cuda_architectures():
        targets.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            targets.append(f"-gencode=arch=compute_{number},code=compute_{number}")

    def compile_one(source: str) -> str:
        target = os.path.join(directory, f"{Path(source).stem}.cu.o")
        subprocess.check_call([nvcc(), *NVCC_FLAGS, *targets, "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        return list(pool.map(compile_one, CUDA_KERNEL_SOURCES))


def record_build(root: Path) -> None:
    """Write what was built, or why not, where moat_kernels.extension looks; say so if not."""
    record = {"reason_not_built": reason_not_built()}
    if record["reason_not_built"]:
        print(
            f"moat_kernels: native CPU kernels not built: {record['reason_not_built']}. "
            "Everything else works, with stock PyTorch operations on the CPU.",
            file=sys.stderr,
        )
    else:
        version = subprocess.check_output([*shlex.split(compiler()), "--version"], text=True)
        record["compiler"] = version.splitlines()[0]
        record["torch"] = importlib.metadata.version("torch")
        record["instruction_sets"] = list(ISA_FLAGS)
        record["reason_cuda_not_built"] = reason_cuda_not_built()
        if not record["reason_cuda_not_built"]:
            record["cuda_architectures"] = [number for number, _ in cuda_architectures()]
    (root / "moat_kernels" / "_build_record.json").write_text(json.dumps(record, indent=2) + "\n")


def build_ext_command() -> type[build_ext]:
    if reason_not_built():
        base = build_ext
    else:
        from torch.utils.cpp_extension import BuildExtension as base

    class BuildKernels(base):
        def build_extension(self, extension):
            try:
                for isa, flags in ISA_FLAGS.items():
                    extension.extra_objects += self.compiler.compile(
                        KERNEL_SOURCES,
                        output_dir=os.path.join(self.build_temp, isa),
                        include_dirs=[os.path.abspath("csrc")],
                        extra_postargs=[*COMPILE_FLAGS, f"-DMOAT_KERNELS_ISA={isa}", *flags],
                    )
                if not reason_cuda_not_built():
                    directory = os.path.join(self.build_temp, "cuda")
                    extension.extra_objects += compile_cuda_kernels(directory)
                super().build_extension(extension)
            except Exception as error:
                raise RuntimeError(
                    "compiling the native kernels failed (the compiler's messages are in the "
                    "output); MOAT_KERNELS_SKIP_EXT=1 installs moat_kernels without them, "
                    "MOAT_KERNELS_SKIP_CUDA=1 without those for CUDA"
                ) from error

        def run(self):
            super().run()
            if self.inplace:
                record_build(Path())

    return BuildKernels


class BuildPython(build_py):
    def run(self):
        super().run()
        record_build(Path() if self.editable_mode else Path(self.build_lib))


def extension_arguments() -> dict:
    """What setup() needs to build the extension; nothing where it is left out."""
    if reason_not_built():
        return {}
    from torch.utils.cpp_extension import CppExtension, include_paths

    # torch's ninja build and setuptools' linker step would otherwise each choose their own.
    os.environ["CXX"] = compiler()
    if importlib.util.find_spec("ninja"):
        import ninja

        # pip does not put the environment's own scripts on PATH.
        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR

    extension = CppExtension(
        "moat_kernels._C",
        SOURCES,
        depends=[*KERNEL_SOURCES, *HEADERS],
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args=[
            *COMPILE_FLAGS,
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION:#018x}",
            # As system headers, torch's own do not warn.
            *(f"-isystem{path}" for path in include_paths()),
        ],
        extra_link_args=SANITIZE,
        # torch's BuildExtension defines Py_LIMITED_API to match.
        py_limited_api=True,
    )
    if not reason_cuda_not_built():
        extension.sources += CUDA_SOURCES
        extension.depends += CUDA_KERNEL_SOURCES
        for flag in toolkit_flags("INCLUDES"):
            extension.extra_compile_args.append(flag.replace("-I", "-isystem", 1))
        extension.extra_link_args = [*extension.extra_link_args, *toolkit_flags("LIBRARIES")]
        extension.libraries += ["cudart", "torch_cuda"]
    return {
        "ext_modules": [extension],
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    license="Apache-2.0",
    cmdclass={"build_ext": build_ext_command(), "build_py": BuildPython},
    **extension_arguments(),
)
