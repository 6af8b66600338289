"""Building blocks of the UNet of Ho et al. 2020 (appendix B), named as in diffusers' UNet2DModel.

Tensors are [B, C, H, W]. A residual block does not take the time embedding but its own projection of it, so that
all projections can be computed once for a whole sampling run (they do not depend on x_t). The blocks' parameter
names are those of diffusers, because its checkpoints load without renaming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastddpm.unet.config import ACTIVATIONS, UNetConfig

MAX_PERIOD = 10_000  # Vaswani et al. 2017, section 3.5, as used by Ho et al. 2020


def timestep_embedding(t: Tensor, channels: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Embed timesteps as sines and cosines of geometrically spaced frequencies (Vaswani et al. 2017, section 3.5).

    emb[:, i] = sin(t * 10000^(-i / (channels/2 - freq_shift))), the cosines beside it.

    Args:
        t: [B], integer or floating point, any real value.
        channels: width of the embedding; an odd width ends in a zero.
        flip_sin_to_cos: cosines first instead of sines.
        freq_shift: 0 or 1; 1 makes the last frequency exactly 1/10000.

    Returns:
        float32 [B, channels], computed in float32 whatever the network's dtype.
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) * -math.log(MAX_PERIOD) / (half - freq_shift)
    angle = t.float()[:, None] * exponent.exp()[None, :]
    sin_cos = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return functional.pad(torch.cat(sin_cos, dim=1), (0, channels % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between them, from the sinusoidal embedding to the width of the time embedding."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, emb: Tensor) -> Tensor:
        """[B, in_channels] -> [B, out_channels]."""
        return self.linear_2(functional.silu(self.linear_1(emb)))


class ResnetBlock(nn.Module):
    """Residual block: x / s + conv(dropout(act(norm(conv(act(norm(x))) + time)))) / s, s = `output_scale_factor`."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, output_scale_factor: float = 1.0):
        super().__init__()
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.output_scale_factor = output_scale_factor
        self.act = ACTIVATIONS[config.act_fn]
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.temb_channels, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def project_time(self, temb: Tensor) -> Tensor:
        """[B, temb_channels] -> [B, C], or [B, 2C] (scale, shift): what `forward` takes as `time`."""
        return self.time_emb_proj(self.act(temb))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, C_in, H, W] and the projected time embedding -> [B, C_out, H, W]."""
        h = self.conv1(self.act(self.norm1(x)))
        if self.scale_shift:
            scale, shift = time[:, :, None, None].chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm_shifted(h, time)
        h = self.conv2(self.dropout(self.act(h)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return _rescale(shortcut + h, self.output_scale_factor)

    def norm_shifted(self, h: Tensor, time: Tensor) -> Tensor:
        """The second normalisation, of [B, C, H, W] plus [B, C]."""
        return self.norm2(h + time[:, :, None, None])


class Attention(nn.Module):
    """Self-attention over pixels with a residual connection: (x + proj(softmax(q k^T / sqrt(d)) v)) / s."""

    def __init__(
        self, channels: int, config: UNetConfig, norm_num_groups: int | None, output_scale_factor: float = 1.0
    ) -> None:
        super().__init__()
        head_dim = channels if config.attention_head_dim is None else config.attention_head_dim
        self.heads = channels // head_dim
        self.output_scale_factor = output_scale_factor
        inner = self.heads * head_dim
        self.group_norm = (
            None if norm_num_groups is None else nn.GroupNorm(norm_num_groups, channels, eps=config.norm_eps)
        )
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        # A list because diffusers keeps a dropout behind the projection: the key is "to_out.0".
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        out = self.attend(x if self.group_norm is None else self.group_norm(x))
        return _rescale(x + out, self.output_scale_factor)

    def attend(self, h: Tensor) -> Tensor:
        """What is added to the input, from its normalised pixels [B, C, H, W]."""
        B, C, H, W = h.shape
        tokens = h.flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.project(tokens))
        attended = functional.scaled_dot_product_attention(q, k, v)  # [B, heads, HW, head_dim]
        out = self.to_out[0](attended.transpose(1, 2).flatten(2))
        return out.transpose(1, 2).reshape(B, C, H, W)

    def project(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """[B, HW, C] -> q, k and v, each [B, HW, heads * head_dim]."""
        return self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)


class Downsample(nn.Module):
    """Halve the resolution with a strided 3x3 convolution; padding 0 pads right and below only, as Ho et al. do."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.pad_after = padding == 0
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(functional.pad(x, (0, 1, 0, 1)) if self.pad_after else x)


class Upsample(nn.Module):
    """Double the resolution by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """Residual blocks, each followed by attention where asked, then a downsampling convolution."""

    attentions: nn.ModuleList | None
    downsamplers: nn.ModuleList | None

    def __init__(
        self, in_channels: int, out_channels: int, config: UNetConfig, *, attention: bool, downsample: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(ResnetBlock(width, out_channels, config) for width in widths)
        self.attentions = _attentions(out_channels, config, len(widths)) if attention else None
        self.downsamplers = nn.ModuleList([Downsample(out_channels, config.downsample_padding)]) if downsample else None

    def forward(self, x: Tensor, time: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """x and one time projection per residual block -> the output and every tensor the way up will want."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time[i])
            if self.attentions is not None:
                x = self.attentions[i](x)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Residual block, self-attention (optional), residual block, at the lowest resolution."""

    attentions: nn.ModuleList | None

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, scale = config.block_out_channels[-1], config.mid_block_scale_factor
        groups = config.attn_norm_num_groups
        if groups is None and config.resnet_time_scale_shift == "default":
            groups = config.norm_num_groups
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, config, scale) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, config, groups, scale)]) if config.add_attention else None

    def forward(self, x: Tensor, time: Sequence[Tensor]) -> Tensor:
        """[B, C, H, W] and two time projections -> [B, C, H, W]."""
        x = self.resnets[0](x, time[0])
        if self.attentions is not None:
            x = self.attentions[0](x)
        return self.resnets[1](x, time[1])


class UpBlock(nn.Module):
    """Residual blocks that each take one skip connection, attention where asked, then upsampling.

    The skip connections have the block's own width but for the last, which comes from the level above.
    """

    attentions: nn.ModuleList | None
    upsamplers: nn.ModuleList | None

    def __init__(
        self, in_channels: int, above: int, out_channels: int, config: UNetConfig, *, attention: bool, upsample: bool
    ) -> None:
        super().__init__()
        own = [out_channels] * config.layers_per_block
        widths = [x + skip for x, skip in zip([in_channels, *own], [*own, above], strict=True)]
        self.resnets = nn.ModuleList(ResnetBlock(width, out_channels, config) for width in widths)
        self.attentions = _attentions(out_channels, config, len(widths)) if attention else None
        self.upsamplers = nn.ModuleList([Upsample(out_channels)]) if upsample else None

    def forward(self, x: Tensor, skips: list[Tensor], time: Sequence[Tensor]) -> Tensor:
        """x, the stack of skip connections (taken from its end) and one time projection per residual block."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time[i])
            if self.attentions is not None:
                x = self.attentions[i](x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


def _attentions(channels: int, config: UNetConfig, count: int) -> nn.ModuleList:
    return nn.ModuleList(Attention(channels, config, config.norm_num_groups) for _ in range(count))


def _rescale(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x / factor
