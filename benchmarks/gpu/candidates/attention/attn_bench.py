"""Window attention: the kernels of this tree against those before (attn_old/, beside this file).

python attn_bench.py [--tree TREE] [--reps 15] [--jobs 8] [--save results.json] [--rehearse]

Compiles in --jobs processes first (the disk cache of Triton), then measures: medians of CUDA events
after a write of 256 MB, which clears the caches and lets the host get ahead. Errors: largest
difference from float64 over the largest value. A variant that fails is listed, and the next runs.
--rehearse: on the CPU by Triton's interpreter, tiny, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
parser = argparse.ArgumentParser()
parser.add_argument("--tree", default=str(HERE / "attn"))
parser.add_argument("--reps", type=int, default=15)
parser.add_argument("--jobs", type=int, default=8)
parser.add_argument("--share", type=int, default=-1, help="only compile every jobs-th variant")
parser.add_argument("--save", default="")
parser.add_argument("--rehearse", action="store_true")
arguments = parser.parse_args()
if arguments.rehearse:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [arguments.tree, str(HERE)]

import torch  # noqa: E402

import attn_old.backend as old  # noqa: E402
import moat_kernels.ops.window_attention.triton.backend as new  # noqa: E402
from moat_kernels import use_backend  # noqa: E402
from moat_kernels.functional import WindowAttentionDescription, window_attention  # noqa: E402
from moat_kernels.ops.triton_support.choice import choosing  # noqa: E402
from moat_kernels.ops.triton_support.launching import collect_compiled  # noqa: E402
from moat_kernels.ops.window_attention.triton.launch_table import AttentionBlocks  # noqa: E402

DEVICE = "cpu" if arguments.rehearse else "cuda"
DTYPE = torch.float16 if arguments.rehearse else torch.bfloat16  # interpreted, the latter is wrong
HEAD_DIM = 32
SHAPES = {
    "64x14x14, 12 heads": (64, 14, 12, None),
    "64x7x7, 24 heads": (64, 7, 24, None),
    "64x28x28 in 14x14, 12 heads": (64, 28, 12, 14),
    "256x14x14, 12 heads": (256, 14, 12, None),
}
if arguments.rehearse:
    SHAPES = {"large": (2, 9, 1, None), "small": (2, 4, 1, None), "windows": (1, 18, 1, 9)}

B = AttentionBlocks
# kernel -> [(launch, {constants of the backend})]
LARGE = {
    "forward": [
        *((B(*b), {}) for b in (
            (64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 1), (64, 32, 4, 2), (128, 64, 8, 1),
            (128, 64, 8, 2), (128, 32, 8, 1), (64, 128, 4, 1), (128, 128, 8, 1), (64, 16, 4, 1),
            (32, 64, 2, 1), (32, 32, 2, 1), (64, 64, 4, 3),
        )),
        (B(64, 64, 4, 1), {"GROUP_PROGRAMS": 1536}),
        (B(64, 64, 4, 1), {"GROUP_PROGRAMS": 10**9}),
        (B(128, 64, 8, 1), {"GROUP_PROGRAMS": 10**9}),
    ],
    "query": [(B(*b), {}) for b in (
        (64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 1), (64, 32, 4, 2), (128, 64, 8, 1),
        (128, 32, 8, 1), (32, 64, 2, 1),
    )],
    "query with sums": [
        *((B(*b), {"SUM_PROGRAMS": 264}) for b in (
            (64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 1), (64, 32, 4, 2), (64, 16, 4, 1),
            (128, 64, 8, 1), (128, 32, 8, 1),
        )),
        (B(64, 32, 4, 1), {"SUM_PROGRAMS": 132}),
        (B(64, 32, 4, 1), {"SUM_PROGRAMS": 400}),
        (B(64, 32, 4, 1), {"SUM_PROGRAMS": 528}),
        (B(64, 64, 4, 1), {"SUM_PROGRAMS": 528}),
        (B(64, 32, 4, 2), {"SUM_PROGRAMS": 528}),
    ],
    "key_value": [
        *((B(*b), {}) for b in (
            (64, 64, 4, 1), (64, 64, 4, 2), (32, 64, 4, 1), (16, 64, 4, 1), (64, 32, 4, 1),
            (64, 128, 8, 1), (32, 128, 8, 1), (32, 32, 2, 1),
        )),
        (B(64, 64, 4, 1), {"GROUP_PROGRAMS": 1536}),
        (B(64, 64, 4, 1), {"GROUP_PROGRAMS": 10**9}),
    ],
    "bias": [
        *((B(*b), {}) for b in (
            (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 1), (64, 32, 4, 2),
            (128, 64, 8, 1), (128, 64, 8, 2), (128, 128, 8, 1),
        )),
        (B(64, 64, 4, 1), {"BIAS_GRADIENT_PROGRAMS": 528}),
        (B(64, 64, 4, 2), {"BIAS_GRADIENT_PROGRAMS": 528}),
    ],
}
SMALL = {
    "forward": [
        *((B(*b), {}) for b in (
            (64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 1), (32, 64, 2, 1), (32, 32, 2, 1),
            (16, 64, 1, 1), (64, 16, 4, 1),
        )),
        (B(32, 64, 2, 1), {"GROUP_PROGRAMS": 10**9}),
    ],
    "gradient": [
        (B(64, keys, warps, stages), {"GRADIENT_PROGRAMS": programs})
        for keys, warps, stages in ((64, 4, 1), (64, 4, 2), (32, 4, 1), (64, 8, 1))
        for programs in (264, 400, 528, 1024)
    ],
}
if arguments.rehearse:
    LARGE = {kernel: variants[:1] for kernel, variants in LARGE.items()}
    SMALL = {kernel: variants[:1] for kernel, variants in SMALL.items()}


class Case:
    """Inputs of a shape, and what the old kernels make of them."""

    def __init__(self, batch: int, side: int, heads: int, window: int | None) -> None:
        torch.manual_seed(0)
        edge = window or side
        cut = None if window is None else (window, window)
        self.description = WindowAttentionDescription(heads, HEAD_DIM, cut)
        self.table = torch.randn(heads, 2 * edge - 1, 2 * edge - 1, device=DEVICE)
        shape = (batch, side, side)
        make = lambda c: torch.randn(*shape, c * heads * HEAD_DIM, device=DEVICE).to(DTYPE)  # noqa: E731
        self.qkv, self.grad = make(3), make(1)
        self.small = edge * edge <= 64
        self.large_scores = batch * (side // edge) ** 2 * heads * edge**4 > 2e8
        self.old = old.forward(self.qkv, self.table, self.description)
        # The bias is rounded alike in both passes.
        self.output, (self.log_sum_exp,) = new.forward(self.qkv, self.table, self.description)

    def exact(self) -> dict[str, torch.Tensor]:
        """float64, of as many maps as memory is friendly to; the table's gradient of all."""
        found: dict[str, list[torch.Tensor]] = {"output": [], "qkv": []}
        table = self.table.double().requires_grad_()
        for part, grad in zip(self.qkv.split(16), self.grad.split(16), strict=True):
            leaf = part.double().requires_grad_()
            with use_backend("reference"):
                output = window_attention(leaf, table, self.description)
            output.backward(grad.double())
            found["output"].append(output.detach())
            found["qkv"].append(leaf.grad)
        return {**{k: torch.cat(v) for k, v in found.items()}, "table": table.grad}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())


FLUSH = torch.empty(64 if arguments.rehearse else 2**26, dtype=torch.int32, device=DEVICE)


def microseconds(run) -> float:
    if arguments.rehearse:
        run()
        return 0.0
    run()
    events = []
    for _ in range(arguments.reps):
        FLUSH.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sorted(1e3 * s.elapsed_time(e) for s, e in events)[arguments.reps // 2]


def runner(case: Case, kernel: str):
    """(what to time, what to compare: name -> tensor) of a new kernel."""
    grad, output, lse = case.grad, case.output, case.log_sum_exp
    if kernel == "forward":
        def run():
            return {"output": new.forward(case.qkv, case.table, case.description).output}
        return run
    call = new._Call(case.qkv, case.table, case.description)
    grad_qkv = torch.empty_like(case.qkv)
    if kernel.startswith("query"):
        def run():
            with_sums = kernel != "query"
            dq, _, sums = new._query_gradient(call, grad, output, lse, grad_qkv, with_sums)
            return {"q": dq, "slabs": sums and sums.slabs, "call": call}
        return run
    if kernel == "gradient":
        def run():
            partial = new._gradient(call, grad, output, lse, True, True)
            return {"qkv": partial.qkv, "slabs": partial.slabs, "call": call}
        return run
    _, delta, _ = new._query_gradient(call, grad, output, lse, grad_qkv, False)
    if kernel == "key_value":
        def run():
            dk, dv = new._key_value_gradient(call, grad, lse, delta, grad_qkv)
            return {"k": dk, "v": dv}
        return run

    def run():
        return {"slabs": new._score_sums(call, grad, lse, delta).slabs, "call": call}
    return run


def old_runner(case: Case, kernel: str):
    grad, (output, (lse,)) = case.grad, case.old
    if kernel == "forward":
        return lambda: old.forward(case.qkv, case.table, case.description)
    call = old._Call(case.qkv, case.table, case.description)
    grad_qkv = torch.empty_like(case.qkv)
    if kernel == "gradient":
        return lambda: old._gradient(call, grad, output, lse, True, True)
    if kernel.startswith("query"):
        return lambda: old._query_gradient(call, grad, output, lse, grad_qkv)
    _, delta = old._query_gradient(call, grad, output, lse, grad_qkv)
    if kernel == "key_value":
        return lambda: old._key_value_gradient(call, grad, lse, delta, grad_qkv)
    return lambda: old._score_sums(call, grad, lse, delta)


def compare(case: Case, results: dict, exact: dict[str, torch.Tensor]) -> str:
    errors = []
    parts = exact["qkv"].unflatten(3, (3, case.description.heads, HEAD_DIM))
    call = results.pop("call", None)
    for name, value in results.items():
        if value is None:
            continue
        if name == "slabs":
            name, value = "table", new._fold_table(call, value, torch.float32)
        expected = exact[name] if name in exact else parts[:, :, :, "qkv".index(name)]
        errors.append(f"{name} {error(value, expected):.1e}")
    return ", ".join(errors)


def configured(launch: AttentionBlocks, constants: dict[str, int]) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(choosing(lambda problem, blocks: launch))
    for name, value in constants.items():
        stack.enter_context(patch.object(new, name, value))
    return stack


def describe(launch: AttentionBlocks, constants: dict[str, int]) -> str:
    text = f"{launch.queries}x{launch.keys} w{launch.warps} s{launch.stages}"
    return " ".join([text, *(f"{k.split('_')[0].lower()}={v}" for k, v in constants.items())])


def compile_share() -> None:
    index = 0
    for name in list(SHAPES)[:2]:
        case = Case(*SHAPES[name])
        for kernel, variants in (SMALL if case.small else LARGE).items():
            run = None
            for launch, constants in variants:
                index += 1
                if index % arguments.jobs != arguments.share:
                    continue
                try:
                    run = run or runner(case, kernel)
                    with configured(launch, constants):
                        run()
                except Exception as exception:
                    print("compile", kernel, launch, repr(exception)[:120], file=sys.stderr)


def whole(case: Case, backend) -> tuple[float, float]:
    """Forward alone; backward alone, with the table's gradient folded."""
    forward = microseconds(lambda: backend.forward(case.qkv, case.table, case.description))
    output, saved = case.old if backend is old else (case.output, [case.log_sum_exp])
    backward = microseconds(lambda: backend.backward(
        case.grad, case.qkv, case.table, case.description, output, saved, True))
    return forward, backward


def main() -> None:
    begin = time.perf_counter()
    if not arguments.rehearse:
        children = [
            subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--share", str(i)])
            for i in range(arguments.jobs)
        ]
        for child in children:
            try:
                child.wait(timeout=90)
            except subprocess.TimeoutExpired:
                child.kill()
        print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    rows = []
    for name, shape in SHAPES.items():
        print(f"\n== {name} ({time.perf_counter() - begin:.0f} s)", flush=True)
        case = Case(*shape)
        exact = case.exact()
        call = microseconds(lambda: new._Call(case.qkv, case.table, case.description))
        print(f"spreading the bias (part of forward and, once, of backward): {call:.1f} us")
        for kernel, variants in (SMALL if case.small else LARGE).items():
            found = []
            try:
                run = old_runner(case, kernel)
                found.append((microseconds(run), "OLD", "", ""))
            except Exception as exception:
                print(f"{kernel:16s} OLD failed: {exception!r:.150}")
            try:
                run = runner(case, kernel)
            except Exception as exception:
                print(f"{kernel:16s} failed: {exception!r:.150}")
                continue
            for launch, constants in variants:
                try:
                    with configured(launch, constants):
                        with collect_compiled() as compiled:
                            results = run()
                        kernel_of_interest = compiled[-1] if compiled else None
                        used = (
                            ""
                            if kernel_of_interest is None
                            else f"{kernel_of_interest.n_regs} reg"
                            f" {kernel_of_interest.n_spills} spilled"
                        )
                        errors = compare(case, results, exact)
                        found.append((microseconds(run), describe(launch, constants), errors, used))
                except Exception as exception:
                    print(f"{kernel:16s} {describe(launch, constants)} failed: {exception!r:.150}")
            for time_us, text, errors, used in sorted(found):
                print(f"{kernel:16s} {time_us:8.1f} us  {text:32s} {used:22s} {errors}")
                rows.append([name, kernel, text, time_us, errors, used])
        for text, backend in (("old", old), ("new, its table's launches", new)):
            try:
                forward, backward = whole(case, backend)
                print(f"whole, {text}: forward {forward:.1f} us, backward {backward:.1f} us")
                rows.append([name, "whole", text, forward, backward, ""])
            except Exception as exception:
                print(f"whole, {text}: failed: {exception!r:.200}")
        for text, backend in (("old", old), ("new", new)):
            try:
                output, saved = backend.forward(case.qkv, case.table, case.description)
                grad_qkv, grad_table = backend.backward(
                    case.grad, case.qkv, case.table, case.description, output, saved, True
                )
                print(
                    f"errors of {text}: output {error(output, exact['output']):.2e}, qkv"
                    f" {error(grad_qkv, exact['qkv']):.2e}, table"
                    f" {error(grad_table, exact['table']):.2e}",
                    flush=True,
                )
            except Exception as exception:
                print(f"errors of {text}: failed: {exception!r:.200}")
        del exact
    if arguments.save:
        Path(arguments.save).write_text(json.dumps(rows, indent=1))
    print(f"\ndone in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    with torch.no_grad() if arguments.share >= 0 else ExitStack():
        if arguments.share >= 0:
            compile_share()
        else:
            main()
