"""`mbconv` as MOAT-0 launches it, compiled without a GPU: nothing spills, products on tensor cores.

The first stage (squeeze-excite, statistics by covariance) and the last (few rows per channel).
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.compile_only_driver import MULTIPROCESSORS, compile_only, nvidia_usage
from support.mbconv_launches import launch_mbconv

WITHOUT_PRODUCT = {"depthwise_kernel", "depthwise_backward_kernel", "pool_kernel"}
WITH_PRODUCT = {
    "covariance_kernel",
    "expand_kernel",
    "project_kernel",
    "project_input_kernel",
    "project_weight_kernel",
    "expand_weight_kernel",
    "expand_input_kernel",
}


@pytest.mark.parametrize("arch", [80, 90])
def test_what_mbconv_compiles_to(arch: int) -> None:
    with compile_only(arch) as launches:
        launch_mbconv(torch.bfloat16, ["moat_0"], stages=(0, 3), batches=(64,))
    assert {launch.kernel for launch in launches} == WITHOUT_PRODUCT | WITH_PRODUCT
    for launch in {launch.key: launch for launch in launches}.values():
        usage = nvidia_usage(launch, arch)
        assert usage.stack == 0, (launch.kernel, launch.options)
        assert usage.shared_memory <= MULTIPROCESSORS[arch].shared_memory_per_block, launch.kernel
        assert (usage.tensor_core_instructions > 0) == (launch.kernel in WITH_PRODUCT)
