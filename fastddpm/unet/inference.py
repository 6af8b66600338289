"""The UNet as a sampler wants it: same weights, same output to rounding, less work per step.

What does not depend on x_t (the time embedding and its projections in every residual block) is computed once per run
and looked up by row and label; q, k and v are one projection; images and weights are channels last; and where the
network is compiled on a CPU, weights are constants that oneDNN packs, groups are normalised channel by channel, pixels
are convolved before they are upsampled, 3x3 convolutions with enough of them run by Winograd's algorithm, and a large
batch runs in slices whose activations stay in the cache.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastddpm.machine.torch_compile import Compiled, own_code
from fastddpm.unet import winograd
from fastddpm.unet.blocks import Attention, ResnetBlock, Upsample, timestep_embedding
from fastddpm.unet.group_norm import ChannelsLastGroupNorm
from fastddpm.unet.subpixel import SubpixelUpsample
from fastddpm.unet.unet import UNet

# From this product of channels and 4x4 tiles on, Winograd's transforms and its fourfold weights cost less than its
# fewer products save. In the network of google/ddpm-cifar10-32, half of it (16 tiles of 256 channels: 16x16 at batch 1,
# 8x8 at batch 4) would gain another 6 % for another 120 MB and more.
MIN_TILE_CHANNELS = 64 * 128
MIN_CHANNELS = 64

# What the first activation of a slice takes per thread. Slices of 2 and 4 MB were slower, and so were halves of it.
SLICE_BYTES = 1 << 20


class UNetForms:
    """Makes a UNet's networks for sampling; what they can share (packed weights, compiled code) is made once.

    Args:
        unet: the network in eval mode, on its device and in its dtype; not changed. Its weights are taken when the
            first image arrives.
        timesteps: [R], what the rows of the table ask for.
        compile_model: run it through torch.compile.
        strict: raise where that fails, instead of running uncompiled.
    """

    def __init__(self, unet: UNet, timesteps: Tensor, *, compile_model: bool, strict: bool) -> None:
        self.unet, self.timesteps = unet, timesteps
        self._compile_model, self._strict = compile_model, strict
        self._denoise: dict[torch.Size, Callable[..., Tensor]] = {}

    def __call__(self, batch: int) -> UNetInference:
        """Return a network for `batch` rows of x."""
        return UNetInference(self, batch)

    def denoise(self, x: Tensor, time: Tensor) -> Tensor:
        """`UNet.denoise` in the form for x's shape, given the blocks' time projections side by side."""
        if x.shape not in self._denoise:
            self.unet.check_image(x)
            self._denoise[x.shape] = self._build(x)
        return self._denoise[x.shape](x, time)

    def _build(self, x: Tensor) -> Callable[..., Tensor]:
        constant = self._compile_model and x.device.type == "cpu"
        if constant and x.dtype == torch.float32:
            rows = slice_rows(x, self.unet.config.block_out_channels[0])
            if rows < len(x):
                return functools.partial(in_slices, self.denoise, rows)
        form = inference_form(self.unet)
        if constant:
            # oneDNN lays the weights out itself.
            use_channels_last_norms(form)
            use_winograd(form, x.shape[0], x.shape[2], x.shape[3])
            use_subpixels(form)
        else:
            use_channels_last(form)
        widths = time_widths(self.unet)

        def denoise(x: Tensor, time: Tensor) -> Tensor:
            return form.denoise(x, time.split(widths, dim=1))

        if not self._compile_model:
            return denoise
        return Compiled(own_code(denoise), strict=self._strict, constant=constant)


class UNetInference:
    """A `Network`: one UNet, one batch size, and its run's timesteps and labels."""

    memory_format = torch.channels_last
    reads_t = False

    def __init__(self, forms: UNetForms, batch: int) -> None:
        self._forms, self._batch = forms, batch
        unet, rows = forms.unet, len(forms.timesteps)
        width = sum(time_widths(unet))
        classes = unet.config.num_class_embeds
        # Labels in use: at most one per row of x, and no more than there are.
        self._slots = 1 if classes is None else min(batch, classes)
        like = unet.conv_in.weight
        self._table = like.new_empty(rows, self._slots, width)
        self._time = like.new_empty(batch, width)
        self._slot = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self._index = torch.zeros_like(self._slot)
        self._labels: Tensor | None = None

    @torch.no_grad()
    def load(self, class_labels: Tensor | None) -> None:
        """Compute every block's time projection for all rows and the labels of the next run."""
        labels = self._in_use(class_labels)
        if self._labels is not None and torch.equal(labels, self._labels):
            return
        unique, slot = labels.unique(return_inverse=True)
        self._slot.copy_(slot)
        self._table[:, : len(unique)].copy_(time_table(self._forms.unet, self._forms.timesteps, unique))
        self._labels = labels

    def __call__(self, x: Tensor, t: Tensor, row: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Predict from x [B, C, H, W] at a row [1] of the table; t and class_labels were looked up by `load`."""
        unknown = kwargs.keys() - {"class_labels"}
        if unknown:
            raise TypeError(f"the UNet takes class_labels only, got {', '.join(sorted(unknown))} in model_kwargs")
        torch.add(self._slot, row, alpha=self._slots, out=self._index)
        torch.index_select(self._table.flatten(0, 1), 0, self._index, out=self._time)
        return self._forms.denoise(x, self._time)

    def _in_use(self, class_labels: Tensor | None) -> Tensor:
        config = self._forms.unet.config
        if config.num_class_embeds is None:
            if class_labels is not None:
                raise ValueError("class_labels given to a network without classes (num_class_embeds is None)")
            return torch.zeros_like(self._slot)
        if class_labels is not None:
            return class_labels.clone()
        if config.null_class is None:
            raise ValueError(f"this network has {config.num_class_embeds} classes and no null class: pass class_labels")
        return torch.full_like(self._slot, config.null_class)


def slice_rows(x: Tensor, channels: int) -> int:
    """How many images of a batch to denoise at a time.

    Args:
        x: the batch.
        channels: of the activations at x's resolution.

    Returns:
        The size near `SLICE_BYTES` per thread, if need be half or twice that, which divides the batch best.
    """
    image = channels * x.shape[2:].numel() * x.element_size()
    wanted = max(1, SLICE_BYTES * torch.get_num_threads() // image)
    return min(range(wanted // 2 + 1, 2 * wanted + 1), key=lambda rows: (-len(x) % rows, abs(rows - wanted)))


def in_slices(denoise: Callable[[Tensor, Tensor], Tensor], rows: int, x: Tensor, time: Tensor) -> Tensor:
    """Denoise a batch `rows` images at a time; the last slice repeats some of the one before if it has to."""
    parts = []
    for start in range(0, len(x), rows):
        first = min(start, len(x) - rows)
        part = denoise(x[first : first + rows], time[first : first + rows])
        parts.append(part[start - first :])
    return torch.cat(parts)


def time_widths(unet: UNet) -> list[int]:
    """The widths of the residual blocks' time projections."""
    return [resnet.time_emb_proj.out_features for resnet in unet.resnets()]


def time_table(unet: UNet, timesteps: Tensor, labels: Tensor) -> Tensor:
    """Every residual block's projection of the embedding of every timestep and label, side by side.

    Computed in float32 whatever the weights' dtype, and rounded to it once.

    Args:
        unet: the network.
        timesteps: [R].
        labels: int64 [L]; any single value where the network has no classes.

    Returns:
        [R, L, sum of the widths of the projections] in the weights' dtype.
    """

    def linear(layer: nn.Linear, x: Tensor) -> Tensor:
        return functional.linear(x, layer.weight.float(), layer.bias.float())

    config, embedding = unet.config, unet.time_embedding
    emb = timestep_embedding(
        timesteps, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
    )
    temb = linear(embedding.linear_2, functional.silu(linear(embedding.linear_1, emb)))[:, None]  # [R, 1, D]
    if unet.class_embedding is not None:
        temb = temb + unet.class_embedding.weight.float()[labels]
    return torch.cat([linear(r.time_emb_proj, r.act(temb)) for r in unet.resnets()], dim=-1).to(unet.dtype)


def is_plain(unet: UNet) -> bool:
    """Whether a network is what its class says, so that the inference form computes the same.

    It is not with dropout active, with hooks, or with layers or methods that somebody replaced.
    """
    return not any(module.training for module in unet.modules()) and all(map(_is_original, unet.modules()))


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
    for parent in list(form.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Attention):
                setattr(parent, name, MergedAttention(child))
    return form


def use_channels_last(form: UNet) -> None:
    """Give the convolutions of a network from `inference_form` channels-last weights of their own."""
    for module in form.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = _constant(module.weight.contiguous(memory_format=torch.channels_last))


def use_channels_last_norms(form: UNet) -> None:
    """Replace the normalisations of a network from `inference_form` by `ChannelsLastGroupNorm`."""
    for parent in list(form.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, ChannelsLastGroupNorm(child))
            elif isinstance(child, ResnetBlock):
                setattr(parent, name, ShiftedResnetBlock(child))


def use_winograd(form: UNet, batch: int, height: int, width: int) -> None:
    """Replace the convolutions of a network for images [batch, C, height, width] that are faster by Winograd's method.

    Args:
        form: from `inference_form`; changed in place.
        batch, height, width: of the input.
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
    for parent in list(form.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Upsample):
                setattr(parent, name, SubpixelUpsample(child.conv))


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
