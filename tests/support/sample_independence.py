"""Whether a block with fixed statistics computes each sample of a batch by itself."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from moat_kernels import FallbackWarning, use_backend
from moat_kernels.functional import mbconv
from support.mbconv_cases import Case, copy_parameters, make_parameters, map_tensors


def check_samples_never_mix(
    backend: str,
    case: Case,
    shape: tuple[int, int, int],
    device: str = "cpu",
    **options: str,
) -> None:
    """In eval mode under autograd one pixel of sample 0 changes no bit of what the others give.

    shape: (B, H, W), at least 1 x 4 x 5.
    """
    parameters = copy_parameters(make_parameters(case, torch.float32))
    parameters = map_tensors(parameters, lambda tensor: tensor.to(device))
    x = torch.randn(shape[0], case.in_channels, *shape[1:]).to(device)

    def others() -> tuple[Tensor, Tensor]:
        """Their outputs and the gradients of their inputs."""
        leaf = x.clone().requires_grad_()
        with use_backend(backend), warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            output = mbconv(leaf, parameters, case.description, **options)
        (gradient,) = torch.autograd.grad(output.square().sum(), leaf)
        return output[1:].detach(), gradient[1:]

    expected = others()
    for value in (float("nan"), float("inf"), 1e18):
        x[0, 2, 3, 4] = value
        for name, actual, wanted in zip(("output", "gradient"), others(), expected, strict=True):
            assert torch.equal(actual, wanted), f"{name}: {value} in another sample"
