"""Ho et al.'s networks in the names of their TensorFlow code, as PyTorch ports of it and the DDIM authors' code keep.

The arithmetic is UNet2DModel's with one attention head, sines before cosines and padding on two sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fastddpm.checks import shown
from fastddpm.files.tensors import LoadedTensors
from fastddpm.unet.config import UNetConfig
from fastddpm.unet.load import build_unet
from fastddpm.unet.unet import UNet

_RENAMED = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^temb\.dense\.0\.", "time_embedding.linear_1."),
        (r"^temb\.dense\.1\.", "time_embedding.linear_2."),
        (r"^norm_out\.", "conv_norm_out."),
        (r"^mid\.block_1\.", "mid_block.resnets.0."),
        (r"^mid\.block_2\.", "mid_block.resnets.1."),
        (r"^mid\.attn_1\.", "mid_block.attentions.0."),
        (r"^(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
        (r"^(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
        (r"^(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
        (r"(\.resnets\.\d+)\.temb_proj\.", r"\1.time_emb_proj."),
        (r"(\.resnets\.\d+)\.nin_shortcut\.", r"\1.conv_shortcut."),
        (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    )
]


def convert_unet(weights: Mapping[str, Tensor], source: Path) -> UNet:
    """Build the UNet that computes what Ho et al.'s network with these weights computes.

    Raises:
        ValueError: it is of another build.
    """
    config = _infer_config(weights)
    renamed = {_rename(name, len(config.block_out_channels)): tensor for name, tensor in weights.items()}
    # Attention is made of 1x1 convolutions there.
    flat = {
        name: tensor.flatten(1) if ".attentions." in name and tensor.dim() == 4 else tensor
        for name, tensor in renamed.items()
    }
    return build_unet(config, LoadedTensors(source, flat), {name: name for name in flat})


def _infer_config(weights: Mapping[str, Tensor]) -> UNetConfig:
    """Read the architecture off the parameters' shapes; groups, eps and activation are the paper's code's.

    Raises:
        ValueError: parameters are missing, or the network is of another build than UNet2DModel's.
    """
    levels = 1 + max(int(name.split(".")[1]) for name in weights if re.match(r"down\.\d{1,3}\.block\.0\.conv1", name))
    counts = {sum(f"down.{i}.block.{j}.conv1.weight" in weights for j in range(len(weights))) for i in range(levels)}
    needed = ["conv_in.weight", "conv_out.weight", *(f"down.{i}.block.0.conv1.weight" for i in range(levels))]
    missing = [name for name in needed if name not in weights or weights[name].dim() != 4]
    if missing or len(counts) != 1:
        raise ValueError(
            f"a network in Ho et al.'s names with {shown(sorted(counts))} residual blocks per resolution"
            + f", without a {missing[0]} of four dimensions" * bool(missing)
        )
    attends = [f"down.{i}.attn.0.q.weight" in weights for i in range(levels)]
    return UNetConfig(
        in_channels=weights["conv_in.weight"].shape[1],
        out_channels=weights["conv_out.weight"].shape[0],
        flip_sin_to_cos=False,
        freq_shift=1,
        down_block_types=tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends),
        up_block_types=tuple("AttnUpBlock2D" if attention else "UpBlock2D" for attention in attends[::-1]),
        block_out_channels=tuple(weights[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        layers_per_block=counts.pop(),
        downsample_padding=0,
        attention_head_dim=None,
        norm_eps=1e-6,
        add_attention="mid.attn_1.q.weight" in weights,
    )


def _rename(name: str, levels: int) -> str:
    for pattern, new in _RENAMED:
        name = pattern.sub(new, name)
    # UNet2DModel's way up begins at the coarsest level.
    return re.sub(r"^up_blocks\.(\d{1,3})", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)
