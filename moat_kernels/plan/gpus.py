"""What the vendor's data sheets say about GPUs; dense rates, at boost clock."""

from __future__ import annotations

from dataclasses import dataclass

TERA = 10**12


@dataclass(frozen=True)
class Gpu:
    """A GPU on paper.

    architecture: compute capability as 10 * major + minor.
    memory: bytes; what is sold as 80 GB is close to 80 * 2**30 bytes.
    bandwidth: of its DRAM, bytes per second.
    peaks: FLOP per second by arithmetic (see `traffic.Pass`).
    source: the document that has the numbers.
    """

    name: str
    architecture: int
    memory: int
    bandwidth: float
    peaks: dict[str, float]
    source: str


def _gpu(
    name: str,
    architecture: int,
    gibibytes: int,
    bandwidth: float,
    rates: tuple[float, float, float, float],
    source: str,
) -> Gpu:
    """bandwidth: TB/s; rates: TFLOP/s of bfloat16 and float16 tensor cores, TF32, FP32, FP64."""
    half, tf32, single, double = (rate * TERA for rate in rates)
    peaks = {
        "bfloat16": half,
        "float16": half,
        "tf32": tf32,
        "tf32x3": tf32 / 3,
        "float32": single,
        "float64": double,
    }
    return Gpu(name, architecture, gibibytes * 2**30, bandwidth * TERA, peaks, source)


_A100 = (312, 156, 19.5, 9.7)
_HOPPER = (989.4, 494.7, 66.9, 33.5)

GPUS = {
    "a100-40": _gpu(
        *("A100 SXM 40 GB", 80, 40, 1.555, _A100), "NVIDIA A100 Tensor Core GPU data sheet"
    ),
    "a100": _gpu(
        *("A100 SXM 80 GB", 80, 80, 2.039, _A100), "NVIDIA A100 Tensor Core GPU data sheet"
    ),
    "h100": _gpu(
        *("H100 SXM 80 GB", 90, 80, 3.35, _HOPPER),
        "NVIDIA H100 Tensor Core GPU data sheet and architecture white paper",
    ),
    "h200": _gpu(
        *("H200 SXM 141 GB", 90, 141, 4.8, _HOPPER), "NVIDIA H200 Tensor Core GPU data sheet"
    ),
    "l4": _gpu(*("L4 24 GB", 89, 24, 0.3, (121, 60, 30.3, 0.49)), "NVIDIA L4 data sheet"),
    "rtx4090": _gpu(
        *("GeForce RTX 4090 24 GB", 89, 24, 1.008, (165.2, 82.6, 82.6, 1.29)),
        "NVIDIA Ada GPU architecture white paper",
    ),
}
