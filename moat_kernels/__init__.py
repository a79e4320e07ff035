"""Fast MOAT (arXiv 2210.01820) for PyTorch: the same numbers, less time, less memory.

Importing needs no compiler, GPU or extension; `python -m moat_kernels.info` tells what is usable.
"""

__version__ = "0.1.0"

from moat_kernels import functional, reference
from moat_kernels.adapters.cases import supported_cases
from moat_kernels.adapters.registry import register_adapter
from moat_kernels.freeze import freeze
from moat_kernels.frozen_modules import FrozenMOAT
from moat_kernels.fuse import FusionReport, fuse, unfuse
from moat_kernels.graphed_inference import graphed_inference
from moat_kernels.graphed_model import graphed_model
from moat_kernels.graphs import graphed_step
from moat_kernels.models import MOAT, create_model, get_preprocessing, list_models
from moat_kernels.modules import FusedMBConv, FusedMOATBlock
from moat_kernels.normalization import convert_sync_batchnorm
from moat_kernels.ops.common.backends import FallbackWarning, use_backend

__all__ = [
    "MOAT",
    "FallbackWarning",
    "FrozenMOAT",
    "FusedMBConv",
    "FusedMOATBlock",
    "FusionReport",
    "convert_sync_batchnorm",
    "create_model",
    "freeze",
    "functional",
    "fuse",
    "get_preprocessing",
    "graphed_inference",
    "graphed_model",
    "graphed_step",
    "list_models",
    "reference",
    "register_adapter",
    "supported_cases",
    "unfuse",
    "use_backend",
]
