"""Nearest upsampling by 2 and the 3x3 convolution behind it as one 2x2 convolution: 4 products an output instead of 9.

Of the three pixels under the kernel along a dimension, two are copies of one: an output in an even place sees its
weights a, b, c as a, b + c, one in an odd place as a + b, c. All four kinds of places are convolved at once, as
channels, and then put where they belong (Shi et al. 2016, arXiv:1609.05158, section 3.2). Written for torch.compile,
which fuses the last step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SubpixelUpsample(nn.Module):
    """Upsampling of channels-last images and the convolution behind it.

    Args:
        conv: 3x3 with stride 1 and padding 1; its weights are added up in float64 and rounded once.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        kinds = _pair(_pair(conv.weight.detach().double(), -2), -1)  # [2, 2, C_out, C_in, 2, 2]
        self.register_buffer("weight", kinds.flatten(0, 2).to(conv.weight.dtype), persistent=False)
        self.register_buffer("bias", conv.bias.detach().repeat(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, 2H, 2W], channels last."""
        B, _, H, W = x.shape
        y = functional.conv2d(x, self.weight, self.bias, padding=1).permute(0, 2, 3, 1)  # [B, H + 1, W + 1, 4 C_out]
        kinds = y.chunk(4, dim=-1)
        rows = [
            torch.stack([kinds[2 * i + j][:, i : i + H, j : j + W] for j in (0, 1)], dim=3)  # [B, H, W, 2, C_out]
            for i in (0, 1)
        ]
        return torch.stack(rows, dim=2).reshape(B, 2 * H, 2 * W, -1).permute(0, 3, 1, 2)


def _pair(weight: Tensor, dim: int) -> Tensor:
    """Kernels of the outputs in even and in odd places along a dimension of 3, side by side in front.

    Returns:
        [..., O, I, ...] -> [..., 2, O, I, ...], the dimension being 2.
    """
    a, b, c = weight.unbind(dim)
    even, odd = torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)
    return torch.stack([even, odd], dim=weight.dim() - 4)
