"""Build the native CPU kernels with a sanitizer and run their tests: `make sanitize`.

    python tests/sanitize.py address     AddressSanitizer and UndefinedBehaviorSanitizer
    python tests/sanitize.py thread      ThreadSanitizer

The library lies in build/sanitize-<name>, beside a copy of the package, so that the installed one
stays as it is. Needs GCC. Further arguments are pytest's.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = [
    "tests/test_freeze.py",
    "tests/test_freeze_low_precision.py",
    "tests/adapters/test_freeze_mlp.py",
    "tests/adapters/test_freeze_pooled.py",
    "tests/adapters/test_freeze_stem.py",
    "tests/ops/test_attention_half.py",
    "tests/ops/test_linear_cpu.py",
    "tests/ops/test_mbconv_cpu.py",
    "tests/ops/test_mlp_int8.py",
    "tests/ops/test_mbconv_cpu_training.py",
    "tests/ops/test_stem.py",
    "tests/ops/test_stem_training.py",
    "tests/ops/test_window_attention_cpu.py",
    "tests/ops/test_properties.py",
    "tests/ops/test_threads.py",
    "tests/ops/test_wrong_arguments.py",
]
# ThreadSanitizer looks at how threads meet, not at every shape.
SELECTION = {
    "address": "not fork and not lock",
    "thread": "(schedule or thread) and not fork and not lock",
}
RUNTIME = {
    "address": ("libasan.so", {"ASAN_OPTIONS": "detect_leaks=0"}),  # Python itself leaks at exit
    # PyTorch and its OpenMP are not instrumented, so what they do looks unsynchronised.
    "thread": ("libtsan.so", {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1"}),
}


def library_path(name: str) -> str:
    """Where GCC keeps one of its run-time libraries."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    path = subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip()
    if not os.path.isabs(path):
        raise SystemExit(f"make sanitize needs GCC with {name}; {compiler[0]} has none")
    return path


def build(sanitizer: str) -> Path:
    """Build the package with sanitized kernels; the folder that holds it."""
    base = ROOT / "build" / f"sanitize-{sanitizer}"
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(base)]
    skipped = {"MOAT_KERNELS_SKIP_CUDA": "1"}  # there is nothing in them to sanitize on a CPU
    environment = {**os.environ, **skipped, "MOAT_KERNELS_SANITIZE": sanitizer}
    subprocess.run(
        [*command, "--build-lib", str(base / "lib")], cwd=ROOT, env=environment, check=True
    )
    return base / "lib"


def run_tests(sanitizer: str, package: Path, arguments: list[str]) -> int:
    """Run the kernels' tests over the package in `package`; pytest's exit status."""
    runtime, options = RUNTIME[sanitizer]
    # libstdc++ too: its exceptions are otherwise loaded before the runtime can wrap them.
    preload = " ".join((library_path(runtime), library_path("libstdc++.so.6")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(ROOT / path) for path in KERNEL_TESTS]
    # `python -m` puts the working directory first on the path: that is the sanitized package.
    return subprocess.run(
        [*command, "-k", SELECTION[sanitizer], *arguments],
        cwd=package,
        env={**os.environ, **options, "LD_PRELOAD": preload, "OMP_NUM_THREADS": "2"},
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sanitizer", choices=sorted(RUNTIME))
    known, arguments = parser.parse_known_args()
    return run_tests(known.sanitizer, build(known.sanitizer), arguments)


if __name__ == "__main__":
    sys.exit(main())
