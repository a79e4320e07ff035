"""Every launch of this package's kernels in a training step, with its numbers, on meta tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor
from triton.runtime.jit import JITFunction

from moat_kernels.ops.mbconv.algebra.geometry import Stencil
from moat_kernels.ops.mbconv.triton import cuda_kernels
from moat_kernels.ops.triton_support import launching, traffic
from moat_kernels.plan import TrainingStep
from support import nvcc
from support.compile_only_driver import Launch, compiling_for, describe


@dataclass(frozen=True)
class TritonLaunch:
    """launch: what is compiled. declared: by its launcher. source: a hash."""

    launch: Launch
    grid: tuple[int, ...]
    declared: traffic.Pass
    source: str

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from others: machine code, blocks and numbers; and the hash."""
        values = self.launch.values.items()
        numbers = (f"{name}={value}" for name, value in values if isinstance(value, int))
        return (*self.launch.key, "x".join(map(str, self.grid)), " ".join(numbers), self.source)


@dataclass(frozen=True)
class CudaLaunch:
    """A stencil, or the sums of its moments, by a kernel of csrc/cuda, in bfloat16 as in training.

    numbers: of the call, as stencil_launches.cpp reads them.
    """

    file: str
    kernel: str
    numbers: tuple[int, ...]
    declared: traffic.Pass

    @property
    def source(self) -> str:
        return nvcc.source_hash(nvcc.CUDA / self.file)

    @property
    def key(self) -> tuple[str, ...]:
        return self.kernel, "", "", "", " ".join(map(str, self.numbers)), self.source


StepLaunch = TritonLaunch | CudaLaunch


def source_hash(kernel: JITFunction) -> str:
    """Of the text of a kernel, of all that it calls, and of the constants that they read."""
    texts: dict[str, str] = {}

    def visit(function: JITFunction) -> None:
        name = f"{function.fn.__module__}.{function.fn.__qualname__}"
        if name in texts:
            return
        texts[name] = function.src
        for used in function.fn.__code__.co_names:
            value = function.fn.__globals__.get(used)
            if isinstance(value, JITFunction):
                visit(value)
            elif isinstance(value, (int, float, str)) or type(value).__name__ == "constexpr":
                texts[f"{name} {used}"] = repr(value)

    visit(kernel)
    text = "\0".join(part for item in sorted(texts.items()) for part in item)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def record_step(step: TrainingStep, batch: int, cuda: bool) -> list[StepLaunch]:
    """The launches of a step, in order. cuda: whether the kernels of csrc/cuda are there."""
    recorder = _Recorder()
    # Who listens sees all launches: nothing is replayed.
    heard = launching.listening(lambda _: None)
    with compiling_for(step.architecture), heard, pytest.MonkeyPatch.context() as patch:
        # `planning` would keep launches on meta tensors from being made.
        patch.setattr(launching, "planned_architecture", lambda: None)
        patch.setattr(launching, "_run", recorder.run)
        patch.setattr(traffic, "record", recorder.declare)
        patch.setattr(cuda_kernels, "_has_kernel", lambda _: cuda)
        patch.setattr(cuda_kernels, "depthwise", recorder.forward)
        patch.setattr(cuda_kernels, "depthwise_backward", recorder.backward)
        step.trace(batch)
    return recorder.found


class _Recorder:
    """Takes the places of functions that launch and that declare a launch."""

    def __init__(self) -> None:
        self.found: list[StepLaunch] = []
        self._declared: traffic.Pass | None = None
        self._stencils: list[tuple[str, str, tuple[int, ...]]] = []
        self._record = traffic.record
        self._depthwise = cuda_kernels.depthwise
        self._depthwise_backward = cuda_kernels.depthwise_backward

    def run(
        self, kernel: Any, grid: tuple[int, ...], arguments: Any, options: dict[str, Any]
    ) -> None:
        launch = describe(kernel, grid, arguments, options)
        assert self._declared is not None
        self.found.append(TritonLaunch(launch, grid, self._declared, source_hash(kernel)))

    def declare(self, *declared: Any) -> None:
        """Of a launch of Triton's before it, of one of CUDA C++ behind it."""
        with traffic.record_passes() as passes:
            self._record(*declared)
        (self._declared,) = passes
        self._record(*declared)
        for stencil in self._stencils:
            self.found.append(CudaLaunch(*stencil, self._declared))
            # What finishes a stencil's sums declares nothing.
            self._declared = traffic.Pass("", (), (), 0, "float32")
        self._stencils.clear()

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        z, stencil, measure = arguments[0], arguments[6], arguments[7]
        numbers = _numbers(z, stencil, cuda_kernels.FORWARD_COLUMNS)
        self._stencils.append(("depthwise_forward.cu", "depthwise_forward_kernel", numbers))
        if measure:
            self._stencils.append(("reduce.cu", "finish_moments_kernel", numbers))
        return self._depthwise(*arguments)

    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        z1, stencil = arguments[3], arguments[7]
        numbers = _numbers(z1, stencil, cuda_kernels.BACKWARD_COLUMNS[stencil.stride])
        self._stencils.append(("depthwise_backward.cu", "depthwise_backward_kernel", numbers))
        return self._depthwise_backward(*arguments)


def _numbers(z: Tensor, stencil: Stencil, columns: int) -> tuple[int, ...]:
    sizes = (stencil.batch, stencil.height, stencil.width, stencil.out_height, stencil.out_width)
    placed = (stencil.stride, stencil.top, stencil.left)
    return (*sizes, *placed, z.shape[1], cuda_kernels.TARGET_BLOCKS, columns)
