"""The comparison that users ask for: whole models, a training step and inference.

bfloat16 autocast, channels_last, AdamW in one kernel, the variants' own drop path. Stock is
`moat_kernels.reference` (plain PyTorch), or timm's model as it is; every way to run stock has its
fused twin: eager, in a CUDA graph, under torch.compile.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from support.peers import import_peer
from torch import nn

import moat_kernels as mk
from benchmarks.gpu.bench import Bench, Skipped, Step
from benchmarks.gpu.journal import Row
from moat_kernels.reference import MBConvBlock

GIB = 2**30
COMPILE_SECONDS, AUTOTUNE_SECONDS = 150.0, 240.0


@dataclass(frozen=True)
class Workload:
    """A model at a resolution and batch size; training: forward, backward and AdamW."""

    model: str
    resolution: int
    batch: int
    training: bool

    def __str__(self) -> str:
        mode = "training" if self.training else "inference"
        return f"{self.model} {self.resolution} px, batch {self.batch}, {mode}"


@dataclass(frozen=True)
class Contender:
    """A way to run a model. recompute: of fused MOATs; run: "eager", "graph" (the whole step),
    "graphed_model", or torch.compile's mode; checkpointed: every stock block.
    """

    name: str
    fused: bool
    run: str = "eager"
    recompute: str = "auto"
    checkpointed: bool = False
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def compiles(self) -> bool:
        return self.run not in ("eager", "graph", "graphed_model")

    @contextlib.contextmanager
    def in_its_environment(self) -> Iterator[None]:
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


STOCK, FUSED = Contender("stock", False), Contender("fused", True)
STOCK_GRAPH = Contender("stock, CUDA graph", False, "graph")
FUSED_GRAPH = Contender("fused, CUDA graph", True, "graph")
GRAPHED_MODEL = Contender("fused, graphed_model", True, "graphed_model")
LEVELS = tuple(
    Contender(f'fused, recompute="{level}"', True, "eager", level) for level in ("expand", "block")
)
CHECKPOINTED = Contender("stock, blocks checkpointed", False, checkpointed=True)
CUDA_KERNELS = Contender(
    "fused, CUDA C++ kernels, CUDA graph",
    True,
    "graph",
    environment=(("MOAT_KERNELS_CUDA_KERNELS", "always"),),
)
TRITON_KERNELS = Contender(
    "fused, Triton kernels only, CUDA graph",
    True,
    "graph",
    environment=(("MOAT_KERNELS_CUDA_KERNELS", "never"),),
)
STOCK_COMPILED = Contender("stock, compiled", False, "default")
FUSED_COMPILED = Contender("fused, compiled", True, "default")
STOCK_AUTOTUNED = Contender("stock, compiled, max-autotune", False, "max-autotune")
EAGER = (STOCK, FUSED, STOCK_GRAPH, FUSED_GRAPH)
COMPILED = (STOCK_COMPILED, FUSED_COMPILED)

MAIN = Workload("moat_0", 224, 64, True), Workload("moat_0", 224, 64, False)
LARGE = Workload("moat_0", 224, 256, True), Workload("moat_0", 224, 256, False)
TINY = Workload("tiny_moat_0", 256, 64, True), Workload("tiny_moat_0", 256, 64, False)
TIMM = tuple(
    Workload(name, 224, 64, training)
    for name in ("coatnet_0_224", "maxvit_tiny_tf_224")
    for training in (True, False)
)
# What answers the most questions first: the time may not suffice for all.
ORDER: tuple[tuple[tuple[Workload, ...], tuple[Contender, ...]], ...] = (
    (MAIN, EAGER),
    ((MAIN[0], TINY[0]), (GRAPHED_MODEL,)),
    (MAIN[:1], (*LEVELS, CHECKPOINTED, CUDA_KERNELS, TRITON_KERNELS)),
    (MAIN, COMPILED),
    (TINY, EAGER),
    (LARGE, EAGER),
    (TIMM, EAGER),
    (TINY, COMPILED),
    (LARGE[:1], (*LEVELS, CHECKPOINTED)),
    (TIMM, COMPILED),
    (MAIN, (STOCK_AUTOTUNED,)),
    (LARGE, COMPILED),
)


def steps(bench: Bench) -> list[Step]:
    return [
        Step(f"{workload}: {contender.name}", partial(measure, bench, workload, contender), limit)
        for workload, contender, limit in pairs(bench.rehearsal)
    ]


def pairs(rehearsal: bool) -> Iterator[tuple[Workload, Contender, float]]:
    """(workload, contender, seconds after which it hangs) in the order of ORDER."""
    order = ORDER
    if rehearsal:
        tiny = Workload("rehearsed_moat", 32, 2, True), Workload("rehearsed_moat", 32, 2, False)
        others = (GRAPHED_MODEL, LEVELS[1], CHECKPOINTED)
        order = ((tiny, EAGER), (tiny[:1], others), (tiny[1:], COMPILED))
    for workloads, contenders in order:
        for workload in workloads:
            for contender in contenders:
                seconds = COMPILE_SECONDS if contender.compiles else 45.0
                if contender.run == "max-autotune":
                    seconds = AUTOTUNE_SECONDS
                yield workload, contender, seconds


def measure(bench: Bench, workload: Workload, contender: Contender) -> list[Row]:
    """Time, images per second and peak memory of a contender."""
    with contender.in_its_environment():
        step = make_step(bench, workload, contender)
        seconds = bench.time(step)
        # Tensors of a captured graph are in a pool that is not counted here.
        in_a_pool = contender.run in ("graph", "graphed_model", "max-autotune")
        peak = None if in_a_pool else bench.peak_bytes(step)
    del step
    gc.collect()
    bench.release()
    return [
        {
            "workload": str(workload),
            "contender": contender.name,
            "ms": 1e3 * seconds,
            "images/s": workload.batch / seconds,
            "peak, GiB": None if peak is None else peak / GIB,
        }
    ]


def make_step(bench: Bench, workload: Workload, contender: Contender) -> Callable[[], Any]:
    """One step of training or inference, ready to be called again and again."""
    torch.manual_seed(0)
    model = make_model(workload.model, contender).to(bench.device)
    model = model.to(memory_format=torch.channels_last).train(workload.training)
    size = (workload.batch, 3, workload.resolution, workload.resolution)
    images = torch.randn(size, device=bench.device).to(memory_format=torch.channels_last)
    if contender.run == "graphed_model":
        mk.graphed_model(model)
    forward = bench.compile(model, contender.run) if contender.compiles else model
    step = (
        training_step(bench, model, forward, images)
        if workload.training
        else inference_step(bench, forward, images)
    )
    return bench.graph(step) if contender.run == "graph" else step


def make_model(name: str, contender: Contender) -> nn.Module:
    if name == "rehearsed_moat":
        from support.small_model import make_model

        return make_model(torch.float32, fused=contender.fused, recompute=contender.recompute)
    if name in mk.list_models():
        model = mk.create_model(name, fused=contender.fused, recompute=contender.recompute)
        return checkpoint_blocks(model) if contender.checkpointed else model
    try:
        timm = import_peer("timm")
    except Exception as error:  # pytest's skip, which is raised where it is missing
        raise Skipped(f"timm cannot be imported: {error}") from error
    model = timm.create_model(name)
    if contender.fused:
        print(mk.fuse(model))
    return model


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    """Every stock block of the model checkpointed, in place."""
    from torch.utils.checkpoint import checkpoint

    for module in model.modules():
        if isinstance(module, MBConvBlock):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return model


def training_step(
    bench: Bench, model: nn.Module, forward: Callable[..., Any], images: torch.Tensor
) -> Callable[[], Any]:
    """Forward under autocast, cross entropy, backward, AdamW in one kernel."""
    on_gpu = not bench.rehearsal
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_gpu, capturable=on_gpu)
    labels = torch.randint(0, 5, (len(images),), device=bench.device)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with bench.autocast():
            loss = F.cross_entropy(forward(images).float(), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def inference_step(
    bench: Bench, forward: Callable[..., Any], images: torch.Tensor
) -> Callable[[], Any]:
    @torch.no_grad()
    def step() -> torch.Tensor:
        with bench.autocast():
            return forward(images)

    return step
