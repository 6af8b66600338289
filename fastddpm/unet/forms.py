"""A UNet rebuilt for inference: same weights, same output to rounding, less work.

q, k and v are one projection. Where the network is to be compiled for a CPU, groups are normalised channel by channel,
pixels are convolved before they are upsampled, and 3x3 convolutions with enough of them run by Winograd's algorithm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastddpm.unet import winograd
from fastddpm.unet.blocks import Attention, ResnetBlock, Upsample
from fastddpm.unet.group_norm import ChannelsLastGroupNorm
from fastddpm.unet.subpixel import SubpixelUpsample
from fastddpm.unet.unet import UNet

# From this product of channels and 4x4 tiles on, Winograd's transforms and its fourfold weights cost less than its
# fewer products save. In the network of google/ddpm-cifar10-32, half of it (16 tiles of 256 channels: 16x16 at batch 1,
# 8x8 at batch 4) would gain another 6 % for another 120 MB and more.
MIN_TILE_CHANNELS = 64 * 128
MIN_CHANNELS = 64


def is_plain(unet: UNet) -> bool:
    """Whether a network is what its class says, so that the inference form computes the same.

    It is not with dropout active, with hooks, or with layers, methods, activations or numbers (a convolution's padding
    mode, an eps) that somebody replaced: compiled code is kept under the hash of the configuration and the weights.
    """
    if any(module.training for module in unet.modules()) or not all(map(_is_original, unet.modules())):
        return False
    with torch.device("meta"):
        expected = _settings(UNet(unet.config, zero_init=False))
    found = _settings(unet)
    return all(name in found and found[name] == value for name, value in expected.items())


def _settings(unet: UNet) -> dict[tuple[str, str], object]:
    return {
        (name, key): value
        for name, module in unet.named_modules()
        for key, value in vars(module).items()
        # Dropout is not active.
        if (callable(value) or isinstance(value, int | float | str | tuple)) and key not in ("training", "p")
    }


def _is_original(module: nn.Module) -> bool:
    return (
        type(module).__module__ in _ORIGIN
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


_ORIGIN = {cls.__module__ for cls in (UNet, Attention, nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Embedding)} | {
    cls.__module__ for cls in (nn.Dropout, nn.ModuleList)
}


class MergedAttention(Attention):
    """Self-attention whose q, k and v come from one matrix multiplication."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.heads, self.output_scale_factor = attention.heads, attention.output_scale_factor
        self.group_norm, self.to_out = attention.group_norm, attention.to_out
        parts = (attention.to_q, attention.to_k, attention.to_v)
        self.to_qkv = nn.Linear(parts[0].in_features, 3 * parts[0].out_features, device="meta")
        self.to_qkv.weight = _constant(torch.cat([part.weight for part in parts]))
        self.to_qkv.bias = _constant(torch.cat([part.bias for part in parts]))

    def project(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """[B, HW, C] -> q, k and v."""
        # As one matrix: PyTorch would multiply the tokens of a channels-last image by a copy of the weights per image.
        return self.to_qkv(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2]).chunk(3, dim=2)


class ShiftedResnetBlock(ResnetBlock):
    """A residual block whose second normalisation takes the time projection, a number per channel, as it is."""

    def __init__(self, block: ResnetBlock) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(block))

    def norm_shifted(self, h: Tensor, time: Tensor) -> Tensor:
        """The second normalisation, of [B, C, H, W] plus [B, C]."""
        return self.norm2(h, time)


def inference_form(unet: UNet) -> UNet:
    """Return a copy for inference with one projection for q, k and v, which shares all other weights."""
    tensors = [*unet.parameters(), *unet.buffers()]
    form = copy.deepcopy(unet, {id(tensor): tensor for tensor in tensors})
    _replace(form, lambda layer: MergedAttention(layer) if isinstance(layer, Attention) else layer)
    return form


def _replace(form: nn.Module, made: Callable[[nn.Module], nn.Module]) -> None:
    """Put what is made of it in the place of each layer of a network."""
    for parent in list(form.modules()):
        for name, layer in parent.named_children():
            setattr(parent, name, made(layer))


class PackedConv2d(nn.Module):
    """A convolution on a CPU whose weights oneDNN lays out for images of one size, and not in every call."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._how = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self._size, self._packed = torch.Size(), torch.empty(0, device=conv.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W], channels last -> [B, C_out, H', W'], likewise."""
        if x.shape != self._size:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self._how, x.shape)
            self._size = x.shape
        return torch.ops.mkldnn._convolution_pointwise(x, self._packed, self.bias, *self._how, "none", [], "")


def use_channels_last(form: UNet, *, pack: bool = False) -> None:
    """Give the convolutions of a network from `inference_form` channels-last weights of their own, or packed ones."""

    def made(layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Conv2d):
            if pack and packs(layer.weight):
                return PackedConv2d(layer)
            layer.weight = _constant(layer.weight.contiguous(memory_format=torch.channels_last))
        return layer

    _replace(form, made)


def packs(weight: Tensor) -> bool:
    """Whether oneDNN lays out a convolution's weights here."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def use_channels_last_norms(form: UNet) -> None:
    """Replace the normalisations of a network from `inference_form` by `ChannelsLastGroupNorm`."""

    def made(layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.GroupNorm):
            return ChannelsLastGroupNorm(layer)
        return ShiftedResnetBlock(layer) if isinstance(layer, ResnetBlock) else layer

    _replace(form, made)


def use_winograd(form: UNet, batch: int, height: int, width: int) -> None:
    """Replace the convolutions of a network for images [batch, C, height, width] that are faster by Winograd's method.

    Args:
        form: from `inference_form`; changed in place.
    """
    deepest = len(form.down_blocks) - 1
    levels = [*enumerate(form.down_blocks), (deepest, form.mid_block)]
    levels += [(deepest - i, block) for i, block in enumerate(form.up_blocks)]
    for level, block in levels:
        h, w = height >> level, width >> level
        for parent in list(block.modules()):
            for name, child in parent.named_children():
                if isinstance(child, Upsample) and _pays(child.conv, batch, 2 * h, 2 * w):
                    setattr(parent, name, winograd.WinogradUpsample(child.conv))
                elif isinstance(child, nn.Conv2d) and not isinstance(parent, Upsample) and _pays(child, batch, h, w):
                    setattr(parent, name, winograd.WinogradConv2d(child))


def use_subpixels(form: UNet) -> None:
    """Replace what upsampling a network from `inference_form` has left by `SubpixelUpsample`."""
    _replace(form, lambda layer: SubpixelUpsample(layer.conv) if isinstance(layer, Upsample) else layer)


def _pays(conv: nn.Conv2d, batch: int, height: int, width: int) -> bool:
    """Whether Winograd's method is faster for an output [batch, C, height, width]."""
    tile = winograd.TILE
    tiles = batch * (height // tile) * (width // tile)
    channels = min(conv.in_channels, conv.out_channels)
    whole = height % tile == 0 and width % tile == 0
    enough = channels >= MIN_CHANNELS and tiles * channels >= MIN_TILE_CHANNELS
    return winograd.fits(conv) and whole and enough


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
