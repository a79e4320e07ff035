"""MOAT's blocks in plain PyTorch: the specification in code (arXiv 2210.01820, section 3).

Both blocks take and return [B, C, H, W] in any memory format and equal the official TensorFlow
code: TF SAME padding at stride 2, batch norm with eps 1e-3, momentum 0.01 and the biased variance
in the moving average, exact (erf) GELU, expansion of the output width, SE width from the hidden
width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moat_kernels.drop_path import DropPath
from moat_kernels.normalization import BatchNorm2d
from moat_kernels.ops.common.activations import activate
from moat_kernels.ops.common.checks import check_choice, check_positive_integers
from moat_kernels.ops.common.spatial import pad_map, resolve_padding, split_padding
from moat_kernels.ops.mbconv.description import ACTIVATIONS, Pool
from moat_kernels.ops.mbconv.reference import pool_map
from moat_kernels.ops.window_attention import WindowAttentionDescription, resize_table
from moat_kernels.ops.window_attention.reference import window_attention

INITIAL_STD = 0.02  # of every weight: a plain normal, not truncated; biases start at 0


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, decided from the map's size at each call."""

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[2:]
        # Of the pixels that a dilated kernel spans.
        spans = [
            dilation * (size - 1) + 1
            for size, dilation in zip(self.kernel_size, self.dilation, strict=True)
        ]
        sides = resolve_padding("tf_same", height, width, (spans[0], spans[1]), self.stride[0])
        if self.padding_mode != "zeros":
            top, bottom, left, right = sides
            padded, padding = F.pad(input, (left, right, top, bottom), self.padding_mode), (0, 0)
        else:
            border, padding = split_padding(sides)
            padded = pad_map(input, border)
        return F.conv2d(
            padded, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )


class SqueezeExcitation(nn.Module):
    """Gate of each channel: x * sigmoid(expand(activation(reduce(mean of the map)))).

    activation: "silu" (official) or another that `MBConvDescription` may name.
    """

    def __init__(self, channels: int, reduced_channels: int, activation: str = "silu") -> None:
        super().__init__()
        check_choice("se_activation", activation, ACTIVATIONS)
        self.activation = activation
        self.reduce = nn.Conv2d(channels, reduced_channels, 1)
        self.expand = nn.Conv2d(reduced_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x.mean((2, 3), keepdim=True))
        return x * torch.sigmoid(self.expand(activate(self.activation, reduced)))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class MBConvBlock(nn.Module):
    """Inverted bottleneck with squeeze-and-excitation: [B, C_in, H, W] -> [B, C_out, H', W'].

    BN, 1x1 expand, BN, GELU, depthwise, BN, GELU, SE, 1x1 shrink, added to the shortcut, which is
    pooled at stride 2 and projected where the channels change. H' = ceil(H / stride).

    in_channels, out_channels: C_in and C_out (the official hidden size).
    stride: of the depthwise convolution and the shortcut's pool.
    expand_ratio: inner width over C_out.
    kernel_size: of the depthwise convolution.
    se_ratio: width of the SE bottleneck over C_out (at least 1 channel); None leaves SE out.
    se_activation: inside the SE bottleneck, "silu" (official) or "gelu" (Keras' MOATs), say.
    pool_size: kernel of the shortcut's average pool, 2 (classification) or 3 (downstream tasks).
    drop_path: probability that a sample loses the residual in training.
    unbiased_running_var: PyTorch's convention for the running variance instead of MOAT's.

    Raises ValueError naming an argument that is not supported.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        expand_ratio: int = 4,
        kernel_size: int = 3,
        se_ratio: float | None = 0.25,
        se_activation: str = "silu",
        pool_size: int = 2,
        drop_path: float = 0.0,
        unbiased_running_var: bool = False,
    ) -> None:
        super().__init__()
        check_positive_integers(
            in_channels=in_channels,
            out_channels=out_channels,
            stride=stride,
            expand_ratio=expand_ratio,
            kernel_size=kernel_size,
            pool_size=pool_size,
        )
        if se_ratio is not None and se_ratio <= 0:
            raise ValueError(f"se_ratio must be None or > 0, got {se_ratio!r}")
        inner_channels = expand_ratio * out_channels

        def norm(channels: int) -> BatchNorm2d:
            return BatchNorm2d(channels, unbiased_running_var=unbiased_running_var)

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.pool = Pool(kernel_size=pool_size, stride=stride) if stride > 1 else None
        self.pre_norm = norm(in_channels)
        self.expand_conv = nn.Conv2d(in_channels, inner_channels, 1, bias=False)
        self.expand_norm = norm(inner_channels)
        self.depthwise_conv = SameConv2d(
            inner_channels, inner_channels, kernel_size, stride, groups=inner_channels, bias=False
        )
        self.depthwise_norm = norm(inner_channels)
        self.se: SqueezeExcitation | None = None
        if se_ratio is not None:
            reduced_channels = max(1, int(out_channels * se_ratio))
            self.se = SqueezeExcitation(inner_channels, reduced_channels, se_activation)
        self.shrink_conv = nn.Conv2d(inner_channels, out_channels, 1)
        self.shortcut_conv: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.shortcut_conv = nn.Conv2d(in_channels, out_channels, 1)
        self.drop_path = DropPath(drop_path)
        initialize(self)

    def inverted_bottleneck(self, x: Tensor) -> Tensor:
        """The convolutional half: shortcut + drop_path(residual)."""
        y = self.expand_conv(self.pre_norm(x))
        y = F.gelu(self.expand_norm(y))
        y = F.gelu(self.depthwise_norm(self.depthwise_conv(y)))
        if self.se is not None:
            y = self.se(y)
        return self.shortcut(x) + self.drop_path(self.shrink_conv(y))

    def shortcut(self, x: Tensor) -> Tensor:
        """The raw input, pooled and projected where its shape changes."""
        if self.pool is not None:
            x = pool_map(x, self.pool)
        return x if self.shortcut_conv is None else self.shortcut_conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.inverted_bottleneck(x)


class Attention(nn.Module):
    """Multi-head self-attention inside windows: [B, H, W, C] -> [B, H, W, C].

    channels: C; the inner width is floor(C / head_dim) * head_dim, at least one head.
    window_size: (height, width) or one integer for both; None is the whole map at every call.
        Windows that do not divide the map are padded and masked, where official code raises.
    position_size: height and width of the map that the bias table is made for (official: 14 in
        stage 4, 7 in stage 5); it is resized to the window's size at every call. None: no bias.

    Raises ValueError naming an argument that is not supported.
    """

    def __init__(
        self,
        channels: int,
        *,
        head_dim: int = 32,
        window_size: int | tuple[int, int] | None = None,
        position_size: int | None = None,
    ) -> None:
        super().__init__()
        check_positive_integers(channels=channels, head_dim=head_dim)
        if isinstance(window_size, int):
            window_size = (window_size, window_size)
        if window_size is not None:
            window_size = (window_size[0], window_size[1])
        heads = channels // head_dim
        if heads < 1:
            raise ValueError(f"channels must be at least head_dim={head_dim}, got {channels}")
        self.description = WindowAttentionDescription(heads, head_dim, window_size)
        self.qkv = nn.Linear(channels, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, channels)
        self.relative_position_embedding: nn.Parameter | None = None
        if position_size is not None:
            check_positive_integers(position_size=position_size)
            size = 2 * position_size - 1
            self.relative_position_embedding = nn.Parameter(torch.empty(heads, size, size))
        initialize(self)

    def bias_table(self, height: int, width: int) -> Tensor | None:
        """The position bias table for the windows of a map of `height` x `width`."""
        if self.relative_position_embedding is None:
            return None
        window = self.description.window_for(height, width)
        return resize_table(self.relative_position_embedding, window)

    def attend(self, qkv: Tensor) -> Tensor:
        """[B, H, W, 3*heads*head_dim] -> [B, H, W, heads*head_dim]."""
        table = self.bias_table(qkv.shape[1], qkv.shape[2])
        return window_attention(qkv, table, self.description)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(self.qkv(x)))

    def extra_repr(self) -> str:
        description = self.description
        return (
            f"heads={description.heads}, head_dim={description.head_dim}, "
            f"window_size={description.window_size}"
        )


class MOATBlock(MBConvBlock):
    """An inverted bottleneck without SE, then attention: [B, C_in, H, W] -> [B, C_out, H', W'].

    y = inverted_bottleneck(x); y + drop_path(attention(layer_norm(y))); there is no MLP. The two
    halves draw their drop path independently. See MBConvBlock and Attention for the arguments.

    layer_norm_eps: 1e-5 (official) or 1e-3 (Keras' MOATs), say.
    """

    attention_class = Attention

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        expand_ratio: int = 4,
        kernel_size: int = 3,
        head_dim: int = 32,
        window_size: int | tuple[int, int] | None = None,
        position_size: int | None = 14,
        pool_size: int = 2,
        layer_norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        unbiased_running_var: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            stride=stride,
            expand_ratio=expand_ratio,
            kernel_size=kernel_size,
            se_ratio=None,
            pool_size=pool_size,
            drop_path=drop_path,
            unbiased_running_var=unbiased_running_var,
        )
        if not layer_norm_eps > 0:
            raise ValueError(f"layer_norm_eps must be > 0, got {layer_norm_eps!r}")
        self.attention_norm = nn.LayerNorm(out_channels, eps=layer_norm_eps)
        self.attention = self.attention_class(
            out_channels, head_dim=head_dim, window_size=window_size, position_size=position_size
        )

    def self_attention(self, y: Tensor) -> Tensor:
        """attention(layer_norm(y)) of a map [B, C, H, W], before drop path."""
        rows = y.permute(0, 2, 3, 1)
        return self.attention(self.attention_norm(rows)).permute(0, 3, 1, 2)

    def attention_half(self, y: Tensor) -> Tensor:
        """y + drop_path(attention(layer_norm(y))) of a map [B, C, H, W]."""
        return y + self.drop_path(self.self_attention(y))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention_half(self.inverted_bottleneck(x))


def initialize(module: nn.Module) -> None:
    """Official initialisation: every weight and bias table normal with std 0.02, biases 0."""
    for name, parameter in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
            continue
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=INITIAL_STD)
