"""Norm modules in one process, and their conversion to synchronised ones."""

from __future__ import annotations

import pytest
import torch
from support.small_model import make_model
from torch import nn

import moat_kernels as mk
from moat_kernels.normalization import BatchNorm2d, SyncBatchNorm


def test_conversion_keeps_tensors_settings_and_modes() -> None:
    model = nn.Sequential(BatchNorm2d(4, 1e-2, None, unbiased_running_var=True), BatchNorm2d(4))
    model[1].eval()
    tensors = [*model.parameters(), *model.buffers()]
    assert mk.convert_sync_batchnorm(model) is model
    assert all(type(norm) is SyncBatchNorm for norm in model)
    assert all(
        a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True)
    )
    assert [norm.unbiased_running_var for norm in model] == [True, False]
    assert [norm.training for norm in model] == [True, False]
    assert (model[0].eps, model[0].momentum) == (1e-2, None)


def test_conversion_of_norms_that_are_not_ours() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4), nn.LayerNorm(4))
    kinds = [type(module) for module in mk.convert_sync_batchnorm(model)]
    assert kinds == [nn.SyncBatchNorm, nn.SyncBatchNorm, nn.LayerNorm]
    assert type(mk.convert_sync_batchnorm(BatchNorm2d(4))) is SyncBatchNorm


def test_state_dict_is_the_same() -> None:
    model = make_model()
    names = list(model.state_dict())
    assert list(mk.convert_sync_batchnorm(model).state_dict()) == names


@pytest.mark.parametrize(
    "convert", [mk.convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm]
)
def test_a_process_alone_synchronises_with_nobody(convert) -> None:
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    expected = make_model()(x)
    assert torch.equal(convert(make_model())(x), expected)
