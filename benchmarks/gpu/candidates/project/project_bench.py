"""Backward of moat_0's project convolutions: the old kernels, and two ways with BLAS.

    old         project_weight (activation recomputed in every product), project_input
    v1          project_input also writes h = drop_path * act(y); the weight's gradient by cuBLAS
                (blocks without squeeze-excite)
    v2          grad W2 and grad^T h by cuBLAS, row kernels between them: what the tree has
    v2 ...      the same with other hints to the cache, orders, weight products

Run:  PYTHONPATH=<tree> python project_bench.py [--seconds 60]
Needs project_old/ beside it. Microseconds: events around CUDA graphs of calls over rotating
tensors, median; whole sequences as they follow each other in a step, and their pieces.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "project_old"))

import project_backward_old as old  # noqa: E402
import project_input_v1 as v1  # noqa: E402

from moat_kernels import get_preprocessing  # noqa: E402
from moat_kernels.ops.mbconv.triton.kernels import project_backward as tree  # noqa: E402
from moat_kernels.ops.mbconv.triton.launch_table import (  # noqa: E402
    GemmBlocks,
    StencilBlocks,
    sum_splits,
)
from moat_kernels.ops.triton_support import launching  # noqa: E402
from moat_kernels.ops.triton_support.choice import choosing  # noqa: E402
from moat_kernels.ops.triton_support.products import weight_gradient  # noqa: E402
from moat_kernels.variants import get_variant  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--seconds", type=float, default=60)
parser.add_argument("--model", default="moat_0")
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--rehearse", action="store_true", help="tiny, interpreted, no times")
ARGUMENTS = parser.parse_args()
REHEARSE = ARGUMENTS.rehearse
DEVICE = "cpu" if REHEARSE else "cuda"
BEGIN = time.monotonic()
LOW = torch.bfloat16


def left() -> float:
    return ARGUMENTS.seconds - (time.monotonic() - BEGIN)


def edited(name: str, *changes: tuple[str, str]):
    """The tree's kernels with changes to their text."""
    source = Path(tree.__file__).read_text()
    for before, after in changes:
        assert before in source, (name, before)
        source = source.replace(before, after)
    folder = Path(tempfile.mkdtemp())
    (folder / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# The rows that BLAS wrote last are read first.
REVERSE = ("    program = tl.program_id(0)\n",
           "    program = tl.num_programs(0) - 1 - tl.program_id(0)\n")
REVERSE_GATE = (
    "part = tl.program_id(0) // wide_blocks\n    column = (tl.program_id(0) % wide_blocks)",
    "part = (tl.num_programs(0) - 1 - tl.program_id(0)) // wide_blocks\n"
    "    column = ((tl.num_programs(0) - 1 - tl.program_id(0)) % wide_blocks)",
)
# What is not read soon leaves the cache first: z2, and dy (behind the weight's product).
HINT_Z = ("tl.load(z_ptr + offset, mask=mask, other=0.0)",
          'tl.load(z_ptr + offset, mask=mask, other=0.0, eviction_policy="evict_first")')
HINT_DY = ("tl.store(product_ptr + offset, grad_y.to(product_ptr.dtype.element_ty), mask=mask)",
           "tl.store(product_ptr + offset, grad_y.to(product_ptr.dtype.element_ty), mask=mask, "
           'eviction_policy="evict_first")')
MODULES = {
    "v2": tree,
    "v2 reversed": edited("v2_reversed", REVERSE, REVERSE_GATE),
    "v2 hints": edited("v2_hints", HINT_Z, HINT_DY),
    "v2 reversed, hints": edited("v2_reversed_hints", REVERSE, REVERSE_GATE, HINT_Z, HINT_DY),
}

TILES = [  # rows of a step, channels, rows of a program, warps, stages
    StencilBlocks(16, 64, 128, 4, 1),
    StencilBlocks(16, 64, 64, 4, 1),
    StencilBlocks(16, 64, 256, 4, 1),
    StencilBlocks(16, 64, 128, 4, 2),
    StencilBlocks(16, 128, 64, 4, 1),
    StencilBlocks(16, 128, 128, 4, 1),
    StencilBlocks(16, 128, 128, 4, 3),
    StencilBlocks(32, 64, 128, 8, 1),
    StencilBlocks(32, 128, 128, 8, 1),
    StencilBlocks(16, 256, 128, 8, 1),
]
PRODUCTS = [
    GemmBlocks(64, 64, 64, 4, 3),
    GemmBlocks(64, 128, 64, 4, 3),
    GemmBlocks(128, 64, 64, 8, 3),
    GemmBlocks(128, 128, 64, 8, 3),
    GemmBlocks(128, 128, 32, 8, 4),
]
if REHEARSE:
    TILES, PRODUCTS = TILES[::5], PRODUCTS[:1]


def text(blocks) -> str:
    if isinstance(blocks, StencilBlocks):
        return (f"{blocks.width}x{blocks.channels} of {blocks.band}, {blocks.warps} warps, "
                f"{blocks.stages} st.")
    return (f"{blocks.rows}x{blocks.columns}x{blocks.depth}, {blocks.warps} warps, "
            f"{blocks.stages} st.")


class Shape:
    def __init__(self, side: int, channels: int, gated: bool, count: int, batch: int) -> None:
        self.pixels, self.channels, self.wide = side * side, channels, 4 * channels
        self.batch, self.gated, self.count = batch, gated, count
        self.rows = batch * self.pixels
        self.name = f"{self.rows}x{channels};{self.wide}{' SE' if gated else ''}"

    def tensors(self, device: str = DEVICE) -> dict[str, torch.Tensor]:
        def random(*sizes, dtype=torch.float32):
            if device == "meta":
                return torch.empty(sizes, dtype=dtype, device=device)
            return torch.randn(sizes, device=device).to(dtype)

        made = {
            "grad": random(self.rows, self.channels, dtype=LOW),
            "z": random(self.rows, self.wide, dtype=LOW),
            "weight": random(self.channels, self.wide, dtype=LOW),
            "affine": random(5, self.wide) * 0.3,
            "drop_path": (random(self.batch) > -1).float() * 1.25,
            "gate": None, "grad_mean": None,
        }
        made["affine"][0] += 1
        if self.gated:
            made["gate"] = torch.sigmoid(random(self.batch, self.wide))
            made["grad_mean"] = random(self.batch, self.wide) * 0.1
        return made


def run_old(shape: Shape, t, blocks=None):
    gw, gb, gg = old.project_weight(t["grad"], t["z"], t["affine"], "gelu", t["drop_path"],
                                    t["gate"], t["weight"], shape.pixels, True)
    dy, sums = old.project_input(t["grad"], t["weight"], t["z"], t["affine"], "gelu",
                                 t["drop_path"], t["gate"], t["grad_mean"], shape.pixels)
    return {"dy": dy, "sums": sums, "weight": gw, "bias": gb, "gate": gg}


def run_v1(shape: Shape, t, blocks):
    v1.BLOCKS["project_input"] = blocks
    dy, sums, h = v1.project_input(t["grad"], t["weight"], t["z"], t["affine"], "gelu",
                                   t["drop_path"], None, None, shape.pixels)
    gw = weight_gradient(t["grad"], h, torch.float32)
    # Without drop path, as a stand-in for a sum with it.
    t["grad"].sum(0, dtype=torch.float32)
    return {"dy": dy, "sums": sums, "weight": gw, "bias": None, "gate": None}


def batched(parts: int):
    """The weight's gradient as products of parts of the rows, added up."""

    def product(grad, h, dtype):
        split = [side.view(parts, -1, side.shape[1]) for side in (grad, h)]
        each = torch.bmm(split[0].transpose(1, 2), split[1], out_dtype=torch.float32)
        return sum_splits(each.flatten(1)).view(each.shape[1:])

    return product


def run_v2(module, shape: Shape, t, blocks, weigh=weight_gradient):
    with choosing(lambda problem, static: blocks or static):
        arguments = (t["z"], t["affine"], "gelu", t["drop_path"])
        product = t["grad"] @ t["weight"]
        gg = None
        if shape.gated:
            gg, h = module.gate_gradient(product, *arguments, t["gate"], shape.pixels, True)
            gw = weigh(t["grad"], h, torch.float32)
            del h
        sums, h, gb = module.activation_gradient(
            product, *arguments, t["gate"], t["grad_mean"], shape.pixels, not shape.gated,
            t["grad"])
        if h is not None:
            gw = weigh(t["grad"], h, torch.float32)
        return {"dy": product, "sums": sums, "weight": gw, "bias": gb, "gate": gg}


def exact(shape: Shape, t):
    """In float64."""
    t = {name: None if value is None else value.double() for name, value in t.items()}
    by_row = lambda value: value.repeat_interleave(shape.pixels, 0)  # noqa: E731
    y = (t["z"] * t["affine"][0] + t["affine"][1]).requires_grad_()
    a = torch.nn.functional.gelu(y)
    (slope,) = torch.autograd.grad(a.sum(), y)
    a, y = a.detach(), None
    grad = t["grad"] * by_row(t["drop_path"])[:, None]
    result = {"bias": grad.sum(0)}
    product = grad @ t["weight"]
    if shape.gated:
        result["gate"] = (product * a).view(shape.batch, shape.pixels, -1).sum(1)
        gate = by_row(t["gate"])
        a *= gate
        product = product * gate + by_row(t["grad_mean"])
    result["weight"] = grad.t() @ a
    result["dy"] = product * slope
    result["sums"] = torch.stack((
        result["dy"].sum(0), (result["dy"] * (t["z"] - t["affine"][2])).sum(0)))
    return result


def errors(actual, expected) -> str:
    found = []
    for name, value in expected.items():
        got = actual.get(name)
        if got is None:
            continue
        got = got.whole() if hasattr(got, "whole") else got.double()
        scale = value.abs().max()
        found.append(f"{name} {float((got - value).abs().max() / scale):.1e}")
    return ", ".join(found)


def timed(function, sets) -> float:
    """Microseconds a call of function(tensors), in a graph over rotating tensors."""
    if REHEARSE:
        function(sets[0])
        return 0.0
    calls = [sets[index % len(sets)] for index in range(max(8, 2 * len(sets)))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensors in calls:
            function(tensors)
    times = []
    for round in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if round > 1:
            times.append(1e3 * begin.elapsed_time(end) / len(calls))
    del graph
    return statistics.median(times)


def contenders(shape: Shape):
    """(name, launch, function of tensors)"""
    found = [("old", "as the table had it", lambda t: run_old(shape, t))]
    for blocks in TILES:
        found.append(("v2", text(blocks),
                      lambda t, blocks=blocks: run_v2(tree, shape, t, blocks)))
    if not shape.gated:
        for blocks in PRODUCTS:
            found.append(("v1", text(blocks), lambda t, blocks=blocks: run_v1(shape, t, blocks)))
    for name, module in MODULES.items():
        if name != "v2":
            for blocks in TILES[:1]:
                found.append((name, text(blocks), lambda t, module=module, blocks=blocks:
                              run_v2(module, shape, t, blocks)))
    for parts in (4, 16, 64):
        found.append((f"v2, weight by bmm of {parts}", text(TILES[0]), lambda t, parts=parts:
                      run_v2(tree, shape, t, TILES[0], batched(parts))))
    return found


def compile_all(shapes) -> None:
    """All kernels at once, on meta tensors."""
    from triton.runtime._async_compile import AsyncCompileMode

    def submit(kernel, grid, arguments, options):
        kernel.warmup(*arguments, grid=grid, **options)

    run = launching._run
    launching._run = submit
    try:
        with ThreadPoolExecutor(12) as pool, AsyncCompileMode(pool):
            for shape in shapes:
                tensors = shape.tensors("meta")
                for name, launch, function in contenders(shape):
                    if "bmm" in name:
                        continue
                    try:
                        function(tensors)
                    except Exception as error:
                        print("compile:", name, launch, shape.name, repr(error)[:200])
    except Exception as error:
        print("compile:", repr(error)[:300])
    finally:
        launching._run = run


def pieces(shape: Shape, sets):
    """The parts of the old way and of v2, each alone (microseconds)."""
    weigh = {f"weight: bmm of {parts}": batched(parts) for parts in (4, 16, 64)}
    weigh["weight: mm"] = weight_gradient
    for t in sets:
        t["h"], t["product"] = torch.randn_like(t["z"]), torch.randn_like(t["z"])
    found = {
        "old project_weight + sum": lambda t: old.project_weight(
            t["grad"], t["z"], t["affine"], "gelu", t["drop_path"], t["gate"], t["weight"],
            shape.pixels, True),
        "old project_input": lambda t: old.project_input(
            t["grad"], t["weight"], t["z"], t["affine"], "gelu", t["drop_path"], t["gate"],
            t["grad_mean"], shape.pixels),
        "mm grad W": lambda t: t["grad"] @ t["weight"],
        "bias: torch.sum": lambda t: t["grad"].sum(0, dtype=torch.float32),
    }
    for name, product in weigh.items():
        found[name] = lambda t, product=product: product(t["grad"], t["h"], torch.float32)

    def activation(t, blocks, grad):
        with choosing(lambda problem, static: blocks):
            tree.activation_gradient(
                t["product"], t["z"], t["affine"], "gelu", t["drop_path"], t["gate"],
                t["grad_mean"], shape.pixels, not shape.gated, t["grad"] if grad else None)

    def gate(t, blocks):
        with choosing(lambda problem, static: blocks):
            tree.gate_gradient(t["product"], t["z"], t["affine"], "gelu", t["drop_path"],
                               t["gate"], shape.pixels, True)

    for blocks in TILES:
        found[f"activation_gradient {text(blocks)}"] = (
            lambda t, blocks=blocks: activation(t, blocks, False))
        if shape.gated:
            found[f"gate_gradient {text(blocks)}"] = lambda t, blocks=blocks: gate(t, blocks)
    found[f"activation_gradient + bias {text(TILES[0])}"] = lambda t: activation(t, TILES[0], True)
    return found


def main() -> None:
    torch.manual_seed(0)
    variant = get_variant(ARGUMENTS.model)
    size, batch = get_preprocessing(ARGUMENTS.model).resolution // 4, ARGUMENTS.batch
    shapes = []
    for stage, (width, depth) in enumerate(zip(variant.widths, variant.depths, strict=True)):
        side = size >> stage
        if REHEARSE:
            side, width = 2, 16
        shapes.append(Shape(side, width, stage < 2, depth, 16 if REHEARSE else batch))
    if REHEARSE:
        shapes = shapes[1:3]
    else:
        compile_all(shapes)
        print(torch.cuda.get_device_name(), f"compiled after {time.monotonic() - BEGIN:.1f} s",
              flush=True)
    totals: dict[tuple[str, str], list[float]] = {}
    for shape in sorted(shapes, key=lambda one: (one.gated, one.rows)):
        set_bytes = 2 * shape.rows * (shape.wide + shape.channels)
        sets = [shape.tensors() for _ in range(max(1, min(8, -(-200 * 2**20 // set_bytes))))]
        print(f"\n== {shape.name}, {shape.count} in a step ({len(sets)} sets) [{left():.0f} s left]")
        expected = exact(shape, sets[0])
        rows, seen = [], set()
        for name, launch, function in contenders(shape):
            if left() < 5:
                print("out of time")
                break
            try:
                told = ""
                if name not in seen:
                    told = errors(function(sets[0]), expected)
                    seen.add(name)
                microseconds = timed(function, sets)
                rows.append((microseconds, name, launch, told))
                totals.setdefault((name, launch), []).append(shape.count * microseconds)
            except Exception as error:
                print(f"FAILED {name} {launch}: {error!r}"[:300])
                if REHEARSE:
                    traceback.print_exc()
        del expected
        for microseconds, name, launch, told in sorted(rows):
            print(f"{microseconds:8.1f} us  {name:24} {launch:34} {told}")
        print("-- alone", flush=True)
        alone = []
        for name, function in pieces(shape, sets).items():
            if left() < 4:
                break
            try:
                alone.append((timed(function, sets), name))
            except Exception as error:
                print(f"FAILED {name}: {error!r}"[:300])
        for microseconds, name in sorted(alone):
            print(f"{microseconds:8.1f} us  {name}")
        del sets
        if not REHEARSE:
            torch.cuda.empty_cache()
    print("\n== a step, ms (all four shapes; * without those of squeeze-excite: v1 has none)")
    for key, times in sorted(totals.items(), key=lambda one: (len(one[1]), sum(one[1]))):
        mark = "" if len(times) == len(shapes) else f" * {len(times)} shapes"
        print(f"{sum(times) / 1e3:8.3f}  {key[0]:24} {key[1]}{mark}")
    print(f"{time.monotonic() - BEGIN:.1f} s")


main()
