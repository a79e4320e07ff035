"""The native CPU kernels, for tests that need them."""

from __future__ import annotations

import pytest

from moat_kernels.extension import load_extension

needs_extension = pytest.mark.skipif(
    not load_extension().usable, reason=f"native kernels {load_extension().reason}"
)
