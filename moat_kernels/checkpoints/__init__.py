"""Checkpoints: TensorFlow files, official and of Keras, .safetensors and state_dicts.

``python -m moat_kernels.checkpoints convert SOURCE DESTINATION.safetensors`` converts any of them,
``python -m moat_kernels.checkpoints list SOURCE`` prints what is in one.
"""

from __future__ import annotations

from .conversion import ConvertedCheckpoint, convert_parameter, convert_variables
from .errors import CheckpointError
from .loading import load_checkpoint, load_tensorflow
from .names import official_names
from .report import CheckpointReport
from .safetensors import load_safetensors, save_safetensors
from .tensorflow_bundle import TensorBundle

__all__ = [
    "CheckpointError",
    "CheckpointReport",
    "ConvertedCheckpoint",
    "TensorBundle",
    "convert_parameter",
    "convert_variables",
    "load_checkpoint",
    "load_safetensors",
    "load_tensorflow",
    "official_names",
    "save_safetensors",
]
