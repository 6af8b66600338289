"""Networks of OpenAI's improved-diffusion and guided-diffusion as this library's `UNet`, where the two are the same.

Their UNetModel (Nichol & Dhariwal 2021; Dhariwal & Nichol 2021) is UNet2DModel's arithmetic under other names as long
as it resamples by convolutions, has the same number of residual blocks per resolution and one width per attention
head. Anything else is refused, by name. What the weights do not say (heads, schedule) the caller does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddpm.files.tensors import LoadedTensors
from fastddpm.schedules.betas import named_betas
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.schedules.schedule import Schedule
from fastddpm.unet.config import UNetConfig
from fastddpm.unet.load import build_unet
from fastddpm.unet.unet import UNet

# Their GroupNorm always has 32 groups and torch's eps.
_GROUPS, _NORM_EPS = 32, 1e-5
# Networks trained with rescaled timesteps are given numbers from 0 to 1000.
_RESCALED_T = 1000

_INSIDE = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)|(middle_block)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class OpenAIFlags:
    """What OpenAI's scripts take as flags and do not store; the defaults are theirs, None means it must be said.

    Attributes:
        num_heads: heads of every attention layer; or
        num_head_channels: width of every head.
        new_attention_order: their use_new_attention_order.
        image_size: height and width of the training images, where the caller wants it recorded.
        diffusion_steps: T.
        noise_schedule: "linear" or "cosine".
        rescale_timesteps: the network was given t * 1000 / T; only matters where T is not 1000.
        predict_xstart: the network predicts x_0.
        sigma_small: fixed variance beta_tilde instead of beta; learned variances do not use it.
    """

    num_heads: int | None = None
    num_head_channels: int | None = None
    new_attention_order: bool = False
    image_size: int | None = None
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    rescale_timesteps: bool | None = None
    predict_xstart: bool = False
    sigma_small: bool = False


def convert_unet(weights: Mapping[str, Tensor], flags: OpenAIFlags, source: Path) -> UNet:
    """Build the UNet that computes what the UNetModel with these weights computes; `source` is named in messages.

    Raises:
        ValueError: it is no UNetModel, has a feature that UNet does not have, or a flag is missing or does not fit.
    """
    config = _infer_config(weights, flags)
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        renamed |= _rename(name, tensor, config, flags)
    return build_unet(config, LoadedTensors(source, renamed), {name: name for name in renamed})


def diffusion_of(flags: OpenAIFlags, *, learned: bool) -> DiffusionConfig:
    """Return the diffusion that create_gaussian_diffusion would build, for a network that is given whole timesteps.

    With rescale_timesteps and T = 1000 k the network was given t / k: every k-th timestep is the process whose network
    is given 0 .. 999, and exactly the respacing "ddim1000" of the original (Nichol & Dhariwal 2021, section 4).

    Raises:
        ValueError: a flag is missing, or the timesteps cannot be made whole.
    """
    T, name = flags.diffusion_steps, flags.noise_schedule
    if name not in ("linear", "cosine"):
        raise ValueError(f"unknown noise_schedule {name!r}; OpenAI's are linear and cosine")
    if T != _RESCALED_T and flags.rescale_timesteps is None:
        raise ValueError(
            f"with diffusion_steps = {T} it matters whether the network was trained with rescale_timesteps "
            "(improved-diffusion's default: yes, guided-diffusion's: no); say which"
        )
    # At T = 1000 "linear" is the same numbers, under the name that diffusers knows.
    schedule = "linear_rescaled" if name == "linear" and T != _RESCALED_T else name
    process: dict[str, Any] = {"beta_schedule": schedule, "num_timesteps": T}
    if T != _RESCALED_T and flags.rescale_timesteps:
        if T % _RESCALED_T:
            raise ValueError(
                f"a network with rescale_timesteps and diffusion_steps = {T} is given fractions of timesteps, which "
                "this format cannot say; use it through fastddpm.integrations.openai"
            )
        kept = torch.arange(0, T, T // _RESCALED_T, device="cpu")
        betas = Schedule(named_betas(schedule, T)).respaced(kept).betas
        process = {"trained_betas": tuple(betas.tolist()), "num_timesteps": _RESCALED_T}
    return DiffusionConfig(
        **process,
        prediction_type="x_0" if flags.predict_xstart else "epsilon",
        variance_type="learned_range" if learned else "fixed_small" if flags.sigma_small else "fixed_large",
    )


def _infer_config(weights: Mapping[str, Tensor], flags: OpenAIFlags) -> UNetConfig:
    blocks = _input_blocks(weights)
    widths: list[int] = []
    counts: list[int] = []
    attends: list[bool] = []
    for i, kind in enumerate(blocks):
        if i == 0 or blocks[i - 1] == "down":
            widths.append(0)
            counts.append(0)
            attends.append(f"input_blocks.{i + 1}.1.qkv.weight" in weights)
        if kind == "res":
            widths[-1] = _shape(weights, f"input_blocks.{i + 1}.0.in_layers.2.weight")[0]
            counts[-1] += 1
    if len(set(counts)) != 1:
        raise ValueError(f"unequal numbers of residual blocks per resolution ({counts}), or none, are not supported")
    out_channels, in_channels = _shape(weights, "out.2.weight")[0], _shape(weights, "input_blocks.0.0.weight")[1]
    # A super-resolution network takes 6 channels, and returns 6 where its variance is learned.
    if in_channels == 6 or out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"the network takes {in_channels} channels and returns {out_channels}: super-resolution networks, which "
            "are given a second image, are not supported"
        )
    temb, first = _shape(weights, "time_embed.0.weight")
    if first != widths[0]:
        raise ValueError(f"a time embedding of width {first} in a network whose first width is {widths[0]}")
    resnet_time = _shape(weights, "input_blocks.1.0.emb_layers.1.weight")[0]
    return UNetConfig(
        sample_size=flags.image_size,
        in_channels=in_channels,
        out_channels=out_channels,
        time_embedding_dim=temb,
        down_block_types=tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends),
        up_block_types=tuple("AttnUpBlock2D" if attention else "UpBlock2D" for attention in attends[::-1]),
        block_out_channels=tuple(widths),
        layers_per_block=counts[0],
        attention_head_dim=_head_dim(widths, attends, flags),
        norm_num_groups=_GROUPS,
        attn_norm_num_groups=_GROUPS,
        norm_eps=_NORM_EPS,
        resnet_time_scale_shift="scale_shift" if resnet_time == 2 * widths[0] else "default",
        num_class_embeds=_shape(weights, "label_emb.weight")[0] if "label_emb.weight" in weights else None,
    )


def _input_blocks(weights: Mapping[str, Tensor]) -> list[str]:
    """Return "res" or "down" for each block of the way down after the first convolution."""
    indices = {int(match[2]) for name in weights if (match := _BLOCK.match(name)) and match[1] == "input_blocks"}
    if not any(name.startswith("output_blocks.") for name in weights):
        raise ValueError("a network with no way up: classifiers are not supported")
    if any(re.match(r"output_blocks\.\d+\.[12]\.in_layers", name) for name in weights):
        raise ValueError("residual blocks that resample (resblock_updown=True) are not supported")
    if sorted(indices) != list(range(len(indices))) or len(indices) < 2:
        raise ValueError(
            "blocks without weights: resampling without convolutions (conv_resample=False) is not supported"
        )
    if _shape(weights, "input_blocks.0.0.weight")[2:] != (3, 3):
        raise ValueError("the first convolution is not 3x3: only networks for images (dims=2) are supported")
    return ["down" if f"input_blocks.{i}.0.op.weight" in weights else "res" for i in range(1, len(indices))]


def _head_dim(widths: list[int], attends: list[bool], flags: OpenAIFlags) -> int | None:
    """Return the width of a head, None for one head; the weights say nothing of it."""
    attended = {width for width, attention in zip(widths, attends, strict=True) if attention} | {widths[-1]}
    if flags.num_head_channels is not None:
        if flags.num_heads is not None:
            raise ValueError("give num_heads or num_head_channels, not both")
        return flags.num_head_channels
    if flags.num_heads is None:
        raise ValueError(
            "the weights do not say how many attention heads there are; give num_heads or num_head_channels as the "
            "network was trained (improved-diffusion's default is num_heads = 4)"
        )
    if flags.num_heads == 1:
        return None
    if len(attended) > 1 or max(attended) % flags.num_heads:
        raise ValueError(
            f"num_heads = {flags.num_heads} at the widths {sorted(attended)} makes heads of different widths, which "
            "the configuration cannot say; use the network through fastddpm.integrations.openai"
        )
    return max(attended) // flags.num_heads


def _rename(name: str, tensor: Tensor, config: UNetConfig, flags: OpenAIFlags) -> dict[str, Tensor]:
    """Return one tensor of theirs under our names: one, or three for qkv."""
    layer, _, kind = name.rpartition(".")
    if layer in _OUTSIDE:
        return {f"{_OUTSIDE[layer]}.{kind}": tensor}
    match = _BLOCK.fullmatch(layer)
    unknown = ValueError(f"unknown parameter {name!r}: not a UNetModel of improved-diffusion or guided-diffusion")
    if match is None:
        raise unknown
    part = match[4] or match[7]
    if match[5]:
        place = f"mid_block.{_MIDDLE.get(match[6], '?')}"
    else:
        down, index = match[1] == "input_blocks", int(match[2])
        level, j = divmod(index - 1 if down else index, config.layers_per_block + 1)
        block = f"{'down' if down else 'up'}_blocks.{level}"
        if part in ("op", "conv"):
            return {f"{block}.{'downsamplers' if down else 'upsamplers'}.0.conv.{kind}": tensor}
        place = f"{block}.{'resnets' if match[3] == '0' else 'attentions'}.{j}"
    if part == "qkv":
        return {f"{place}.to_{q}.{kind}": rows for q, rows in _split_qkv(tensor, config, flags).items()}
    if part not in _INSIDE:
        raise unknown
    # Attention is made of 1x1 convolutions there.
    return {f"{place}.{_INSIDE[part]}.{kind}": tensor.flatten(1) if part == "proj_out" and kind == "weight" else tensor}


def _split_qkv(tensor: Tensor, config: UNetConfig, flags: OpenAIFlags) -> dict[str, Tensor]:
    """Split [3C, ...]: rows are ordered (head, qkv, channel), or (qkv, head, channel) in the new order."""
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor
    width = len(rows) // 3
    head_dim = config.attention_head_dim or width
    if len(rows) % 3 or width % head_dim:
        raise ValueError(
            f"{width} channels of attention do not divide into heads of {head_dim}; check num_head_channels"
        )
    heads = width // head_dim
    shape = (3, heads, head_dim) if flags.new_attention_order else (heads, 3, head_dim)
    split = rows.unflatten(0, shape)
    split = split if flags.new_attention_order else split.transpose(0, 1)
    return {name: part.flatten(0, 1).contiguous() for name, part in zip("qkv", split, strict=True)}


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in weights or math.prod(weights[name].shape) == 0:
        raise ValueError(f"no parameter {name!r}: not a UNetModel of improved-diffusion or guided-diffusion")
    return tuple(weights[name].shape)
