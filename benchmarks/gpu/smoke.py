"""Every kernel, dtype and recompute level at a small and a MOAT shape against float64.

Uninitialised memory is NaN, so that unwritten elements show, and every step runs three times, the
last time replayed: the bits must be the same. A step reports how far it is from float64, and how
far stock operations in the same dtype are.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from support.backend_comparison import Results, check
from support.mbconv_cases import Case, make_parameters, map_tensors
from support.mbconv_cases import run as run_mbconv
from support.tolerances import FOLDED_ROUNDING, LOW_PRECISION_ROUNDING, relative_error
from torch import Tensor

from benchmarks.gpu.bench import Bench, Skipped, Step, poisoned_memory
from benchmarks.gpu.journal import Row
from moat_kernels import FallbackWarning, use_backend
from moat_kernels.extension import reason_cuda_unusable
from moat_kernels.functional import (
    MBConvDescription,
    Pool,
    SqueezeExcite,
    WindowAttentionDescription,
    window_attention,
)
from moat_kernels.ops.layer_norm import branch_layer_norm
from moat_kernels.ops.mbconv.triton import passes as depthwise_passes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = ("none", "expand", "block")
KERNELS = {"Triton": "never", "CUDA C++": "always"}

GATED = MBConvDescription(squeeze_excite=SqueezeExcite())
STRIDED = MBConvDescription(stride=2, pool=Pool(), squeeze_excite=SqueezeExcite())
SMALL = {
    "8 channels": (Case(MBConvDescription(), 8, 16, 8), (2, 8, 9)),
    "stride 2, SE": (Case(STRIDED, 8, 16, 16, shortcut_conv=True), (2, 8, 9)),
}
REHEARSED = "stride 2, SE"
MOAT = {
    "56x56x96, SE": (Case(GATED, 96, 384, 96), (2, 56, 56)),
    "112x112x64 to 96, stride 2, SE": (
        Case(STRIDED, 64, 384, 96, shortcut_conv=True),
        (2, 112, 112),
    ),
    "14x14x384": (Case(MBConvDescription(), 384, 1536, 384), (32, 14, 14)),
}
SMALL_MAPS = {"4x5x32": ((2, 4, 5), WindowAttentionDescription(2, 16))}
MOAT_MAPS = {
    "14x14x384": ((4, 14, 14), WindowAttentionDescription(12, 32)),
    "28x28x192 in 7x7": ((2, 28, 28), WindowAttentionDescription(6, 32, (7, 7))),
}
SMALL_ROWS, MOAT_ROWS = {"5 rows of 40": (5, 40)}, {"3136 rows of 384": (3136, 384)}

# Results by the backend named and in the dtype named.
Compute = Callable[[str, torch.dtype], Results]


def steps(bench: Bench) -> list[Step]:
    return [
        Step(name, partial(compare, bench, name, kernels, dtype, compute))
        for name, kernels, dtype, compute in cases(bench.rehearsal, bench.device)
    ]


def cases(small: bool, device: str) -> Iterator[tuple[str, str, torch.dtype, Compute]]:
    """(name, kernels, dtype, function) of every comparison; small: few, and no shape of MOAT's."""
    blocks = {REHEARSED: SMALL[REHEARSED]} if small else {**SMALL, **MOAT}
    maps = SMALL_MAPS if small else {**SMALL_MAPS, **MOAT_MAPS}
    rows = SMALL_ROWS if small else {**SMALL_ROWS, **MOAT_ROWS}
    for shape, (map_shape, description) in maps.items():
        for dtype in DTYPES:
            compute = partial(attention_step, map_shape, description, device, dtype)
            yield f"attention {shape}, {spell(dtype)}", "Triton", dtype, compute
    for shape, size in rows.items():
        for dtype in DTYPES:
            compute = partial(layer_norm_step, size, device, dtype)
            yield f"layer norm, {shape}, {spell(dtype)}", "Triton", dtype, compute
    dtypes, levels = (DTYPES[1:2], LEVELS[:1]) if small else (DTYPES, LEVELS)
    for kernels, (shape, (case, map_shape)), dtype in itertools.product(
        KERNELS, blocks.items(), dtypes
    ):
        for level in (*levels, "eval"):
            compute = partial(mbconv_step, case, map_shape, device, level, dtype)
            yield f"mbconv {shape}, {spell(dtype)}, {level}, {kernels}", kernels, dtype, compute


def spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(
    bench: Bench, name: str, kernels: str, dtype: torch.dtype, compute: Compute
) -> list[Row]:
    """Run by the kernels (as it is, recorded, replayed), by stock operations and in float64."""
    if kernels == "CUDA C++" and (bench.rehearsal or reason_cuda_unusable()):
        raise Skipped("CUDA C++ kernels need a GPU, and a library that was built with them")
    os.environ[depthwise_passes.ENVIRONMENT_VARIABLE] = KERNELS[kernels]
    with poisoned_memory(), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        warnings.filterwarnings("ignore", ".*falling back to Triton's", FallbackWarning)
        warnings.filterwarnings("ignore", ".*deterministic.*", UserWarning)
        first, *others = (compute("triton", dtype) for _ in range(3))
        stock, exact = compute("reference", dtype), compute("reference", torch.float64)
    differing = [
        key for key in first if not all(torch.equal(first[key], other[key]) for other in others)
    ]
    worst = max(exact, key=lambda key: _excess(first, stock, exact, key))
    row = {
        "case": name,
        "worst": worst,
        "error": relative_error(first[worst], exact[worst]),
        "of stock": relative_error(stock[worst], exact[worst]),
        "not the same twice": ", ".join(differing),
    }
    print(row, flush=True)
    check(first, stock, exact, dtype, FOLDED_ROUNDING if "eval" in name else LOW_PRECISION_ROUNDING)
    if differing:
        raise AssertionError(f"runs differ in {', '.join(differing)}")
    return [row]


def _excess(fused: Results, stock: Results, exact: Results, name: str) -> float:
    if exact[name].abs().max() < 1e-9:
        return 0.0
    ours, theirs = (relative_error(results[name], exact[name]) for results in (fused, stock))
    return ours / max(theirs, 1e-7)


def mbconv_step(
    case: Case,
    shape: tuple[int, ...],
    device: str,
    level: str,
    dtype: torch.dtype,
    backend: str,
    precision: torch.dtype,
) -> Results:
    """Output, gradients and running statistics of an inverted bottleneck."""
    torch.manual_seed(0)

    def exactly(tensor: Tensor) -> Tensor:
        """In float64, with values that the dtype holds: only the computation is judged."""
        return tensor.to(device, dtype).double() if tensor.is_floating_point() else tensor

    parameters = map_tensors(make_parameters(case), exactly)
    x = exactly(torch.randn(shape[0], case.in_channels, *shape[1:]))
    options = {"training": level != "eval", "recompute": "block" if level == "eval" else level}
    with use_backend(backend):
        return run_mbconv(x, parameters, case.description, precision, **options)


def attention_step(
    shape: tuple[int, ...],
    description: WindowAttentionDescription,
    device: str,
    dtype: torch.dtype,
    backend: str,
    precision: torch.dtype,
) -> Results:
    torch.manual_seed(0)
    channels = description.heads * description.head_dim
    height, width = description.window_for(*shape[1:])
    leaves = {
        "qkv": torch.randn(*shape, 3 * channels),
        "table": torch.randn(description.heads, 2 * height - 1, 2 * width - 1),
    }
    copies = _leaves(leaves, device, dtype, precision)
    with use_backend(backend):
        output = window_attention(copies["qkv"], copies["table"], description)
    return _gradients(output, copies, device, dtype)


def layer_norm_step(
    size: tuple[int, int], device: str, dtype: torch.dtype, backend: str, precision: torch.dtype
) -> Results:
    torch.manual_seed(0)
    leaves = {"x": 3 * torch.randn(1, 1, *size), "weight": torch.randn(size[1])}
    leaves["bias"] = torch.randn(size[1])
    copies = _leaves(leaves, device, dtype, precision)
    with use_backend(backend):
        output, _ = branch_layer_norm(copies["x"], copies["weight"], copies["bias"], 1e-5)
    return _gradients(output, copies, device, dtype)


def _leaves(
    tensors: dict[str, Tensor], device: str, dtype: torch.dtype, precision: torch.dtype
) -> dict[str, Tensor]:
    """In `precision`, with values that `dtype` holds."""
    return {
        name: tensor.to(device, dtype).to(precision, copy=True).requires_grad_()
        for name, tensor in tensors.items()
    }


def _gradients(
    output: Tensor, leaves: dict[str, Tensor], device: str, dtype: torch.dtype
) -> Results:
    cotangent = torch.randn(output.shape).to(device, dtype).to(output)
    output.backward(cotangent)
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
