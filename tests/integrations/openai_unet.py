"""OpenAI's network, written here from its papers: a state_dict, and what it computes."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

from fastddpm.integrations.openai.unet_weights import OpenAIFlags


class UNetModel:
    """The UNet of Nichol & Dhariwal 2021 in OpenAI's names, as functions of a state_dict."""

    def __init__(
        self,
        mult: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        attention: tuple[int, ...] = (1,),
        scale_shift: bool = True,
        out: int = 3,
        classes: int | None = None,
        channels: int = 3,
        width: int = 32,
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.w: dict[str, Tensor] = {}
        self.scale_shift, self.temb = scale_shift, 4 * width
        self.linear("time_embed.0", width, self.temb)
        self.linear("time_embed.2", self.temb, self.temb)
        if classes:
            self.w["label_emb.weight"] = self.randn(classes, self.temb)
        self.conv("input_blocks.0.0", channels, width)
        stack, now, index = [width], width, 1
        for level, factor in enumerate(mult):
            for _ in range(blocks):
                self.resblock(f"input_blocks.{index}.0", now, width * factor)
                now = width * factor
                if level in attention:
                    self.attention(f"input_blocks.{index}.1", now)
                stack.append(now)
                index += 1
            if level < len(mult) - 1:
                self.conv(f"input_blocks.{index}.0.op", now, now)
                stack.append(now)
                index += 1
        self.resblock("middle_block.0", now, now)
        self.attention("middle_block.1", now)
        self.resblock("middle_block.2", now, now)
        index = 0
        for level, factor in reversed(list(enumerate(mult))):
            for j in range(blocks + 1):
                self.resblock(f"output_blocks.{index}.0", now + stack.pop(), width * factor)
                now = width * factor
                if level in attention:
                    self.attention(f"output_blocks.{index}.1", now)
                if level and j == blocks:
                    self.conv(f"output_blocks.{index}.{1 + (level in attention)}.conv", now, now)
                index += 1
        self.norm("out.0", now)
        self.conv("out.2", now, out)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator) / math.sqrt(math.prod(shape[1:]) or 1)

    def linear(self, name: str, inside: int, outside: int) -> None:
        self.w |= {f"{name}.weight": self.randn(outside, inside), f"{name}.bias": 0.1 * self.randn(outside)}

    def conv(self, name: str, inside: int, outside: int, size: int = 3) -> None:
        self.w |= {f"{name}.weight": self.randn(outside, inside, size, size), f"{name}.bias": 0.1 * self.randn(outside)}

    def norm(self, name: str, width: int) -> None:
        self.w |= {f"{name}.weight": 1 + 0.1 * self.randn(width), f"{name}.bias": 0.1 * self.randn(width)}

    def resblock(self, name: str, inside: int, outside: int) -> None:
        self.norm(f"{name}.in_layers.0", inside)
        self.conv(f"{name}.in_layers.2", inside, outside)
        self.linear(f"{name}.emb_layers.1", self.temb, outside * (1 + self.scale_shift))
        self.norm(f"{name}.out_layers.0", outside)
        self.conv(f"{name}.out_layers.3", outside, outside)
        if inside != outside:
            self.conv(f"{name}.skip_connection", inside, outside, 1)

    def attention(self, name: str, width: int) -> None:
        self.norm(f"{name}.norm", width)
        self.w |= {f"{name}.qkv.weight": self.randn(3 * width, width, 1), f"{name}.qkv.bias": self.randn(3 * width)}
        self.w |= {f"{name}.proj_out.weight": self.randn(width, width, 1), f"{name}.proj_out.bias": self.randn(width)}

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None, flags: OpenAIFlags) -> Tensor:
        """Run in float64, apart from the sines."""
        self.d = {name: tensor.double() for name, tensor in self.w.items()}
        half = self.temb // 8
        angle = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        emb = self.apply_linear("time_embed.0", torch.cat([angle.cos(), angle.sin()], dim=1).double())
        emb = self.apply_linear("time_embed.2", functional.silu(emb))
        if y is not None:
            emb = emb + self.d["label_emb.weight"][y]
        saved = []
        for i in itertools.takewhile(lambda i: self.has(f"input_blocks.{i}."), itertools.count()):
            x = self.run(f"input_blocks.{i}", x, emb, flags)
            saved.append(x)
        x = self.run("middle_block", x, emb, flags)
        for i in itertools.takewhile(lambda i: self.has(f"output_blocks.{i}."), itertools.count()):
            x = self.run(f"output_blocks.{i}", torch.cat([x, saved.pop()], dim=1), emb, flags)
        return self.apply_conv("out.2", functional.silu(self.apply_norm("out.0", x)))

    def has(self, start: str) -> bool:
        return any(name.startswith(start) for name in self.d)

    def run(self, block: str, x: Tensor, emb: Tensor, flags: OpenAIFlags) -> Tensor:
        for i in itertools.takewhile(lambda i: self.has(f"{block}.{i}."), itertools.count()):
            name = f"{block}.{i}"
            if self.has(f"{name}.in_layers"):
                x = self.run_resblock(name, x, emb)
            elif self.has(f"{name}.qkv"):
                x = self.run_attention(name, x, flags)
            elif self.has(f"{name}.op"):
                x = self.apply_conv(f"{name}.op", x, stride=2)
            elif self.has(f"{name}.conv"):
                x = self.apply_conv(f"{name}.conv", x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
            else:
                x = self.apply_conv(name, x)
        return x

    def run_resblock(self, name: str, x: Tensor, emb: Tensor) -> Tensor:
        h = self.apply_conv(f"{name}.in_layers.2", functional.silu(self.apply_norm(f"{name}.in_layers.0", x)))
        time = self.apply_linear(f"{name}.emb_layers.1", functional.silu(emb))[:, :, None, None]
        if self.scale_shift:
            width = h.shape[1]
            h = self.apply_norm(f"{name}.out_layers.0", h) * (1 + time[:, :width]) + time[:, width:]
        else:
            h = self.apply_norm(f"{name}.out_layers.0", h + time)
        h = self.apply_conv(f"{name}.out_layers.3", functional.silu(h))
        return h + (self.apply_conv(f"{name}.skip_connection", x) if self.has(f"{name}.skip_connection") else x)

    def run_attention(self, name: str, x: Tensor, flags: OpenAIFlags) -> Tensor:
        B, width, H, W = x.shape
        heads = flags.num_heads or width // (flags.num_head_channels or 0)
        qkv = torch.einsum(
            "oc,bcn->bon", self.d[f"{name}.qkv.weight"][:, :, 0], self.apply_norm(f"{name}.norm", x).flatten(2)
        )
        qkv = qkv + self.d[f"{name}.qkv.bias"][:, None]
        size, results = width // heads, []
        for k in range(heads):
            if flags.new_attention_order:
                q, key, v = (qkv[:, part * width + k * size :][:, :size] for part in range(3))
            else:
                q, key, v = (qkv[:, (3 * k + part) * size :][:, :size] for part in range(3))
            weights = torch.softmax(q.transpose(1, 2) @ key / math.sqrt(size), dim=-1)
            results.append(v @ weights.transpose(1, 2))
        out = torch.einsum("oc,bcn->bon", self.d[f"{name}.proj_out.weight"][:, :, 0], torch.cat(results, dim=1))
        return x + (out + self.d[f"{name}.proj_out.bias"][:, None]).reshape(B, width, H, W)

    def apply_linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.d[f"{name}.weight"].T + self.d[f"{name}.bias"]

    def apply_conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.d[f"{name}.weight"]
        return functional.conv2d(x, weight, self.d[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)

    def apply_norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), 32, -1)
        mean, variance = groups.mean(dim=2, keepdim=True), groups.var(dim=2, keepdim=True, correction=0)
        x = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
        return x * self.d[f"{name}.weight"][:, None, None] + self.d[f"{name}.bias"][:, None, None]
