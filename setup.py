"""Builds the native kernels in csrc/; everything else about the package is in pyproject.toml.

Every csrc/cpu/isa/*.cpp is compiled once per instruction set, into objects whose symbols lie in
a namespace of that instruction set; csrc/cpu/host/dispatch.cpp chooses between them at run time.

The kernels are optional: where they cannot be built, one line says why and the package installs
without them. MOAT_KERNELS_SKIP_EXT=1 leaves them out on purpose; CXX and MAX_JOBS work as usual.
MOAT_KERNELS_SANITIZE=address or =thread builds them for `make sanitize`, with GCC's
AddressSanitizer and UndefinedBehaviorSanitizer or with its ThreadSanitizer.

Where nvcc is (CUDA_HOME, or on PATH) and torch is a CUDA build, the library gets the CUDA kernels
too, for sm_80 to sm_120 or as TORCH_CUDA_ARCH_LIST says; MOAT_KERNELS_SKIP_CUDA=1 leaves them out.
MOAT_KERNELS_WITH_CUDA=1 builds them beside a CPU build of torch too: one library serves both.
"""

from __future__ import annotations

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Build frontends run this file from here, but look for modules elsewhere.
sys.path.insert(0, str(Path(__file__).parent))
from build_support import cuda, record
from build_support.environment import TORCH_TARGET_VERSION, choose_tools, reason_not_built
from build_support.flags import COMPILE_FLAGS, ISA_FLAGS, SANITIZE

SOURCES = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/host/*.cpp"))
KERNEL_SOURCES = sorted(glob("csrc/cpu/isa/*.cpp"))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/cuda/*.cuh"))
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cpp"))
CUDA_KERNEL_SOURCES = sorted(glob("csrc/cuda/*.cu"))


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
                if not cuda.reason_cuda_not_built():
                    directory = os.path.join(self.build_temp, "cuda")
                    extension.extra_objects += cuda.compile_kernels(CUDA_KERNEL_SOURCES, directory)
                super().build_extension(extension)
            except Exception as error:
                raise RuntimeError(
                    "compiling the native kernels failed (the compiler's messages are in the "
                    "output); MOAT_KERNELS_SKIP_EXT=1 installs moat_kernels without them, "
                    "MOAT_KERNELS_SKIP_CUDA=1 without those for CUDA"
                ) from error

        def run(self):
            sources = None
            if self.inplace and not reason_not_built():
                sources = record.source_hashes()  # as they are before the compiler reads them
                if record.discard_outdated(Path(self.build_temp), sources):
                    self.force = True
            super().run()
            if self.inplace:
                record.write(Path(), sources)

    return BuildKernels


class BuildPython(build_py):
    def run(self):
        super().run()
        record.write(Path() if self.editable_mode else Path(self.build_lib))


def extension_arguments() -> dict:
    """What setup() needs to build the extension; nothing where it is left out."""
    if reason_not_built():
        return {}
    from torch.utils.cpp_extension import CppExtension, include_paths

    choose_tools()
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
    if not cuda.reason_cuda_not_built():
        extension.sources += CUDA_SOURCES
        extension.depends += CUDA_KERNEL_SOURCES
        source = CUDA_KERNEL_SOURCES[0]
        for flag in cuda.toolkit_flags("INCLUDES", source):
            extension.extra_compile_args.append(flag.replace("-I", "-isystem", 1))
        libraries = cuda.toolkit_flags("LIBRARIES", source)
        extension.extra_link_args = [*extension.extra_link_args, *libraries]
        extension.libraries += cuda.LIBRARIES
    return {
        "ext_modules": [extension],
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    license="Apache-2.0",
    cmdclass={"build_ext": build_ext_command(), "build_py": BuildPython},
    **extension_arguments(),
)
