"""What the vendor's data sheets say about GPUs; dense rates, at boost clock."""

from __future__ import annotations

from dataclasses import dataclass

TERA = 10**12
# Warp instructions that a multiprocessor starts a clock, one by each of its schedulers.
SCHEDULERS = 4


@dataclass(frozen=True)
class Gpu:
    """A GPU on paper.

    architecture: compute capability as 10 * major + minor.
    memory: bytes; what is sold as 80 GB is close to 80 * 2**30 bytes.
    bandwidth: of its DRAM, bytes per second.
    peaks: FLOP per second by arithmetic (see `traffic.Pass`).
    multiprocessors, clock: the latter in Hz; with them `issue_rate`.
    source: the document that has the numbers.
    """

    name: str
    architecture: int
    memory: int
    bandwidth: float
    peaks: dict[str, float]
    multiprocessors: int
    clock: float
    source: str

    @property
    def issue_rate(self) -> float:
        """Warp instructions per second, at most."""
        return self.multiprocessors * SCHEDULERS * self.clock


def _gpu(
    name: str,
    architecture: int,
    gibibytes: int,
    bandwidth: float,
    rates: tuple[float, float, float, float],
    issue: tuple[int, float],
    source: str,
) -> Gpu:
    """bandwidth: TB/s; rates: TFLOP/s of bfloat16 and float16 tensor cores, TF32, FP32, FP64.

    issue: multiprocessors, and their clock in GHz.
    """
    half, tf32, single, double = (rate * TERA for rate in rates)
    count, clock = issue[0], issue[1] * 1e9
    peaks = {
        "bfloat16": half,
        "float16": half,
        "tf32": tf32,
        "tf32x3": tf32 / 3,
        "float32": single,
        "float64": double,
    }
    return Gpu(name, architecture, gibibytes * 2**30, bandwidth * TERA, peaks, count, clock, source)


_A100 = (312, 156, 19.5, 9.7), (108, 1.41)
# The clock that gpu_results.md reckons with; the FP32 rate is that of 1.98 GHz, which an H200 may
# reach for short.
_HOPPER = (989.4, 494.7, 66.9, 33.5), (132, 1.755)

GPUS = {
    "a100-40": _gpu(
        *("A100 SXM 40 GB", 80, 40, 1.555, *_A100), "NVIDIA A100 Tensor Core GPU data sheet"
    ),
    "a100": _gpu(
        *("A100 SXM 80 GB", 80, 80, 2.039, *_A100), "NVIDIA A100 Tensor Core GPU data sheet"
    ),
    "h100": _gpu(
        *("H100 SXM 80 GB", 90, 80, 3.35, *_HOPPER),
        "NVIDIA H100 Tensor Core GPU data sheet and architecture white paper",
    ),
    "h200": _gpu(
        *("H200 SXM 141 GB", 90, 141, 4.8, *_HOPPER), "NVIDIA H200 Tensor Core GPU data sheet"
    ),
    "l4": _gpu(
        *("L4 24 GB", 89, 24, 0.3, (121, 60, 30.3, 0.49), (58, 2.04)), "NVIDIA L4 data sheet"
    ),
    "rtx4090": _gpu(
        *("GeForce RTX 4090 24 GB", 89, 24, 1.008, (165.2, 82.6, 82.6, 1.29), (128, 2.52)),
        "NVIDIA Ada GPU architecture white paper",
    ),
}
