"""Norm modules in one process, and their conversion to synchronised ones."""

from __future__ import annotations

import copy

import pytest
import torch
from support.small_model import make_model
from support.tolerances import BACKEND_OUTPUT, assert_close
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.normalization import BatchNorm2d, SyncBatchNorm, SyncBatchNormAct2d


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
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4), nn.LayerNorm(4), BatchNorm2d(4))
    kinds = [type(module) for module in mk.convert_sync_batchnorm(model)]
    assert kinds == [SyncBatchNorm, nn.SyncBatchNorm, nn.LayerNorm, SyncBatchNorm]
    assert [model[0].unbiased_running_var, model[3].unbiased_running_var] == [True, False]
    assert type(mk.convert_sync_batchnorm(nn.BatchNorm2d(4))) is SyncBatchNorm
    already = nn.SyncBatchNorm(4)
    assert mk.convert_sync_batchnorm(already) is already


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm with its activation inside, as timm's."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def test_conversion_keeps_the_activation_inside_a_norm() -> None:
    norm = BatchNormAct2d(4).double()
    converted = mk.convert_sync_batchnorm(norm)
    assert type(converted) is SyncBatchNormAct2d
    assert list(converted.state_dict()) == list(norm.state_dict())
    x = torch.randn(3, 4, 5, 6).double()
    for training in (True, False):
        expected = copy.deepcopy(norm).train(training)(x)  # the two share their buffers
        assert_close(converted.train(training)(x), expected, BACKEND_OUTPUT[torch.float64])


def test_norms_that_a_conversion_would_change_are_refused() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.BatchNorm2d(4), Doubled(4))
    with pytest.raises(TypeError, match="1 is a Doubled, whose own forward"):
        mk.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    model[1] = nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4))
    with pytest.raises(TypeError, match="1 is a ParametrizedBatchNorm2d"):
        mk.convert_sync_batchnorm(model)


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
