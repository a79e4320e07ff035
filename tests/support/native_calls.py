"""Every native op of the CPU with valid arguments, for `support.wrong_arguments`."""

from __future__ import annotations

from collections.abc import Callable
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
from moat_kernels.ops.window_attention import reference as attention_reference
from moat_kernels.ops.window_attention.algebra.position_bias import resize_table
from support.wrong_arguments import Call, exact, in_float64

OPS = torch.ops.moat_kernels
# These take no tensor.
WITHOUT_TENSORS = ("cpu_isa", "cpu_release_memory", "cpu_release_scratch")
EPS = 1e-3


def randn(*sizes: int) -> Tensor:
    return exact(torch.randn(sizes))


def positive(*sizes: int) -> Tensor:
    return exact(torch.rand(sizes) + 0.5)


def norm(channels: int) -> list[Tensor]:
    """Weight, bias, running mean and variance."""
    return [randn(channels), randn(channels), randn(channels), positive(channels)]


def linear_calls() -> list[Call]:
    x, weight, bias, grad = randn(3, 5, 32), randn(48, 32), randn(48), randn(3, 5, 48)
    return [
        Call("cpu_linear_forward", OPS.cpu_linear_forward, [x, weight, bias], F.linear),
        Call("cpu_linear_backward", OPS.cpu_linear_backward, [grad, x, weight, True, True]),
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
            OPS.cpu_stem_eval,
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
    ]


def mbconv_tensors(channels: int, wide: int, out: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """convolutions, norms; see csrc/cpu/host/mbconv_arguments.h."""
    convolutions = [
        *(randn(wide, channels, 1, 1), randn(wide, 1, 3, 3), randn(out, wide)),
        *(randn(wide), randn(wide), randn(out)),
        *(randn(8, wide), randn(8), randn(wide, 8), randn(wide)),
        *(randn(out, channels), randn(out)),
    ]
    return convolutions, [*norm(channels), *norm(wide), *norm(wide), *norm(out)]


def mbconv_eval_reference(
    x: Tensor,
    convolutions: list[Tensor | None],
    norms: list[Tensor | None],
    drop_path_scale: Tensor | None,
    eps: list[float],
    stride: int,
    padding: list[int],
    activations: list[str],
    residual: bool,
    pool_kind: str,
    pool: list[int],
    dtype: torch.dtype,
) -> Tensor:
    expand, depthwise, project, *others = convolutions
    if depthwise.shape[2:] != (3, 3) or any(
        tensor is not None and tensor.dim() != 1
        for tensor in (*others[:3], others[4], others[6], others[8], *norms)
    ):
        raise ValueError("a tensor of the wrong shape")
    parameters = MBConvParameters(
        *(expand, depthwise, project, *others[:3]),
        *(NormParameters(*norms[first : first + 4]) for first in range(0, 16, 4)),
        *others[3:],
    )
    size, pool_stride, *pool_padding, counts = pool
    names = ("pre_norm", "expand_norm", "depthwise_norm", "project_norm")
    description = MBConvDescription(
        stride=stride,
        padding=tuple(padding),
        **{
            name: Norm(value, frozen=True) if norms[4 * index + 2] is not None else None
            for index, (name, value) in enumerate(zip(names, eps, strict=True))
        },
        expand_activation=activations[0],
        depthwise_activation=activations[1],
        squeeze_excite=SqueezeExcite(activation=activations[2]) if others[3] is not None else None,
        residual=residual,
        pool=Pool(pool_kind, size, pool_stride, tuple(pool_padding), bool(counts)),
    )
    return mbconv_reference.mbconv(x, parameters, description, drop_path_scale)[0]


def mbconv_eval_arguments() -> list[Any]:
    convolutions, norms = mbconv_tensors(16, 40, 24)
    settings = [[EPS] * 4, 2, [0, 1, 0, 1], ["gelu", "gelu", "silu"], True]
    pool = [2, 2, 0, 0, 0, 0, 0]
    return [
        *(randn(2, 16, 8, 6), convolutions, norms, positive(2)),
        *(*settings, "average", pool, torch.float32),
    ]


def training_calls() -> list[Call]:
    channels, wide, out = 16, 72, 24
    convolutions, norms = mbconv_tensors(channels, wide, out)
    x, grad, gate, mean = (
        randn(2, 5, 6, channels),
        randn(2, 5, 6, out),
        positive(2, 128),
        randn(2, 128),
    )
    geometry = [2, 5, 6, 5, 6, 1, 1, 1, channels, wide, out]
    settings = [convolutions[:6], norms[:12], [EPS] * 3, [2, 2, 2], geometry, ["gelu", "gelu"]]
    forward = OPS.cpu_mbconv_train_front
    z1, z2, statistics, _ = forward(x, None, True, torch.float32, *settings)
    gated, *_ = OPS.cpu_mbconv_train_backward_gated(
        grad, z2, statistics, gate, positive(2), *settings
    )
    return [
        Call(f"cpu_mbconv_train_{name}", function, [*arguments, *settings])
        for name, function, arguments in (
            ("front", forward, [x, statistics, True, torch.float32]),
            ("pool", OPS.cpu_mbconv_train_pool, [z2, statistics]),
            (
                "project",
                OPS.cpu_mbconv_train_project,
                [z2, statistics, gate, positive(2), randn(2, 5, 6, out)],
            ),
            (
                "backward_gated",
                OPS.cpu_mbconv_train_backward_gated,
                [grad, z2, statistics, gate, positive(2)],
            ),
            (
                "backward",
                OPS.cpu_mbconv_train_backward,
                [
                    *(grad, x, z1, z2, gated, gate, mean, statistics, positive(2)),
                    *(randn(2, 5, 6, channels), True),
                ],
            ),
        )
    ] + [
        Call(
            "cpu_mbconv_train_backward, not gated",
            OPS.cpu_mbconv_train_backward,
            [
                *(grad, x, None, None, None, None, None, statistics, positive(2)),
                *(randn(2, 5, 6, channels), True, *settings),
            ],
        )
    ]


def attention_half_reference(
    y: Tensor,
    tensors: list[Tensor | None],
    heads: int,
    head_dim: int,
    window: list[int],
    scale: float,
    eps: float,
) -> Tensor:
    weight, bias, qkv, qkv_bias, proj, proj_bias, table = tensors
    description = WindowAttentionDescription(heads, head_dim, tuple(window), scale)
    if table is not None:
        table = resize_table(table, (window[0], window[1]))
    rows = F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], weight, bias, eps)
    attended = attention_reference.window_attention(
        F.linear(rows, qkv, qkv_bias), table, description
    )
    return y + F.linear(attended, proj, proj_bias).permute(0, 3, 1, 2)


def attention_half_arguments() -> list[Any]:
    heads, head_dim, channels = 2, 8, 24
    inner = heads * head_dim
    tensors = [
        *(randn(channels), randn(channels), randn(3 * inner, channels), randn(3 * inner)),
        *(randn(channels, inner), randn(channels), randn(heads, 5, 7)),
    ]
    return [randn(2, channels, 5, 6), tensors, heads, head_dim, [4, 4], 0.25, 1e-5]


def head_reference(x: Tensor, tensors: list[Tensor | None], eps: float) -> Tensor:
    weight, bias, matrix, matrix_bias = tensors
    pooled = F.layer_norm(x.mean((2, 3)), x.shape[1:2], weight, bias, eps)
    return pooled if matrix is None else F.linear(pooled, matrix, matrix_bias)


def run_frozen(
    x: Tensor, frozen: tuple[Tensor, Tensor], table: Tensor | None = None, **placement: list[int]
) -> Tensor:
    """The result of a step that was just frozen."""
    settings = {"padding": [0] * 4, "pool_padding": [0] * 4, "window": [1, 1], **placement}
    step, resized = OPS.cpu_freeze_for_maps(
        frozen[0], x.shape[1:], *settings.values(), position_table=table
    )
    tables = [] if table is None else [resized]
    return OPS.cpu_frozen_forward(x, step, [frozen[1], *tables], [0])[0]


def frozen_stem(x: Tensor, tensors: list[Tensor | None], eps: float) -> Tensor:
    return run_frozen(x, OPS.cpu_freeze_stem(tensors, eps))


def frozen_mbconv(x: Tensor, convolutions: Any, norms: Any, _: Any, *settings: Any) -> Tensor:
    eps, stride, padding, activations, residual, kind, pool, _ = settings
    frozen = OPS.cpu_freeze_mbconv(
        convolutions, norms, eps, stride, activations, residual, kind, pool
    )
    return run_frozen(x, frozen, padding=padding, pool_padding=pool[2:6])


def frozen_attention_half(
    y: Tensor, tensors: Any, heads: int, head_dim: int, window: list[int], scale: float, eps: float
) -> Tensor:
    frozen = OPS.cpu_freeze_attention_half(tensors, heads, head_dim, scale, eps)
    return run_frozen(y, frozen, tensors[-1], window=window)


def frozen_head(x: Tensor, tensors: list[Tensor | None], eps: float) -> Tensor:
    return run_frozen(x, OPS.cpu_freeze_head(tensors, eps))


def frozen_calls() -> list[Call]:
    half = attention_half_arguments()
    y, tensors, heads, head_dim, window, scale, eps = half
    step, packed = OPS.cpu_freeze_attention_half(tensors, heads, head_dim, scale, eps)
    placement = [[0] * 4, [0] * 4, window]
    placed, table = OPS.cpu_freeze_for_maps(step, [24, 5, 6], *placement, tensors[-1])

    def resized(_: Any, __: Any, *others: Any) -> list[Tensor | None]:
        *_, window, table = others
        if table is None:
            return [None, torch.empty(0)]
        if table.shape[0] != heads:
            raise ValueError("the table is of other heads")
        return [None, resize_table(table, (window[0], window[1])).flatten()]

    def both(y: Tensor, steps: Tensor, packed: list[Tensor], kept: list[int]) -> list[Tensor]:
        first = attention_half_reference(y, *in_float64(half[1:]))
        return [first, attention_half_reference(first, *in_float64(half[1:]))]

    eval_arguments = mbconv_eval_arguments()
    eval_arguments[3] = None  # frozen blocks have no drop path
    head = [randn(24), randn(24), randn(10, 24), randn(10)]
    return [
        Call(
            "cpu_freeze_stem", frozen_stem, [randn(2, 3, 9, 8), stem_tensors(), EPS], stem_reference
        ),
        Call("cpu_freeze_mbconv", frozen_mbconv, eval_arguments, mbconv_eval_reference),
        Call("cpu_freeze_attention_half", frozen_attention_half, half, attention_half_reference),
        Call("cpu_freeze_head", frozen_head, [randn(3, 24, 4, 5), head, EPS], head_reference),
        Call(
            "cpu_freeze_for_maps",
            OPS.cpu_freeze_for_maps,
            [step, [24, 5, 6], *placement, tensors[-1]],
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
    eval_call: Callable[..., Any] = OPS.cpu_mbconv_eval
    return [
        *linear_calls(),
        *window_attention_calls(),
        *stem_calls(),
        Call("cpu_mbconv_eval", eval_call, mbconv_eval_arguments(), mbconv_eval_reference),
        *training_calls(),
        Call(
            "cpu_attention_half_eval",
            OPS.cpu_attention_half_eval,
            attention_half_arguments(),
            attention_half_reference,
        ),
        *frozen_calls(),
    ]
