"""Synchronised norms inside `functional.mbconv`: four ranks equal one process on all samples."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from itertools import cycle
from unittest import mock

import pytest
import torch
from support.mbconv_cases import CASES, Case, make_parameters, run
from support.ranks import Ranks
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    BACKEND_ZERO_GRADIENT,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)
from torch import Tensor

from moat_kernels import use_backend
from moat_kernels.functional import MBConvDescription, MBConvParameters, Norm
from moat_kernels.ops.common import synchronization
from moat_kernels.ops.common.synchronization import all_reduce, combine_moments, world_name
from moat_kernels.ops.mbconv.algebra import synchronized as mbconv_synchronized
from moat_kernels.ops.mbconv.description import (
    NORMS,
)

UNEQUAL = [3, 1, 4, 2]
ONE_EMPTY = [5, 0, 2, 2]
# Names of cases that have a norm which measures the batch.
MEASURING = [
    name
    for name in CASES
    if name not in ("no norms", "frozen norms", "frozen pre_norm, no expand_norm")
]


def synchronized(description: MBConvDescription, *names: str) -> MBConvDescription:
    """`description` with the norms `names` (default: all there are) synchronised over the world."""
    return dataclasses.replace(
        description,
        **{
            name: dataclasses.replace(norm, process_group=world_name())
            for name in names or NORMS
            if (norm := getattr(description, name)) is not None
        },
    )


def run_rank(
    backend: str,
    recompute: str,
    parameters: MBConvParameters,
    description: MBConvDescription,
    dtype: torch.dtype,
    norms: tuple[str, ...],
    own: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    x, cotangent = own
    with use_backend(backend):
        return run(
            x,
            parameters,
            synchronized(description, *norms),
            dtype,
            cotangent,
            training=True,
            recompute=recompute,
        )


def check_joined(results: list[dict], expected: dict, dtype: torch.dtype = torch.float64) -> None:
    """Ranks' results against those of one process on the joined batch."""
    for name, value in expected.items():
        shares = [result[name] for result in results]
        if name in ("output", "x"):
            actual = torch.cat(shares)
        elif name.startswith("running"):
            assert all(torch.equal(share, shares[0]) for share in shares), name
            actual = shares[0]
        else:
            actual = torch.stack(shares).sum(0)
        if value.abs().max() < 1e-9:
            assert actual.abs().max() < BACKEND_ZERO_GRADIENT, name
            continue
        tolerance = (BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT)[dtype]
        assert_close(actual, value, tolerance, name)


def joined_and_ranks(
    ranks: Ranks,
    case: Case,
    sizes: list[int],
    *,
    backend: str = "torch",
    recompute: str = "auto",
    mean: float = 1.0,
    dtype: torch.dtype = torch.float64,
    norms: tuple[str, ...] = (),
) -> tuple[list[dict], dict]:
    """(what the ranks computed of their samples, what one process does of all, in float64)."""
    parameters = make_parameters(case, dtype)
    # Ranks differ in their means, as unshuffled data do.
    shift = torch.arange(4.0).repeat_interleave(torch.tensor(sizes))[:, None, None, None]
    x = (torch.randn(sum(sizes), case.in_channels, 7, 6) + shift + mean).to(dtype)
    with use_backend("reference"):
        shape = run(x, parameters, case.description, torch.float64, training=True)["output"].shape
        cotangent = torch.randn(shape).to(dtype)
        expected = run(x, parameters, case.description, torch.float64, cotangent, training=True)
    arguments = (backend, recompute, parameters, case.description, dtype, norms)
    own = list(zip(x.split(sizes), cotangent.split(sizes), strict=True))
    return ranks.run(run_rank, *arguments, each=own), expected


@pytest.mark.parametrize(
    ("name", "recompute"), list(zip(MEASURING, cycle(["none", "expand", "block"]), strict=False))
)
def test_ranks_equal_one_process_on_the_joined_batch(ranks, name: str, recompute: str) -> None:
    check_joined(*joined_and_ranks(ranks, CASES[name], UNEQUAL, recompute=recompute))


@pytest.mark.parametrize("name", MEASURING)
def test_reference_equals_one_process_on_the_joined_batch(ranks, name: str) -> None:
    check_joined(*joined_and_ranks(ranks, CASES[name], UNEQUAL, backend="reference"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["stride 1", "stride 2, pool 2, projected", "depthwise first"])
def test_a_rank_without_samples_takes_part(ranks, name: str, backend: str) -> None:
    check_joined(*joined_and_ranks(ranks, CASES[name], ONE_EMPTY, backend=backend))


@pytest.mark.parametrize("mean", [1.0, 1e3])
def test_float32_is_as_close_as_the_other_backends(ranks, mean: float) -> None:
    """Large means cancel neither within a rank nor between ranks."""
    results, expected = joined_and_ranks(
        ranks, CASES["projected shortcut"], UNEQUAL, dtype=torch.float32, mean=mean
    )
    check_joined(results, expected, torch.float32)


def test_norms_without_bessel_and_with(ranks) -> None:
    description = MBConvDescription(
        pre_norm=Norm(momentum=None),
        expand_norm=Norm(unbiased=True),
        depthwise_norm=Norm(1e-5, 1.0),
    )
    check_joined(*joined_and_ranks(ranks, Case(description), UNEQUAL))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_close_to_float64_as_stock_modules(ranks, dtype: torch.dtype) -> None:
    case = CASES["projected shortcut"]
    results, exact = joined_and_ranks(ranks, case, UNEQUAL, dtype=dtype)
    stock, _ = joined_and_ranks(ranks, case, UNEQUAL, dtype=dtype, backend="reference")
    for name, value in exact.items():
        if value.abs().max() < 1e-9:  # noise in both
            continue
        ours, theirs = (
            torch.cat([one[name] for one in shares])
            if name in ("output", "x")
            else torch.stack([one[name].double() for one in shares]).sum(0)
            for shares in (results, stock)
        )
        if name.startswith("running"):
            ours, theirs = ours / len(results), theirs / len(stock)
        allowed = LOW_PRECISION_FACTOR * relative_error(theirs, value)
        assert_close(ours, value, allowed + torch.finfo(dtype).eps, name)


def run_mixed(
    parameters: MBConvParameters, norms: tuple[str, ...], own: tuple[Tensor, Tensor]
) -> tuple[dict, dict]:
    """The torch backend and the reference, with only `norms` synchronised."""
    description = synchronized(MBConvDescription(), *norms)
    results = []
    for backend in ("torch", "reference"):
        with use_backend(backend):
            results.append(run(own[0], parameters, description, None, own[1], training=True))
    return tuple(results)


@pytest.mark.parametrize("norms", [("pre_norm",), ("expand_norm",), ("depthwise_norm",)])
def test_only_some_norms_are_synchronised(ranks, norms: tuple[str, ...]) -> None:
    own = [(torch.randn(n, 6, 7, 6).double(), torch.randn(n, 6, 7, 6).double()) for n in UNEQUAL]
    for torch_backend, reference in ranks.run(run_mixed, make_parameters(Case()), norms, each=own):
        for name, value in reference.items():
            tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
            assert_close(torch_backend[name], value, tolerance[torch.float64], name, floor=1e-3)


def shapes_reduced(
    parameters: MBConvParameters, description: MBConvDescription
) -> list[tuple[int, ...]]:
    """The shapes of a training step's all-reduces, in order."""
    seen: list[tuple[int, ...]] = []

    def recorded(tensor: Tensor, group: str) -> Tensor:
        seen.append(tuple(tensor.shape))
        return all_reduce(tensor, group)

    x = torch.randn(2, 6, 7, 6, dtype=torch.float64)
    users = (synchronization, mbconv_synchronized)
    with use_backend("torch"), ExitStack() as patches:
        for module in users:
            patches.enter_context(mock.patch.object(module, "all_reduce", recorded))
        run(x, parameters, synchronized(description), training=True)
    return seen


def test_one_all_reduce_for_the_two_norms_around_the_expand_convolution(ranks) -> None:
    seen = ranks.run(shapes_reduced, make_parameters(Case()), MBConvDescription())[0]
    channels, wide = 6, 12
    table = 4 * (1 + channels)
    assert seen == [
        (table + channels**2,),  # forward: count, mean and covariance of x
        (4 * (1 + wide) + wide,),  # forward: depthwise_norm
        (2, wide),  # backward: depthwise_norm
        (channels + 1, channels),  # backward: gradients of covariance and mean
    ]


def combine(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
    centred = rows - mean
    return combine_moments(len(rows), mean, centred.t() @ centred, world_name() or "")


def test_moments_of_ranks_far_apart_combine_without_cancellation(ranks) -> None:
    rows = [torch.randn(n, 3).double() + 1e6 + rank for rank, n in enumerate([4, 0, 1, 9])]
    joined = torch.cat(rows)
    centred = joined - joined.mean(0)
    for count, mean, scatter in ranks.run(combine, each=rows):
        assert count == 14
        torch.testing.assert_close(mean, joined.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(scatter, centred.t() @ centred, rtol=1e-9, atol=1e-9)


def test_a_group_that_is_no_name_is_refused() -> None:
    with pytest.raises(TypeError, match="process_group must be None or a group's name"):
        Norm(process_group=object())  # type: ignore[arg-type]


def test_an_unknown_group_is_named() -> None:
    rows = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"must name a group of torch\.distributed.*'nowhere'"):
        combine_moments(2, rows[0], rows[0], "nowhere")
