"""Build the source release and the wheel, and try them as a user would: `make release`.

Refused where files are changed or unknown to git, so that a release is what its commit says.

The wheel is made of the source release, so that nothing missing in it goes unnoticed, and is
installed into an environment that holds what the wheel says it needs and nothing else. Both lie in
dist/ at the end. No network is used. Where nvcc is, the wheel has the CUDA kernels, and is for
machines with and without a GPU: what it has code for is read from it. With --keep-library the
wheel's native library stays in this checkout too, which spares the tests that follow a build of
their own: they test what is released.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# Shared libraries that the kernels may need: PyTorch's, and those of any manylinux system.
LIBRARIES = {
    *("libc10.so", "libtorch.so", "libtorch_cpu.so"),
    *("libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6"),
    *("libpthread.so.0", "libdl.so.2", "librt.so.1"),
}
# What a wheel holds beside Python files and the kernels.
METADATA_FILES = {"METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE"}
USE = """
import torch
from torch import nn

import moat_kernels
from moat_kernels import FusedMOATBlock, FusionReport
from moat_kernels.adapters import Bottleneck, MBConvAdapter, read_bottleneck


class Mine(MBConvAdapter):
    implementation, class_name, children = "mine", "Block", ("expand", "depthwise", "project")

    def read(self, block: nn.Module) -> Bottleneck:
        expand, depthwise, project = (block.get_submodule(name) for name in self.children)
        return read_bottleneck(expand=expand, depthwise=depthwise, project=project)


moat_kernels.register_adapter(Mine())
torch.manual_seed(0)
model: moat_kernels.MOAT = moat_kernels.create_model("tiny_moat_0", num_classes=3)
same: moat_kernels.MOAT = moat_kernels.convert_sync_batchnorm(model)
x = torch.randn(2, 3, 64, 64)
model(x).square().mean().backward()
model.eval()
with torch.no_grad():
    with moat_kernels.use_backend("reference"):
        expected = model(x)
    error = float((model(x) - expected).abs().max() / expected.abs().max())
assert error < 1e-4, error
block = moat_kernels.reference.MOATBlock(8, 32, window_size=7)
report: FusionReport = moat_kernels.fuse(block, recompute="block")
assert isinstance(block, FusedMOATBlock), report
undone: tuple[str, ...] = moat_kernels.unfuse(block)
assert undone == tuple(entry.path for entry in report.fused)
print(f"a model trains and runs; eval against the reference: {error:.1e}")
"""


def run(*command: object, cwd: Path = ROOT) -> str:
    """Standard output of a command; its whole output where it fails."""
    result = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{command}\n{result.stdout}{result.stderr}")
    return result.stdout


def refuse_uncommitted() -> None:
    """Exit with the names of the files that are not as the last commit has them."""
    # Those of another user are trusted here, as they are by running this file.
    command = ["git", "-c", "safe.directory=*", "status", "--porcelain", "--untracked-files=all"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit("a release is made of a commit, and git is not installed") from None
    if result.returncode:
        raise SystemExit(f"a release is made of a commit, but git says: {result.stderr.strip()}")
    if result.stdout:
        raise SystemExit(
            "not released: a release is made of a commit, and these files differ from it:\n"
            f"{result.stdout}"
            "Commit, stash or ignore them. To try the packaging all the same: "
            "make release ARGS=--uncommitted"
        )


def build_source(work: Path) -> Path:
    """The source release."""
    setup = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", work]
    run(*setup, "sdist", "--dist-dir", DIST)
    (archive,) = DIST.glob("*.tar.gz")
    return archive


def build_wheel(archive: Path, work: Path) -> Path:
    """The wheel, of nothing but the source release, with CUDA kernels wherever nvcc is."""
    os.environ["MOAT_KERNELS_WITH_CUDA"] = "1"
    with tarfile.open(archive) as release:
        release.extractall(work, filter="data")
    (source,) = work.glob("moat_kernels-*/")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", DIST]
    run(sys.executable, "-m", "pip", "wheel", "-q", *options, source)
    (wheel,) = DIST.glob("*.whl")
    return wheel


def check_wheel(wheel: Path, work: Path) -> dict[str, Any]:
    """The wheel holds the package and nothing else; the record of its native kernels."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = json.loads(archive.read("moat_kernels/_build_record.json"))
        archive.extractall(work)
    native = not record["reason_not_built"]
    version = wheel.name.split("-")[1]
    expected = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("moat_kernels/**/*.py")}
    expected |= {"moat_kernels/py.typed", "moat_kernels/_build_record.json"}
    expected |= {f"moat_kernels-{version}.dist-info/{name}" for name in METADATA_FILES}
    expected |= {"moat_kernels/_C.abi3.so"} if native else set()
    if names != expected:
        raise SystemExit(f"stray or missing in {wheel.name}: {sorted(names ^ expected)}")
    tag = r"cp310-abi3-\w+" if native else "py3-none-any"
    if not re.fullmatch(rf"moat_kernels-{version}-{tag}\.whl", wheel.name):
        raise SystemExit(f"{wheel.name} has not the tag {tag}")
    if native and sys.platform == "linux":
        library = work / "moat_kernels" / "_C.abi3.so"
        check_library(library)
        if record.get("cuda_architectures"):
            check_gpu_code(library, record)
    return record


def check_library(library: Path) -> None:
    """It needs no library that a user may lack, and of Python the stable ABI's module call only."""
    needed = set(re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", library)))
    unknown = {name for name in needed if name not in LIBRARIES and not name.startswith("ld-linux")}
    if unknown:
        raise SystemExit(f"{library.name} needs {sorted(unknown)}")
    symbols = set(re.findall(r"\bU (_?Py\w+)", run("nm", "-D", library)))
    if not symbols <= {"PyModule_Create2", "PyModuleDef_Init"}:
        raise SystemExit(f"{library.name} uses {sorted(symbols)} of Python")
    # Of CUDA neither: torch may bring another version of its runtime into the same process.
    if shared := re.findall(r"\b_*(?:cuda|cu[A-Z])\w+", run("nm", "-D", library)):
        raise SystemExit(f"{library.name} shares {sorted(shared)} with CUDA's own libraries")


def check_gpu_code(library: Path, record: dict[str, Any]) -> None:
    """It has machine code and PTX for the architectures in the record, and for no others."""
    expected = {f"sm_{number}.cubin" for number in record["cuda_architectures"]}
    expected |= {f"sm_{number}.ptx" for number in record["cuda_ptx"]}
    tool = shutil.which("cuobjdump") or cuobjdump_of_triton()
    if tool is None:
        print("not checked: which GPUs the library has code for, cuobjdump is not installed")
        return
    found = set(re.findall(r"\bsm_\w+\.(?:cubin|ptx)", run(tool, "-lelf", "-lptx", library)))
    if found != expected:
        raise SystemExit(f"{library.name} has code for {sorted(found)}, not {sorted(expected)}")


def cuobjdump_of_triton() -> str | None:
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton else None
    return folders and shutil.which("cuobjdump", path=f"{folders[0]}/backends/nvidia/bin")


def keep_library(unpacked: Path, source: Path) -> None:
    """The wheel's library in this checkout, recorded as built from the release's sources."""
    released, here = unpacked / "moat_kernels", ROOT / "moat_kernels"
    record = json.loads((released / "_build_record.json").read_text())
    source_hashes = runpy.run_path(str(source / "moat_kernels" / "source_hashes.py"))
    record["sources"] = source_hashes["source_hashes"](source)
    # Not into the file that a running process may have loaded.
    (here / "_C.abi3.so").unlink(missing_ok=True)
    shutil.copyfile(released / "_C.abi3.so", here / "_C.abi3.so")
    (here / "_build_record.json").write_text(json.dumps(record, indent=2) + "\n")


def told_of_cuda(facts: dict[str, Any], record: dict[str, Any]) -> str:
    """What the installed wheel says of its CUDA kernels: those in the record, and why not used."""
    architectures = record.get("cuda_architectures", [])
    told, reason = (
        facts["extension"][key] for key in ("cuda_architectures", "reason_cuda_unusable")
    )
    if told != architectures or not (reason or facts["gpus"]):
        raise SystemExit(f"built for {architectures}, but info says: {facts['extension']}")
    return f"for {told}; here: {reason or 'usable'}"


def requirements(name: str, found: set[str]) -> set[str]:
    """The distribution called `name` and all that it needs, extras left out."""
    # Not above: `--check` runs where nothing is installed yet.
    from packaging.requirements import Requirement

    if name in found:
        return found
    found.add(name)
    for text in importlib.metadata.requires(name) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirements(requirement.name, found)
    return found


def make_bare_environment(folder: Path) -> Path:
    """A virtual environment with torch, numpy and what they need, linked; its Python."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    target = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    needed: set[str] = set()
    for name in ("torch", "numpy"):
        requirements(name, needed)
    for name in sorted(needed):
        distribution = importlib.metadata.distribution(name)
        tops = {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}
        for top in tops - {entry.name for entry in target.iterdir()}:
            (target / top).symlink_to(distribution.locate_file(top))
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--uncommitted", action="store_true", help="try a tree with changes too")
    parser.add_argument("--check", action="store_true", help="only refuse such a tree")
    parser.add_argument(
        "--keep-library", action="store_true", help="leave the wheel's library in this checkout"
    )
    arguments = parser.parse_args()
    if not arguments.uncommitted:
        refuse_uncommitted()
    if not arguments.check:
        release(arguments.keep_library)


def release(library_is_kept: bool) -> None:
    """Both archives in dist/, tried."""
    shutil.rmtree(DIST, ignore_errors=True)
    # Not below the checkout, whose own package would be found first.
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        archive = build_source(work)
        print(f"source release: {archive.name}, {archive.stat().st_size / 2**20:.1f} MiB")
        wheel = build_wheel(archive, work)
        record = check_wheel(wheel, work / "unpacked")
        native = not record["reason_not_built"]
        kernels = "with" if native else "without"
        print(
            f"wheel {kernels} native kernels: {wheel.name}, {wheel.stat().st_size / 2**20:.1f} MiB"
        )
        python = make_bare_environment(work / "environment")
        run(python, "-m", "pip", "install", "-q", "--no-index", wheel, cwd=work)
        facts = json.loads(run(python, "-m", "moat_kernels.info", "--json", cwd=work))
        if facts["extension"]["usable"] != native or facts["backends"]["cpu"]["usable"] != native:
            raise SystemExit(f"the native kernels are not usable as installed: {facts}")
        if native:
            print(f"CUDA kernels: {told_of_cuda(facts, record)}")
        versions = ", ".join(
            f"{name} {value}" for name, value in facts["versions"].items() if value
        )
        print(f"installed beside {versions}")
        script = work / "use.py"
        script.write_text(USE)
        print(run(python, script, cwd=work), end="")
        mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", work / "mypy"]
        print(
            "mypy --strict: " + run(*mypy, "--python-executable", python, script, cwd=work), end=""
        )
        if library_is_kept and native:
            keep_library(work / "unpacked", next(work.glob("moat_kernels-*/")))


if __name__ == "__main__":
    main()
