"""The native ops' schemas have the names of the tuples that Python passes, in their order.

Arguments are passed by position, so a field that moved on one side only would be read as another.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch
from support import native_calls
from support.wrong_arguments import with_fields

from moat_kernels.extension import load_extension
from moat_kernels.functional import MBConvDescription, MBConvParameters, NormParameters
from moat_kernels.ops.attention_half import cpu as attention_half
from moat_kernels.ops.mbconv.cpu.arguments import (
    BLOCK_TENSORS,
    BlockPadding,
    BlockSettings,
    TrainSettings,
    block_tensors,
    bottleneck_tensors,
    eval_settings,
)
from moat_kernels.ops.mbconv.triton import cuda_kernels

native = pytest.mark.skipif(
    not load_extension().usable, reason=f"native kernels {load_extension().reason}"
)
BOTTLENECK_TENSORS = BLOCK_TENSORS[: BLOCK_TENSORS.index("project_norm_weight")]
TRAINING = (*BOTTLENECK_TENSORS, *TrainSettings._fields)
STEM = (
    *("conv_0_weight", "conv_0_bias"),
    *(f"norm_0_{part}" for part in NormParameters._fields[:4]),
    *("conv_1_weight", "conv_1_bias"),
)
ATTENTION_HALF = (
    *("norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias"),
    "position_table",
)
# Of `frozen.Quantizations`: two of a scale and a zero.
QUANTIZATIONS = ("first_scale", "first_zero", "second_scale", "second_zero")
ARGUMENTS = {
    "cpu_mbconv_eval": (
        *("x", *BLOCK_TENSORS, "drop_path_scale"),
        *(*BlockSettings._fields, *BlockPadding._fields, "dtype"),
    ),
    "cpu_freeze_mbconv": (*BLOCK_TENSORS, *BlockSettings._fields, "dtype", *QUANTIZATIONS),
    "cpu_freeze_for_maps": (
        *("step", "channels", "height", "width", *BlockPadding._fields),
        *("window_height", "window_width", "position_table"),
    ),
    "cpu_mbconv_train_front": ("x", "statistics", "keep_z1", *TRAINING),
    "cpu_mbconv_train_pool": ("z2", "statistics", *TRAINING),
    "cpu_mbconv_train_project": (
        *("z2", "statistics", "gate", "drop_path_scale", "addend", "dtype"),
        *TRAINING,
    ),
    "cpu_mbconv_train_backward_gated": (
        *("grad", "z2", "statistics", "gate", "drop_path_scale"),
        *TRAINING,
    ),
    "cpu_mbconv_train_backward": (
        *("grad", "x", "z1", "z2", "gated_gradient", "gate", "grad_mean", "statistics"),
        *("drop_path_scale", "addend", "needs_input"),
        *TRAINING,
    ),
    "cpu_stem_eval": ("x", *STEM, "eps"),
    "cpu_freeze_stem": (*STEM, "activation", "symmetric", "eps", "dtype"),
    "cpu_attention_half_eval": (
        "y",
        *ATTENTION_HALF,
        *attention_half.Settings._fields,
        "eps",
    ),
    "cpu_freeze_attention_half": (
        *(*ATTENTION_HALF, "heads", "head_dim", "scale", "eps", "grid", "dtype"),
        *QUANTIZATIONS,
    ),
    "cpu_freeze_pooled_half": (
        *(*ATTENTION_HALF, "shortcut_weight", "shortcut_bias", "heads", "head_dim", "scale"),
        *("eps", *(name for name in BlockSettings._fields if name.startswith("pool_")), "dtype"),
    ),
    "cpu_freeze_mlp": (
        *("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
        *("activation", "eps", "dtype", *QUANTIZATIONS),
    ),
    "cpu_freeze_head": ("norm_weight", "norm_bias", "head_weight", "head_bias", "eps"),
}
TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def arguments_of(op: str) -> list[torch.Argument]:
    return list(getattr(torch.ops.moat_kernels, op).default._schema.arguments)


@native
@pytest.mark.parametrize("op", ARGUMENTS)
def test_arguments_have_the_names_of_the_fields(op: str) -> None:
    assert [argument.name for argument in arguments_of(op)] == list(ARGUMENTS[op])


@native
def test_no_native_op_reads_its_settings_by_number() -> None:
    """Lists are of tensors and of steps, whatever their number."""
    lists = {
        (name.removeprefix("moat_kernels::"), argument.name)
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("moat_kernels::cpu_")
        for argument in arguments_of(name.removeprefix("moat_kernels::"))
        if str(argument.type).startswith("List")
    }
    assert lists == {("cpu_frozen_forward", "packed"), ("cpu_frozen_forward", "kept")}


@native
def test_settings_have_the_types_of_the_schema() -> None:
    settings = (*BlockSettings._fields, *BlockPadding._fields)
    given = dict(zip(settings, eval_settings(MBConvDescription(), 8, 6), strict=True))
    for argument in arguments_of("cpu_mbconv_eval"):
        if argument.name in given:
            assert type(given[argument.name]) is TYPES[str(argument.type)], argument.name


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_calls_leave_no_memory_behind() -> None:
    """The conversion of texts that comes with PyTorch 2.13 leaks each: here 4 MB."""
    arguments = native_calls.mbconv_eval_arguments()
    call = with_fields(torch.ops.moat_kernels.cpu_mbconv_eval.default)
    for _ in range(3000):
        call(*arguments)
    before = resident_bytes()
    for _ in range(20_000):
        call(*arguments)
    assert resident_bytes() - before < 1 << 20


def test_tensors_are_in_the_order_of_their_names() -> None:
    def norm(first: int) -> NormParameters:
        return NormParameters(*torch.arange(first, first + 4).float()[:, None].unbind())

    named = {name: torch.full((1,), float(i)) for i, name in enumerate(BLOCK_TENSORS)}
    fields = {
        name: named[name] if name in named else norm(BLOCK_TENSORS.index(f"{name}_weight"))
        for name in MBConvParameters._fields
    }
    given = block_tensors(MBConvParameters(**fields))
    assert [float(tensor) for tensor in given] == list(range(len(BLOCK_TENSORS)))
    assert len(bottleneck_tensors(MBConvParameters(**fields))) == len(BOTTLENECK_TENSORS)


@pytest.mark.parametrize(
    "op",
    [
        *("cuda_depthwise_forward", "cuda_depthwise_backward"),
        "cuda_expand_depthwise",
    ],
)
def test_the_cuda_ops_take_the_fields_of_the_geometry(op: str) -> None:
    names = [argument.name for argument in arguments_of(op)]
    first = names.index(cuda_kernels.Geometry._fields[0])
    assert names[first : first + 5] == list(cuda_kernels.Geometry._fields)
    assert not any(str(argument.type).startswith("List") for argument in arguments_of(op))
