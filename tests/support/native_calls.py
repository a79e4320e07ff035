"""Every native op of the CPU with valid arguments, for `support.wrong_arguments`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.functional import (
    MBConvDescription,
    MBConvParameters,
    Norm,
    NormParameters,
    Pool,
    SqueezeExcite,
    WindowAttentionDescription,
)
from moat_kernels.ops.mbconv import reference as mbconv_reference
from moat_kernels.ops.mbconv.cpu.arguments import (
    BLOCK_TENSORS,
    BlockPadding,
    BlockSettings,
    TrainSettings,
)
from moat_kernels.ops.mbconv.description import (
    NORMS,
)
from moat_kernels.ops.window_attention import reference as attention_reference
from moat_kernels.ops.window_attention.algebra.position_bias import resize_table
from support.wrong_arguments import Call, exact, in_float64, with_fields

OPS = torch.ops.moat_kernels
# These take no tensor.
WITHOUT_TENSORS = ("cpu_isa", "cpu_multiplies", "cpu_release_memory", "cpu_release_scratch")
EPS = 1e-3
# The dtype of a frozen step, and no quantisation.
IN_FLOAT32 = (torch.float32, 0.0, 0.0, 0.0, 0.0)


def randn(*sizes: int) -> Tensor:
    return exact(torch.randn(sizes))


def positive(*sizes: int) -> Tensor:
    return exact(torch.rand(sizes) + 0.5)


def norm(channels: int) -> list[Tensor]:
    """Weight, bias, running mean and variance."""
    return [randn(channels), randn(channels), randn(channels), positive(channels)]


def linear_calls() -> list[Call]:
    x, weight, bias, grad = randn(3, 5, 32), randn(48, 32), randn(48), randn(3, 5, 48)
    needs = [torch.float32, True, True]
    return [
        Call("cpu_linear_forward", OPS.cpu_linear_forward, [x, weight, bias], F.linear),
        Call("cpu_linear_backward", OPS.cpu_linear_backward, [grad, x, weight, *needs]),
    ]


def window_attention_calls() -> list[Call]:
    heads, head_dim = 2, 8
    qkv, table = randn(2, 5, 6, 48), randn(heads, 5, 7)
    settings = [heads, head_dim, 3, 4, 0.25, False, False]

    def reference(qkv: Tensor, table: Tensor, *settings: Any) -> list[Tensor | None]:
        heads, head_dim, height, width, scale, heads_first, grid = settings
        description = WindowAttentionDescription(
            heads,
            head_dim,
            (height, width),
            scale,
            "heads_qkv" if heads_first else "qkv_heads",
            "grid" if grid else "window",
        )
        return [attention_reference.window_attention(qkv, table, description), None]

    forward, backward = OPS.cpu_window_attention_forward, OPS.cpu_window_attention_backward
    output, log_sum_exp = forward(qkv, table, *settings)
    arguments = [randn(2, 5, 6, 16), qkv, table, output, log_sum_exp, *settings, True]
    return [
        Call("cpu_window_attention_forward", forward, [qkv, table, *settings], reference),
        Call("cpu_window_attention_backward", backward, arguments),
    ]


def stem_reference(x: Tensor, tensors: list[Tensor | None], eps: float) -> Tensor:
    first, first_bias, weight, bias, mean, variance, second, second_bias = tensors

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        if weight.shape[2:] != (3, 3):
            raise ValueError("the kernel is not 3x3")
        top, left = ((side % 2, 1) if stride == 2 else (1, 1) for side in x.shape[2:])
        return F.conv2d(F.pad(x, (left[0], left[1], top[0], top[1])), weight, bias, stride)

    z = F.batch_norm(conv(x, first, first_bias, 2), mean, variance, weight, bias, eps=eps)
    return conv(F.gelu(z), second, second_bias, 1)


def stem_tensors() -> list[Tensor]:
    return [randn(16, 3, 3, 3), randn(16), *norm(16), randn(16, 16, 3, 3), randn(16)]


def stem_calls() -> list[Call]:
    z, weight, bias, *_ = randn(2, 4, 5, 24), *norm(24)
    statistics = torch.stack([randn(24), positive(24)]).double()

    def reference(z: Tensor, weight: Any, bias: Any, given: Any, eps: float) -> list[Tensor | None]:
        if given is None:
            given = torch.stack(torch.var_mean(z.flatten(0, 2), 0, correction=0)[::-1])
        if given.shape != (2, z.shape[3]):
            raise ValueError("statistics are of other channels")
        rows = z.permute(0, 3, 1, 2)
        y = F.gelu(F.batch_norm(rows, *given.unbind(), weight, bias, eps=eps))
        return [y.permute(0, 2, 3, 1), given]

    return [
        Call(
            "cpu_stem_eval",
            with_fields(OPS.cpu_stem_eval),
            [randn(2, 3, 9, 8), stem_tensors(), EPS],
            stem_reference,
        ),
        Call(
            "cpu_stem_train_forward",
            OPS.cpu_stem_train_forward,
            [z, weight, bias, statistics, EPS],
            reference,
        ),
        Call(
            "cpu_stem_train_backward",
            OPS.cpu_stem_train_backward,
            [randn(2, 4, 5, 24), z, weight, bias, statistics, EPS, False],
        ),
        Call(
            "cpu_stem_train_backward, bfloat16",
            OPS.cpu_stem_train_backward,
            [randn(2, 4, 5, 24).bfloat16(), z.bfloat16(), weight, bias, statistics, EPS, False],
        ),
    ]


def mbconv_tensors(channels: int, wide: int, out: int) -> list[Tensor]:
    """In the order of BLOCK_TENSORS."""
    return [
        *(randn(wide, channels, 1, 1), randn(wide, 1, 3, 3), randn(out, wide)),
        *(randn(wide), randn(wide), randn(out)),
        *(*norm(channels), *norm(wide), *norm(wide), *norm(out)),
        *(randn(8, wide), randn(8), randn(wide, 8), randn(wide)),
        *(randn(out, channels), randn(out)),
    ]


def mbconv_eval_reference(
    x: Tensor,
    tensors: list[Tensor | None],
    drop_path_scale: Tensor | None,
    settings: list[Any],
    padding: list[int],
    dtype: torch.dtype,
) -> Tensor:
    given = dict(zip(BLOCK_TENSORS, tensors, strict=True))
    convolutions = ("expand", "depthwise", "project", "se_reduce", "se_expand", "shortcut")
    matrices = [f"{name}_weight" for name in convolutions]
    if given["depthwise_weight"].shape[2:] != (3, 3) or any(
        tensor is not None and tensor.dim() != 1
        for name, tensor in given.items()
        if name not in matrices
    ):
        raise ValueError("a tensor of the wrong shape")
    parts = NormParameters._fields[:4]
    parameters = MBConvParameters(
        **{
            field: NormParameters(*(given[f"{field}_{part}"] for part in parts))
            if field in NORMS
            else given[field]
            for field in MBConvParameters._fields
        }
    )
    chosen = BlockSettings(*settings)
    eps = {name: getattr(chosen, f"{name}_eps") for name in NORMS}
    excite = given["se_reduce_weight"] is not None
    pool = Pool(
        chosen.pool_kind,
        chosen.pool_kernel_size,
        chosen.pool_stride,
        tuple(padding[4:]),
        chosen.pool_count_include_pad,
    )
    description = MBConvDescription(
        stride=chosen.stride,
        padding=tuple(padding[:4]),
        **{
            name: Norm(value, frozen=True) if given[f"{name}_running_mean"] is not None else None
            for name, value in eps.items()
        },
        expand_activation=chosen.expand_activation,
        depthwise_activation=chosen.depthwise_activation,
        squeeze_excite=SqueezeExcite(activation=chosen.se_activation) if excite else None,
        residual=chosen.residual,
        pool=pool,
    )
    return mbconv_reference.mbconv(x, parameters, description, drop_path_scale)[0]


def mbconv_eval_arguments() -> list[Any]:
    settings = BlockSettings(
        stride=2,
        expand_activation="gelu",
        depthwise_activation="gelu",
        se_activation="silu",
        pre_norm_eps=EPS,
        expand_norm_eps=EPS,
        depthwise_norm_eps=EPS,
        project_norm_eps=EPS,
        residual=True,
        pool_kind="average",
        pool_kernel_size=2,
        pool_stride=2,
        pool_count_include_pad=False,
    )
    padding = BlockPadding(padding_bottom=1, padding_right=1)
    return [
        *(randn(2, 16, 8, 6), mbconv_tensors(16, 40, 24), positive(2)),
        *(list(settings), list(padding), torch.float32),
    ]


def training_calls(wide_dtype: torch.dtype) -> list[Call]:
    channels, wide, out = 16, 72, 24
    tensors = mbconv_tensors(channels, wide, out)[: BLOCK_TENSORS.index("project_norm_weight")]
    x, grad, gate, mean = (
        randn(2, 5, 6, channels),
        randn(2, 5, 6, out),
        positive(2, 128),
        randn(2, 128),
    )
    settings = TrainSettings(
        batch=2,
        height=5,
        width=6,
        out_height=5,
        out_width=6,
        stride=1,
        padding_top=1,
        padding_left=1,
        in_channels=channels,
        wide_channels=wide,
        out_channels=out,
        expand_activation="gelu",
        depthwise_activation="gelu",
        pre_norm_eps=EPS,
        expand_norm_eps=EPS,
        depthwise_norm_eps=EPS,
        pre_norm_mode="measured",
        expand_norm_mode="measured",
        depthwise_norm_mode="measured",
        wide_dtype=wide_dtype,
    )
    fields = [tensors, list(settings)]
    front, gated_op = map(
        with_fields, (OPS.cpu_mbconv_train_front, OPS.cpu_mbconv_train_backward_gated)
    )
    z1, z2, statistics, _ = front(x, None, True, *fields)
    gated, *_ = gated_op(grad, z2, statistics, gate, positive(2), *fields)
    backward = [grad, x, z1, z2, gated, gate, mean, statistics, positive(2)]
    plain = [grad, x, None, None, None, None, None, statistics, positive(2)]
    end = [randn(2, 5, 6, channels), True]
    arguments: dict[str, list[Any]] = {
        "front": [x, statistics, True],
        "pool": [z2, statistics],
        "project": [z2, statistics, gate, positive(2), randn(2, 5, 6, out), torch.float32],
        "backward_gated": [grad, z2, statistics, gate, positive(2)],
        "backward": [*backward, *end],
        "backward, not gated": [*plain, *end],
    }
    return [
        Call(
            f"cpu_mbconv_train_{name}, {wide_dtype}",
            with_fields(getattr(OPS, f"cpu_mbconv_train_{name.partition(',')[0]}")),
            [*given, *fields],
        )
        for name, given in arguments.items()
    ]


def attention_half_reference(
    y: Tensor,
    tensors: list[Tensor | None],
    heads: int,
    head_dim: int,
    window_height: int,
    window_width: int,
    scale: float,
    eps: float,
) -> Tensor:
    weight, bias, *projections = tensors
    rows = F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], weight, bias, eps)
    description = WindowAttentionDescription(heads, head_dim, (window_height, window_width), scale)
    return y + attention_branch(rows, projections, description).permute(0, 3, 1, 2)


def attention_branch(
    rows: Tensor, tensors: list[Tensor | None], description: WindowAttentionDescription
) -> Tensor:
    qkv, qkv_bias, proj, proj_bias, table = tensors
    if table is not None:
        table = resize_table(table, description.window_size)
    attended = attention_reference.window_attention(
        F.linear(rows, qkv, qkv_bias), table, description
    )
    return F.linear(attended, proj, proj_bias)


def pooled_half_reference(
    y: Tensor,
    tensors: list[Tensor | None],
    shortcut: list[Tensor | None],
    heads: int,
    head_dim: int,
    window_height: int,
    window_width: int,
    scale: float,
    eps: float,
) -> Tensor:
    weight, bias, *projections = tensors
    normalized = F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], weight, bias, eps)
    rows, pooled = (
        F.avg_pool2d(values, 2).permute(0, 2, 3, 1)
        for values in (normalized.permute(0, 3, 1, 2), y)
    )
    description = WindowAttentionDescription(heads, head_dim, (window_height, window_width), scale)
    branch = attention_branch(rows, projections, description)
    return (F.linear(pooled, *shortcut) + branch).permute(0, 3, 1, 2)


def attention_half_arguments() -> list[Any]:
    heads, head_dim, channels = 2, 8, 24
    inner = heads * head_dim
    tensors = [
        *(randn(channels), randn(channels), randn(3 * inner, channels), randn(3 * inner)),
        *(randn(channels, inner), randn(channels), randn(heads, 5, 7)),
    ]
    return [randn(2, channels, 5, 6), tensors, heads, head_dim, 4, 4, 0.25, 1e-5]


def mlp_reference(y: Tensor, tensors: list[Tensor | None], activation: str, eps: float) -> Tensor:
    weight, bias, fc1, fc1_bias, fc2, fc2_bias = tensors
    rows = F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], weight, bias, eps)
    hidden = getattr(F, activation)(F.linear(rows, fc1, fc1_bias))
    return y + F.linear(hidden, fc2, fc2_bias).permute(0, 3, 1, 2)


def head_reference(x: Tensor, tensors: list[Tensor | None], eps: float) -> Tensor:
    weight, bias, matrix, matrix_bias = tensors
    pooled = F.layer_norm(x.mean((2, 3)), x.shape[1:2], weight, bias, eps)
    return pooled if matrix is None else F.linear(pooled, matrix, matrix_bias)


def run_frozen(
    x: Tensor,
    frozen: tuple[Tensor, Tensor],
    table: Tensor | None = None,
    padding: list[int] | None = None,
    window: tuple[int, int] = (1, 1),
) -> Tensor:
    """The result of a step that was just frozen."""
    step, resized = OPS.cpu_freeze_for_maps(
        frozen[0], *x.shape[1:], *(padding or BlockPadding()), *window, table
    )
    tables = [] if table is None else [resized]
    return OPS.cpu_frozen_forward(x, step, [frozen[1], *tables], [0])[0]


def frozen_stem(x: Tensor, tensors: list[Tensor | None], eps: float) -> Tensor:
    return run_frozen(x, OPS.cpu_freeze_stem(*tensors, "gelu", False, eps, torch.float32))


def frozen_mbconv(
    x: Tensor, tensors: list[Any], _: None, settings: list[Any], padding: list[int], __: Any
) -> Tensor:
    return run_frozen(x, OPS.cpu_freeze_mbconv(*tensors, *settings, *IN_FLOAT32), padding=padding)


def frozen_attention_half(
    y: Tensor, tensors: Any, heads: int, head_dim: int, *others: Any
) -> Tensor:
    *window, scale, eps = others
    frozen = OPS.cpu_freeze_attention_half(
        *tensors, heads, head_dim, scale, eps, False, *IN_FLOAT32
    )
    return run_frozen(y, frozen, tensors[-1], window=(window[0], window[1]))


def frozen_pooled_half(
    y: Tensor, tensors: Any, shortcut: Any, heads: int, head_dim: int, *others: Any
) -> Tensor:
    *window, scale, eps = others
    pool = ("average", 2, 2, False)
    frozen = OPS.cpu_freeze_pooled_half(
        *tensors, *shortcut, heads, head_dim, scale, eps, *pool, torch.float32
    )
    return run_frozen(y, frozen, tensors[-1], window=(window[0], window[1]))


def frozen_mlp(y: Tensor, tensors: list[Tensor | None], activation: str, eps: float) -> Tensor:
    return run_frozen(y, OPS.cpu_freeze_mlp(*tensors, activation, eps, *IN_FLOAT32))


def frozen_head(x: Tensor, tensors: list[Tensor | None], eps: float) -> Tensor:
    return run_frozen(x, OPS.cpu_freeze_head(*tensors, eps))


def frozen_calls() -> list[Call]:
    half = attention_half_arguments()
    y, tensors, heads, head_dim, *window, scale, eps = half
    step, packed = OPS.cpu_freeze_attention_half(
        *tensors, heads, head_dim, scale, eps, False, *IN_FLOAT32
    )
    placement = [24, 5, 6, *BlockPadding(), *window]
    placed, table = OPS.cpu_freeze_for_maps(step, *placement, tensors[-1])

    def resized(*arguments: Any) -> list[Tensor | None]:
        *_, height, width, table = arguments
        if table is None:
            return [None, torch.empty(0)]
        if table.shape[0] != heads:
            raise ValueError("the table is of other heads")
        return [None, resize_table(table, (height, width)).flatten()]

    def both(y: Tensor, steps: Tensor, packed: list[Tensor], kept: list[int]) -> list[Tensor]:
        first = attention_half_reference(y, *in_float64(half[1:]))
        return [first, attention_half_reference(first, *in_float64(half[1:]))]

    eval_arguments = mbconv_eval_arguments()
    eval_arguments[2] = None  # frozen blocks have no drop path
    mlp = [randn(24), randn(24), randn(40, 24), randn(40), randn(24, 40), randn(24)]
    head = [randn(24), randn(24), randn(10, 24), randn(10)]
    pooled = [*tensors[:4], randn(20, 16), randn(20), tensors[-1]]
    halving = [randn(2, 24, 6, 8), pooled, [randn(20, 24), randn(20)], heads, head_dim, 2, 4]
    return [
        Call(
            "cpu_freeze_pooled_half",
            frozen_pooled_half,
            [*halving, scale, eps],
            pooled_half_reference,
        ),
        Call(
            "cpu_freeze_stem", frozen_stem, [randn(2, 3, 9, 8), stem_tensors(), EPS], stem_reference
        ),
        Call("cpu_freeze_mbconv", frozen_mbconv, eval_arguments, mbconv_eval_reference),
        Call("cpu_freeze_attention_half", frozen_attention_half, half, attention_half_reference),
        Call("cpu_freeze_mlp", frozen_mlp, [randn(2, 24, 5, 6), mlp, "gelu", EPS], mlp_reference),
        Call("cpu_freeze_head", frozen_head, [randn(3, 24, 4, 5), head, EPS], head_reference),
        Call(
            "cpu_freeze_for_maps",
            OPS.cpu_freeze_for_maps,
            [step, *placement, tensors[-1]],
            resized,
        ),
        Call(
            "cpu_frozen_forward",
            OPS.cpu_frozen_forward,
            [y, torch.cat([placed, placed]), [packed, table, packed, table], [0, 1]],
            both,
        ),
    ]


def calls() -> list[Call]:
    eval_call = with_fields(OPS.cpu_mbconv_eval)
    return [
        *linear_calls(),
        *window_attention_calls(),
        *stem_calls(),
        Call("cpu_mbconv_eval", eval_call, mbconv_eval_arguments(), mbconv_eval_reference),
        *training_calls(torch.float32),
        *training_calls(torch.bfloat16),
        Call(
            "cpu_attention_half_eval",
            with_fields(OPS.cpu_attention_half_eval),
            attention_half_arguments(),
            attention_half_reference,
        ),
        *frozen_calls(),
    ]
