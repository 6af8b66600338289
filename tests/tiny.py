"""Tiny UNets of 8x8 images, which most tests need and few care about; a test changes what it is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastddpm.unet.unet import UNet, UNetConfig

# Two levels, attention in the middle only: little to compile.
PLAIN = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
# Attention in the lower level too, and widths that differ.
ATTENTION = {
    **PLAIN,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
RGB = {**ATTENTION, "in_channels": 3, "out_channels": 3}


def tiny_unet(base: Mapping[str, Any] = PLAIN, **changes: Any) -> UNet:
    """Build a UNet in eval mode, whose output is not zero; the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(UNetConfig(**{**base, **changes}), zero_init=False).eval()
