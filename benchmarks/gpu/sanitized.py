"""What runs under compute-sanitizer: the CUDA C++ kernels at small shapes."""

from __future__ import annotations

import os

import torch

from benchmarks.gpu.smoke import DTYPES, KERNELS, LEVELS, SMALL, mbconv_step
from moat_kernels.ops.mbconv.triton import passes as depthwise_passes


def main() -> None:
    os.environ[depthwise_passes.ENVIRONMENT_VARIABLE] = KERNELS["CUDA C++"]
    calls = 0
    for case, shape in SMALL.values():
        for dtype in DTYPES:
            for level in LEVELS:
                mbconv_step(case, shape, "cuda", level, dtype, "triton", dtype)
                calls += 1
    torch.cuda.synchronize()
    print(f"ran {calls} calls")


if __name__ == "__main__":
    main()
