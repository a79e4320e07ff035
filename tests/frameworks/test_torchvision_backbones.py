"""A MOAT in torchvision's feature extractors."""

from __future__ import annotations

import pytest
import torch
from support.peers import import_peer
from support.small_model import make_model

extraction = import_peer("torchvision.models.feature_extraction")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("features_only", [False, True])
def test_feature_extractors(fused: bool, features_only: bool) -> None:
    """The raw outputs of blocks and stages; res() of them are what out_indices gives."""
    model = make_model(torch.float32, fused=fused, features_only=features_only, depths=(1, 2, 1, 1))
    nodes = ["stem", "stages.1.1", "stages.3"]
    extractor = extraction.create_feature_extractor(model, nodes).eval()
    x = torch.randn(2, 3, 70, 64)
    with torch.no_grad():
        expected = model.eval().forward_stages(x)
        found = extractor(x)
    assert list(found) == nodes
    for map_found, level in zip(found.values(), (0, 2, 4), strict=True):
        assert torch.allclose(map_found, expected[level], atol=1e-6)
    # Of another size: nothing of the first one's padding and windows is in the graph.
    x = torch.randn(1, 3, 33, 48)
    with torch.no_grad():
        assert torch.allclose(extractor(x)["stages.3"], model.forward_features(x), atol=1e-6)
    extractor.train()(x)["stages.3"].sum().backward()
    assert extractor.stem.conv_0.weight.grad.abs().sum() > 0
