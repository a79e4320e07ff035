"""What users import, pickles and command lines included, is still there.

Written out: a name that goes, or moves, must be taken out here, on purpose, and in CHANGELOG.md.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.peers import import_own

PUBLIC = {
    "moat_kernels": """
        MOAT FallbackWarning FrozenMOAT FusedMBConv FusedMOATBlock FusionReport __version__
        convert_sync_batchnorm create_model freeze functional fuse get_preprocessing
        graphed_inference graphed_model graphed_step list_models reference register_adapter
        supported_cases unfuse use_backend
    """,
    "moat_kernels.functional": """
        MBConvDescription MBConvParameters Norm NormParameters Pool SqueezeExcite
        WindowAttentionDescription mbconv resize_table window_attention
    """,
    "moat_kernels.reference": """
        Attention MBConvBlock MOATBlock SameConv2d SqueezeExcitation check_positive_integers
        initialize
    """,
    "moat_kernels.models": """
        MOAT create_model get_preprocessing list_models
    """,
    "moat_kernels.backbone": "Backbone endpoints",
    "moat_kernels.stem": "FusedStem Stem",
    "moat_kernels.timm": """
        default_cfgs moat_0 moat_1 moat_2 moat_3 moat_4 tiny_moat_0 tiny_moat_1 tiny_moat_2
        tiny_moat_3
    """,
    "moat_kernels.modules": """
        FusedAttention FusedInvertedBottleneck FusedMBConv FusedMOATBlock
    """,
    "moat_kernels.normalization": """
        BatchNorm2d BatchNormAct2d SyncBatchNorm SyncBatchNormAct2d convert_sync_batchnorm
        describe_norm norm_tensors
    """,
    "moat_kernels.drop_path": "DropPath",
    "moat_kernels.freeze": "freeze",
    "moat_kernels.frozen_modules": "FrozenBlock FrozenMOAT FrozenModule FrozenTransformerBlock",
    "moat_kernels.graphed_inference": "graphed_inference",
    "moat_kernels.graphed_model": "graphed_model _rebuild",
    "moat_kernels.graphs": "graphed_step",
    "moat_kernels.fuse": "FusedEntry FusionReport SkippedEntry fuse unfuse",
    "moat_kernels.adapters": """
        Adapter AttentionAdapter AttentionReading Bottleneck MBConvAdapter NotCovered
        NotCoveredInTraining read_bottleneck read_drop_path read_gate read_swin_table
        refuse_dropout
    """,
    "moat_kernels.adapters.fused": "FusedModule _rebuild",
    "moat_kernels.checkpoints": """
        CheckpointError CheckpointReport ConvertedCheckpoint TensorBundle convert_parameter
        convert_variables load_checkpoint load_safetensors load_tensorflow official_names
        save_safetensors
    """,
    "moat_kernels.checkpoints.__main__": "main",
    "moat_kernels.plan": """
        BLOCKS GPUS OPTIMIZERS PRECISIONS Gpu Step TrainingStep compiled_seconds eager_seconds
        floor_seconds graphed_seconds issue_seconds kernels largest_batch
    """,
    "moat_kernels.plan.__main__": "main",
    "moat_kernels.tune": "describe main tune",
    "moat_kernels.info": "collect format_text main",
    "moat_kernels.memory": "peak_bytes release_memory saved_bytes",
    "moat_kernels.variants": """
        Preprocessing VARIANTS Variant get_preprocessing get_variant list_models
    """,
    "moat_kernels.extension": """
        MINIMUM_TORCH ExtensionStatus build_record load_extension reason_cuda_unusable
    """,
}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_there(module: str) -> None:
    found = import_own(module)
    assert [name for name in PUBLIC[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("module", PUBLIC)
def test_what_a_module_calls_public_is_listed_here(module: str) -> None:
    exported = getattr(import_own(module), "__all__", [])
    assert set(exported) <= set(PUBLIC[module].split())


def test_everything_runs_without_extension_triton_and_compiler() -> None:
    code = """
import sys
sys.modules["triton"] = sys.modules["moat_kernels._C"] = None
import torch
import moat_kernels as mk
from moat_kernels.extension import load_extension
assert not load_extension().usable
model = mk.create_model("tiny_moat_0", num_classes=2)
x = torch.rand(1, 3, 32, 32)
model(x).sum().backward()
assert mk.fuse(mk.reference.MBConvBlock(8, 8)).fused
"""
    environment = {**os.environ, "PATH": "", "CXX": "no-such-c++"}
    environment.pop("MOAT_KERNELS_BACKEND", None)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
