"""Flags for the C++ compiler."""

from __future__ import annotations

import os
import platform

COMPILE_FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"),
    *("-Wall", "-Wextra"),
]
_SANITIZERS = {
    "": [],
    # The checks of null and alignment at every vector access are left out: with them GCC takes
    # minutes per file. So is AddressSanitizer's inline code, in favour of calls.
    "address": [
        "-fsanitize=address,bounds,shift,signed-integer-overflow,integer-divide-by-zero,"
        "float-cast-overflow,return",
        "-fno-sanitize-recover=all",
        "--param=asan-instrumentation-with-call-threshold=0",
    ],
    "thread": ["-fsanitize=thread"],
}
SANITIZE: list[str] = _SANITIZERS[os.environ.get("MOAT_KERNELS_SANITIZE", "")]
if SANITIZE:
    # Line numbers for the reports; the runtime library comes from LD_PRELOAD.
    COMPILE_FLAGS += [*SANITIZE, "-g1", "-O1", "-fno-omit-frame-pointer"]

# Of each instruction set; keep in step with the checks in csrc/cpu/host/dispatch.cpp.
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    ]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16", "-mavx512vnni"]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
