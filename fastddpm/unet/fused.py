"""A UNet's form for a GPU whose normalisations are one kernel each, together with the additions before them.

A block leaves its output as a sum that nobody has added up; the normalisation that reads it does so, reads a skip
connection where it is, and stores both side by side for the shortcut, which is one product then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastddpm.ops.group_norm import group_norm
from fastddpm.unet.blocks import Attention, DownBlock, MidBlock, ResnetBlock, UpBlock
from fastddpm.unet.unet import UNet


class Sum:
    """x + bias + residual, [B, C, H, W], added up when first needed."""

    def __init__(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        self.parts = (x, bias, residual)

    @property
    def value(self) -> Tensor:
        """The sum."""
        x, bias, residual = self.parts
        if bias is not None:
            x = x + bias[:, None, None]
        x = x if residual is None else x + residual
        self.parts = (x, None, None)
        return x

    def normalise(
        self,
        norm: nn.GroupNorm,
        *,
        silu: bool,
        skip: Sum | None = None,
        time: Tensor | None = None,
        scale_shift: bool = False,
        keep: bool = True,
    ) -> Tensor:
        """Normalise the sum, with the channels of skip behind it; see `ops.group_norm`.

        `keep`: it is needed again, and is added up from then on, those channels included.
        """
        x, bias, residual = self.parts
        pending = keep and (*self.parts[1:], skip) != (None, None, None)
        y, u = group_norm(
            x,
            norm.weight,
            norm.bias,
            norm.num_groups,
            norm.eps,
            skip=None if skip is None else skip.value,
            residual=residual,
            bias=bias,
            time=time,
            scale_shift=scale_shift,
            silu=silu,
            keep=pending,
        )
        if pending:
            self.parts = (u, None, None)
        return y


def denoise(unet: UNet, x: Tensor, time: Sequence[Tensor]) -> Tensor:
    """`UNet.denoise` of a network from `forms.inference_form`, whose convolutions are channels-last."""
    times = iter(time)
    h = _conv(unet.conv_in, 2 * x - 1 if unet.config.center_input_sample else x)
    skips = [h]
    for block in unet.down_blocks:
        assert isinstance(block, DownBlock)
        outputs = list(_layers(block, h, times))
        skips += outputs
        h = outputs[-1]
        if block.downsamplers is not None:
            (down,) = block.downsamplers
            h = _conv(down.conv, functional.pad(h.value, (0, 1, 0, 1)) if down.pad_after else h.value)  # type: ignore[arg-type]
            skips.append(h)
    *_, h = _layers(unet.mid_block, h, times)
    for block in unet.up_blocks:
        assert isinstance(block, UpBlock)
        *_, h = _layers(block, h, times, skips)
        if block.upsamplers is not None:
            (up,) = block.upsamplers
            h = _conv(up.conv, functional.interpolate(h.value, scale_factor=2.0, mode="nearest"))  # type: ignore[arg-type]
    return unet.conv_out(h.normalise(unet.conv_norm_out, silu=True, keep=False))


def _layers(
    block: DownBlock | MidBlock | UpBlock, h: Sum, times: Iterator[Tensor], skips: list[Sum] | None = None
) -> Iterator[Sum]:
    """The output of each residual block, and of the attention behind it, which the last of a middle block lacks."""
    for i, resnet in enumerate(block.resnets):
        h = _resnet(resnet, h, next(times), None if skips is None else skips.pop())  # type: ignore[arg-type]
        if block.attentions is not None and i < len(block.attentions):
            h = _attend(block.attentions[i], h)  # type: ignore[arg-type]
        yield h


def _conv(conv: nn.Conv2d, x: Tensor) -> Sum:
    return Sum(conv._conv_forward(x, conv.weight, None), conv.bias)


def _resnet(block: ResnetBlock, x: Sum, time: Tensor, skip: Sum | None = None) -> Sum:
    silu = block.act is functional.silu

    def act(h: Tensor) -> Tensor:
        return h if silu else block.act(h)

    h = _conv(block.conv1, act(x.normalise(block.norm1, silu=silu, skip=skip)))
    h = _conv(
        block.conv2, act(h.normalise(block.norm2, silu=silu, time=time, scale_shift=block.scale_shift, keep=False))
    )
    shortcut = x.value if block.conv_shortcut is None else _product(block.conv_shortcut, x.value)
    if block.output_scale_factor == 1.0:
        return Sum(*h.parts[:2], shortcut)
    return Sum((shortcut + h.value) / block.output_scale_factor)


def _product(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution as one product, whose kernel adds the bias."""
    batch, _, height, width = x.shape
    assert conv.bias is not None
    out = torch.addmm(conv.bias, x.movedim(1, -1).flatten(0, 2), conv.weight.flatten(1).t())
    return out.view(batch, height, width, -1).movedim(-1, 1)


def _attend(attention: Attention, x: Sum) -> Sum:
    h = x.value if attention.group_norm is None else x.normalise(attention.group_norm, silu=False)
    h = attention.attend(h)
    if attention.output_scale_factor == 1.0:
        return Sum(h, None, x.value)
    return Sum((x.value + h) / attention.output_scale_factor)
