"""Inverted bottlenecks in 16 bits on channels whose mean is far from 0, against stock modules.

x and the weights are values that the 16-bit dtype holds exactly, so that only the computation is
judged; norms are in float32.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moat_kernels import FallbackWarning, use_backend
from moat_kernels.functional import MBConvDescription, MBConvParameters, Norm
from support.mbconv_cases import Case, make_parameters, map_tensors, run
from support.tolerances import (
    FOLDED_ROUNDING,
    LOW_PRECISION_FACTOR,
    MEASURED_MOMENTS,
    relative_error,
)

# Mean and standard deviation of every channel of x.
INPUTS = [(0.0, 1.0), (10.0, 1.0), (10.0, 0.1)]
PRECISIONS = [
    pytest.param(torch.bfloat16, False, id="bfloat16"),
    pytest.param(torch.float16, False, id="float16"),
    pytest.param(torch.bfloat16, True, id="autocast"),
]
_BATCH = Norm(momentum=1.0)  # the running statistics become the batch's
_DESCRIPTION = MBConvDescription(pre_norm=_BATCH, expand_norm=_BATCH, residual=False)


@dataclass
class Comparison:
    """x [B, C, H, W] by a backend and by stock modules in `dtype`, or under its autocast."""

    backend: str
    dtype: torch.dtype
    autocast: bool
    device: str = "cpu"

    def check_running_statistics(
        self, x: Tensor, wide_channels: int, rounded_variance: bool = False
    ) -> None:
        """After a training step: pre_norm's as good as stock's, expand_norm's but for rounding.

        rounded_variance: whether that of pre_norm, too, is allowed one rounding to `dtype`.
        """
        exact, stock, fused = self._results(x, wide_channels, training=True)
        rounded = {"running 2", "running 3"} | ({"running 1"} if rounded_variance else set())
        for mean, variance in (("running 0", "running 1"), ("running 2", "running 3")):
            for name, unit in ((mean, exact[variance].sqrt()), (variance, exact[variance])):
                errors = [(each[name] - exact[name]).abs() / unit for each in (fused, stock)]
                error, allowed = (float(each.max()) for each in errors)
                allowed = LOW_PRECISION_FACTOR * allowed + MEASURED_MOMENTS
                if name in rounded:
                    allowed += torch.finfo(self.dtype).eps
                assert error <= allowed, name

    def check_fixed_statistics(self, x: Tensor, wide_channels: int) -> None:
        """Output and gradients in eval mode."""
        exact, stock, fused = self._results(x, wide_channels, training=False)
        for name, value in exact.items():
            allowed = LOW_PRECISION_FACTOR * relative_error(stock[name], value)
            allowed += FOLDED_ROUNDING * torch.finfo(self.dtype).eps
            assert relative_error(fused[name], value) <= allowed, name

    def _results(
        self, x: Tensor, wide_channels: int, training: bool
    ) -> tuple[dict[str, Tensor], ...]:
        """In float64, by stock modules, by the backend."""
        case = Case(_DESCRIPTION, x.shape[1], wide_channels, x.shape[1])
        x = x.to(self.dtype).float()
        exact = map_tensors(
            make_parameters(case, torch.float32),
            lambda t: t.to(self.device, self.dtype if t.is_floating_point() else None).float(),
        )
        statistics = torch.var_mean(x, (0, 2, 3))
        norm = exact.pre_norm._replace(running_mean=statistics[1], running_var=statistics[0])
        exact = exact._replace(pre_norm=norm)
        low = exact if self.autocast else _cast_convolutions(exact, self.dtype)
        low_x = x if self.autocast else x.to(self.dtype)
        context = (
            torch.autocast(self.device, self.dtype) if self.autocast else contextlib.nullcontext()
        )
        options = {"training": training}
        with use_backend("reference"):
            wide = map_tensors(exact, lambda t: t.double())
            results = [run(x.double(), wide, _DESCRIPTION, **options)]
        for backend in ("reference", self.backend):
            with context, use_backend(backend), warnings.catch_warnings():
                warnings.simplefilter("error", FallbackWarning)
                results.append(run(low_x, low, _DESCRIPTION, **options))
        return tuple(results)


def _cast_convolutions(parameters: MBConvParameters, dtype: torch.dtype) -> MBConvParameters:
    fields = parameters._asdict()
    cast = {name: t.to(dtype) for name, t in fields.items() if isinstance(t, Tensor)}
    return MBConvParameters(**{**fields, **cast})
