"""The passes with the depthwise convolution, by Triton kernels or, where built, by CUDA C++ ones.

Which of them is an entry of the launch table (launch_table.py): in the static one CUDA C++ where
an H200 has been seen to be faster with it, and what was faster in one that `python -m
moat_kernels.tune` wrote.
MOAT_KERNELS_CUDA_KERNELS overrides: "always" takes CUDA C++ wherever it covers a call, "never"
leaves it out. What the choice decides is memory traffic: only the CUDA kernels that begin with the
expand convolution keep its output, z1, on the chip.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from moat_kernels.ops.common.backends import warn_once
from moat_kernels.ops.mbconv.algebra.geometry import Stencil
from moat_kernels.ops.mbconv.triton import cuda_kernels
from moat_kernels.ops.mbconv.triton.kernels import depthwise as triton_forward
from moat_kernels.ops.mbconv.triton.kernels import depthwise_backward as triton_backward
from moat_kernels.ops.mbconv.triton.kernels.expand import expand
from moat_kernels.ops.mbconv.triton.kernels.moments import Moments, Sums, Tiles
from moat_kernels.ops.mbconv.triton.launch_table import LAUNCHES
from moat_kernels.ops.triton_support import traffic
from moat_kernels.ops.triton_support.choice import choose
from moat_kernels.ops.triton_support.launching import is_observed, tunable

ENVIRONMENT_VARIABLE = "MOAT_KERNELS_CUDA_KERNELS"
SETTINGS = ("table", "always", "never")

Result = TypeVar("Result")

# A pass's output, and its moments if they were asked for.
Measured = tuple[Tensor, Moments | None]


def setting() -> str:
    """What MOAT_KERNELS_CUDA_KERNELS says: "table" (the default), "always" or "never"."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE) or SETTINGS[0]
    if chosen not in SETTINGS:
        allowed = ", ".join(SETTINGS)
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {allowed}, got {chosen!r}")
    return chosen


@dataclass(frozen=True)
class Problem:
    """What decides who computes a call.

    like: a tensor of its dtype and device. sizes: what the launch table is asked with.
    unsupported: tells why CUDA C++ does not cover the call; empty if it does.
    """

    like: Tensor
    sizes: Sequence[int]
    unsupported: Callable[[], str]


class StencilPass(Generic[Result]):
    """A pass that Triton's kernels and CUDA C++ ones compute alike; calling it computes it.

    name: in the launch table. triton, cuda: functions of the same arguments, and so is problem.
    """

    def __init__(
        self,
        name: str,
        triton: Callable[..., Result],
        cuda: Callable[..., Result],
        problem: Callable[..., Problem],
    ) -> None:
        self.name = name
        self.triton = triton
        self.cuda = cuda
        self.problem = problem
        self.run = tunable(lambda *arguments: self._chosen(*arguments)(*arguments))

    def __call__(self, *arguments: Any) -> Result:
        return self.run(*arguments)

    def choose(self, *arguments: Any) -> Callable[..., Result]:
        """Who computes a call; while launches are tuned this pass, which chooses anew each time."""
        return self.run if is_observed() else self._chosen(*arguments)

    def is_cuda(self, *arguments: Any) -> bool:
        """Whether CUDA C++ kernels compute a call."""
        problem, chosen = self.problem(*arguments), setting()
        if chosen == "never":
            return False
        if chosen == "always":
            unsupported = problem.unsupported()
            if unsupported:
                warn_once(
                    f"mbconv: the CUDA kernels do not cover {unsupported}; falling back to Triton's"
                )
            return not unsupported
        # A choice that there is not must not be asked for: tuning would try it.
        if problem.unsupported():
            return False
        return choose(LAUNCHES, self.name, problem.like, problem.sizes).kernels == "cuda"

    def _chosen(self, *arguments: Any) -> Callable[..., Result]:
        return self.cuda if self.is_cuda(*arguments) else self.triton


def _depthwise_by_cuda(
    z: Tensor,
    affine: Tensor | None,
    activation: str,
    taps: Tensor,
    bias: Tensor | None,
    output_activation: str,
    stencil: Stencil,
    measure: bool,
) -> Measured:
    affine = None if affine is None else affine[:2]
    output, values = cuda_kernels.depthwise(
        z, affine, activation, taps, bias, output_activation, stencil, measure
    )
    reads, writes = (z, affine, taps, bias), (output, values)
    traffic.record("cuda_depthwise_forward", (), reads, writes, _stencil_flops(output), "float32")
    if values is None:
        return output, None
    whole = Tiles(len(output), 1, len(output), 1)
    return output, Moments(values, whole, len(output))


# (z, affine, activation, taps, bias, output_activation, stencil, measure) -> Measured
#
# output_activation(convolution of activation(z scale + shift) by taps, + bias) and moments.
# z: [B*H*W, E]; affine: float32 (scale, shift, ...) [., E]; taps: float32 [9, E]; bias: float32
# [E].
depthwise = StencilPass(
    "depthwise_pass",
    triton_forward.depthwise,
    _depthwise_by_cuda,
    lambda z, affine, activation, taps, bias, output_activation, stencil, measure: Problem(
        z,
        (z.shape[1], *stencil.sizes),
        lambda: cuda_kernels.unsupported(z, (activation, output_activation)),
    ),
)


def _depthwise_backward_by_cuda(
    grad: Tensor,
    z2: Tensor,
    factors: Tensor,
    z1: Tensor,
    affine: Tensor | None,
    activation: str,
    taps: Tensor,
    stencil: Stencil,
) -> tuple[Tensor, Sums]:
    affine = None if affine is None else affine[:2]
    output, sums = cuda_kernels.depthwise_backward(
        grad, z2, factors[:3], z1, affine, activation, taps, stencil
    )
    reads, flops = (grad, z2, factors, z1, affine, taps), 2 * _stencil_flops(grad)
    traffic.record("cuda_depthwise_backward", (), reads, (output, sums), flops, "float32")
    return output, Sums(sums, 0)


# (grad, z2, factors, z1, affine, activation, taps, stencil) -> (Tensor, Sums)
#
# Gradient of y1 [B*H*W, E]; and sums [P, 11, E]: of the taps, and of it, and it * z1.
# grad, z2: [B*H_out*W_out, E]; factors: float32 (a, b, c, ...) [., E] of dz2 = a grad + b z2 + c;
# z1: [B*H*W, E]; affine: float32 (scale, shift, ...) [., E]; taps: float32 [9, E].
depthwise_backward = StencilPass(
    "depthwise_backward_pass",
    triton_backward.depthwise_backward,
    _depthwise_backward_by_cuda,
    lambda grad, z2, factors, z1, affine, activation, taps, stencil: Problem(
        z1, (z1.shape[1], *stencil.sizes), lambda: cuda_kernels.unsupported(z1, (activation,))
    ),
)


def _expand_depthwise_by_triton(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    taps: Tensor,
    depthwise_bias: Tensor,
    output_activation: str,
    stencil: Stencil,
) -> Tensor:
    # Activated once on the way out rather than three times in the stencil.
    h, _ = expand(rows, weight, bias, activation, measure=False)
    convolution = (taps, depthwise_bias, output_activation, stencil, False)
    return depthwise(h, None, "identity", *convolution)[0]


def _expand_depthwise_by_cuda(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    taps: Tensor,
    depthwise_bias: Tensor,
    output_activation: str,
    stencil: Stencil,
) -> Tensor:
    convolution = (taps, depthwise_bias, output_activation, stencil)
    output = cuda_kernels.expand_depthwise(rows, weight, bias, activation, *convolution)
    reads = (rows, weight, bias, taps, depthwise_bias)
    flops = _product_flops(rows, weight) + _stencil_flops(output)
    traffic.record("cuda_expand_depthwise", (), reads, (output,), flops, _unit(rows))
    return output


# (rows, weight, bias, activation, taps, depthwise_bias, output_activation, stencil) -> Tensor
#
# `depthwise` of z = rows weight^T + bias, which nobody else needs: in evaluation.
# rows: [B*H*W, C]; weight: [E, C]; bias, depthwise_bias: float32 [E].
expand_depthwise = StencilPass(
    "expand_depthwise_pass",
    _expand_depthwise_by_triton,
    _expand_depthwise_by_cuda,
    lambda rows, weight, bias, activation, taps, depthwise_bias, output_activation, stencil: (
        Problem(
            rows,
            (*weight.shape, *stencil.sizes),
            lambda: cuda_kernels.unsupported_expand(rows, weight, (activation, output_activation)),
        )
    ),
)


def _stencil_flops(output: Tensor) -> int:
    return 2 * 9 * output.numel()


def _product_flops(rows: Tensor, weight: Tensor) -> int:
    """Pixels of halos, which are multiplied more than once, are not counted."""
    return 2 * rows.shape[0] * weight.numel()


def _unit(rows: Tensor) -> str:
    return str(rows.dtype).removeprefix("torch.")
