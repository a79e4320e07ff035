"""Compile, without a GPU, what the sections will launch: `python -m benchmarks.gpu.prepare`.

Everything for sm_90 (H100, H200) and the Triton that is installed here: the kernels of the smoke,
of the headline's models, of pytest -m gpu, and those that tuning tries first. Launches are found by
running the sections' own code on meta tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
for _path in (ROOT / "tests", ROOT):
    sys.path.insert(0, str(_path))
ARCHITECTURE = 90
CACHE = ROOT / "build" / "gpu-cache"
ARCHIVE = ROOT / "build" / "gpu.tar.xz"
PARTS = ("smoke", "headline", "tests", "tune")


@contextlib.contextmanager
def on_paper() -> Iterator[Any]:
    """Record launches on meta tensors as if they were made on the GPU; yields them."""
    from support.compile_only_driver import record_launches

    from moat_kernels import use_backend
    from moat_kernels.ops.common.device import planning
    from moat_kernels.ops.triton_support import launching

    with record_launches(ARCHITECTURE) as launches, planning(ARCHITECTURE):
        # `launch` would skip planned launches before they are recorded.
        planned, launching.planned_architecture = launching.planned_architecture, lambda: None
        try:
            with use_backend("triton"), torch.autograd.set_multithreading_enabled(False):
                yield launches
        finally:
            launching.planned_architecture = planned


def launches_of(part: str) -> list[Any]:
    """What a part of the sections launches, each kernel once."""
    with on_paper() as launches:
        _LAUNCH[part]()
    return list(launches)


def _smoke() -> None:
    from benchmarks.gpu.smoke import cases

    for name, kernels, dtype, compute in cases(False, "meta"):
        if kernels == "Triton":
            _tolerate(name, partial(compute, "triton", dtype))


def _tolerate(name: str, function: Callable[[], Any]) -> None:
    """Launches count, results on meta tensors do not."""
    try:
        function()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


def _headline() -> None:
    from benchmarks.gpu.headline import pairs

    done = set()
    for workload, contender, _ in pairs(False):
        key = (workload.model, workload.training, contender.recompute)
        if contender.fused and key not in done:
            done.add(key)
            _tolerate(str(workload), partial(_trace, workload, contender))


def _trace(workload: Any, contender: Any) -> None:
    """A step of training, or of inference, without its optimiser."""
    from benchmarks.gpu.headline import make_model
    from moat_kernels.plan.autocast import CudaAutocast
    from moat_kernels.plan.step import _backward

    model = make_model(workload.model, contender).to("meta")
    model = model.to(memory_format=torch.channels_last).train(workload.training)
    size = (workload.batch, 3, workload.resolution, workload.resolution)
    images = torch.empty(size, device="meta").to(memory_format=torch.channels_last)
    with CudaAutocast(torch.bfloat16):
        if not workload.training:
            with torch.no_grad():
                model(images)
        else:
            _backward(model(images).float().sum())


def _tests() -> None:
    """tests/gpu, with meta tensors for its device; it fails wherever it looks at results."""
    import pytest

    class OnMeta:
        @pytest.hookimpl(tryfirst=True)
        def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
            if fixturedef.argname in ("device", "cuda"):
                fixturedef.cached_result = ("meta", fixturedef.cache_key(request), None)
                return "meta"
            return None

    pytest.main(
        ["-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:benchmark", str(ROOT / "tests/gpu")],
        plugins=[OnMeta()],
    )
    _execution()


def _execution() -> None:
    """The modules of tests/gpu/test_execution_gpu.py, which needs streams and graphs."""
    from support.backend_comparison import train_step

    import moat_kernels as mk

    modules: dict[str, Callable[[], torch.nn.Module]] = {
        "MBConv": lambda: mk.FusedMBConv(64, 64),
        "MBConv, stride 2": lambda: mk.FusedMBConv(64, 96, stride=2),
        "MBConv, expand": lambda: mk.FusedMBConv(64, 64, recompute="expand"),
        "MOAT": lambda: mk.FusedMOATBlock(64, 64, window_size=7),
    }
    for (name, make), dtype in itertools.product(modules.items(), (torch.float32, torch.bfloat16)):

        def step(make: Any = make, dtype: torch.dtype = dtype) -> None:
            x = torch.empty(4, 64, 14, 14, device="meta", dtype=dtype)
            x = x.to(memory_format=torch.channels_last)
            module = make().to("meta", dtype)
            train_step(module, x)
            with torch.no_grad():
                module.eval()(x)

        _tolerate(name, step)


def _tune() -> None:
    """moat_0's launches, their neighbours and the neighbours of these."""
    from benchmarks.gpu.headline import MAIN
    from moat_kernels import create_model, tune
    from moat_kernels.ops.triton_support.launch_table import (
        LAUNCH_TABLES,
    )
    from moat_kernels.ops.triton_support.launching import observing
    from moat_kernels.ops.triton_support.tuning import Tuner
    from moat_kernels.ops.triton_support.user_table import Entry
    from moat_kernels.plan.autocast import CudaAutocast
    from moat_kernels.plan.step import _backward

    class OnPaper(Tuner):
        """Launches all that a search of two steps may launch."""

        def _search(self, launcher: Any, problem: Any, static: Any) -> Any:
            table = self.tables[problem.op]
            near = {static, *table.neighbours(static)}
            for blocks in near.union(*map(table.neighbours, near)):
                self._run(launcher, problem, blocks)
            return Entry(problem, static, 1.0, 1.0)

    tuner = OnPaper(LAUNCH_TABLES, lambda function: 1.0, lambda entry: None)
    workload = MAIN[0]
    size = (workload.batch, 3, workload.resolution, workload.resolution)
    images = torch.empty(size, device="meta").to(memory_format=torch.channels_last)
    for level in tune.RECOMPUTE:
        with torch.device("meta"):
            model = create_model(workload.model, recompute=level)
        with observing(tuner), CudaAutocast(torch.bfloat16):
            with torch.no_grad():
                model.eval()(images)
            _backward(model.train()(images).float().sum())


_LAUNCH = {"smoke": _smoke, "headline": _headline, "tests": _tests, "tune": _tune}


def compile_part(part: str, share: int, shares: int) -> tuple[int, list[str], set[str]]:
    """Compile a share of a part's launches into CACHE.

    Returns how many, what failed, and the sources of their C launchers.
    """
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    torch.set_num_threads(1)  # threads that wait would take the other processes' cores
    from support.compile_only_driver import compiling_for

    launches = launches_of(part)
    failed, sources = [], set()
    mine = launches[share::shares]
    with compiling_for(ARCHITECTURE):
        for launch in mine:
            try:
                sources.add(launcher_source(launch.compile()))
            except Exception as error:  # too much shared memory, say: tuning leaves it out too
                failed.append(f"{launch.kernel}: {type(error).__name__}: {str(error)[:150]}")
    return len(mine), failed, sources - {""}


def launcher_source(compiled: Any) -> str:
    """The C launcher that Triton will want for a kernel; empty where it wants none (from 3.7)."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return ""
    source = compiled.src
    constants = {
        (source.fn.arg_names.index(key),) if isinstance(key, str) else key: value
        for key, value in source.constants.items()
    }
    meta = getattr(compiled.metadata, "tensordesc_meta", None)
    return driver.make_launcher(constants, dict(source.signature), meta)


def build_launchers(sources: set[str], folder: Path) -> list[tuple[str, Path]]:
    """(source, library) of each, and of Triton's driver; linked to a libcuda that stands in."""
    from triton.backends.nvidia import driver
    from triton.runtime import build

    if not sources:
        return []
    driver_source = Path(driver.dirname, "driver.c").read_text()
    stub = folder / "stub"
    stub.mkdir(parents=True)
    names = sorted(set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", "\n".join((*sources, driver_source)))))
    (stub / "stub.c").write_text("\n".join(f"int {name}(void) {{ return 100; }}" for name in names))
    subprocess.check_call(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "stub.c"],
        cwd=stub,
    )
    built = []
    for number, source in enumerate([driver_source, *sorted(sources)]):
        name = "cuda_utils" if number == 0 else "__triton_launcher"
        place = folder / str(number)
        place.mkdir()
        (place / f"{name}.c").write_text(source)
        library = build._build(
            name,
            str(place / f"{name}.c"),
            str(place),
            [driver.libdevice_dir, str(stub)],
            driver.include_dirs,
            driver.libraries,
            [],
        )
        built.append((source, Path(library)))
    return built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ARCHIVE, help="the archive")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    from benchmarks.gpu.archive import pack

    start = time.time()
    work = [(part, share, options.jobs) for part in options.parts for share in range(options.jobs)]
    sources: set[str] = set()
    with ProcessPoolExecutor(options.jobs, mp_context=_spawn()) as pool:
        for (part, *_), (count, failed, found) in zip(
            work, pool.map(compile_part, *zip(*work, strict=True)), strict=True
        ):
            sources |= found
            print(f"{part}: {count} kernels, {len(failed)} do not compile", flush=True)
            for line in failed:
                print(f"   {line}")
    with tempfile.TemporaryDirectory() as folder:
        manifest = pack(CACHE, build_launchers(sources, Path(folder)), options.output)
    size = options.output.stat().st_size / 1e6
    print(f"{options.output}: {size:.1f} MB in {time.time() - start:.0f} s, {manifest}")


def _spawn() -> Any:
    import multiprocessing

    return multiprocessing.get_context("spawn")


if __name__ == "__main__":
    main()
