"""Kernels compiled for GPUs that are not there; the interpreter would take the kernels instead.

`pytest` runs these by tests/test_triton.py, in a process of their own; `pytest
tests/triton_compile` by itself works too.
"""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/triton_compile cannot run with TRITON_INTERPRET=1")
