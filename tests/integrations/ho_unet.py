"""Ho et al.'s network under the names of their TensorFlow code (models/unet.py), written here as PyTorch modules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, temb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.temb_proj = nn.Linear(temb, outside)
        self.norm2, self.conv2 = norm(outside), nn.Conv2d(outside, outside, 3, padding=1)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x))) + self.temb_proj(functional.silu(temb))[:, :, None, None]
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attn(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x)
        q, k, v = (layer(h).reshape(B, C, H * W) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(C), dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(B, C, H, W))


class Resample(nn.Module):
    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            return self.conv(functional.pad(x, (0, 1, 0, 1)))
        return self.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


class HoUNet(nn.Module):
    """The network for images with 3 channels; attention at the levels of `attends`."""

    def __init__(
        self, ch: int = 32, mult: tuple[int, ...] = (1, 2, 2), blocks: int = 1, attends: tuple[int, ...] = (1,)
    ):
        super().__init__()
        self.ch, temb = ch, 4 * ch
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, temb), nn.Linear(temb, temb)])
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down, self.mid, self.up = nn.ModuleList(), nn.Module(), nn.ModuleList()
        widths, now = [ch], ch
        for level, factor in enumerate(mult):
            self.down.append(self.level([now] + [ch * factor] * (blocks - 1), ch * factor, level in attends))
            now = ch * factor
            widths += [now] * blocks
            if level < len(mult) - 1:
                self.down[level].downsample = Resample(now, down=True)
                widths.append(now)
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = Block(now, now, temb), Attn(now), Block(now, now, temb)
        ups = []
        for level, factor in reversed(list(enumerate(mult))):
            inside = [(now if j == 0 else ch * factor) + widths.pop() for j in range(blocks + 1)]
            ups.append(self.level(inside, ch * factor, level in attends))
            now = ch * factor
            if level:
                ups[-1].upsample = Resample(now, down=False)
        self.up.extend(ups[::-1])
        self.norm_out, self.conv_out = norm(now), nn.Conv2d(now, 3, 3, padding=1)

    def level(self, inside: list[int], outside: int, attends: bool) -> nn.Module:
        level = nn.Module()
        level.block = nn.ModuleList(Block(width, outside, 4 * self.ch) for width in inside)
        level.attn = nn.ModuleList(Attn(outside) for _ in inside if attends)
        return level

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.ch // 2
        angle = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - 1))
        temb = self.temb.dense[0](torch.cat([angle.sin(), angle.cos()], dim=1).to(x.dtype))
        temb = self.temb.dense[1](functional.silu(temb))
        saved = [self.conv_in(x)]
        for level in self.down:
            for j, block in enumerate(level.block):
                saved.append(self.attended(level, j, block(saved[-1], temb)))
            if hasattr(level, "downsample"):
                saved.append(level.downsample(saved[-1]))
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(saved[-1], temb)), temb)
        for level in reversed(self.up):
            for j, block in enumerate(level.block):
                x = self.attended(level, j, block(torch.cat([x, saved.pop()], dim=1), temb))
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(functional.silu(self.norm_out(x)))

    def attended(self, level: nn.Module, j: int, x: Tensor) -> Tensor:
        return level.attn[j](x) if len(level.attn) else x
