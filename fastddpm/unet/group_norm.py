"""Group normalisation of channels-last images in three passes along the channels (Wu & He 2018, arXiv:1803.08494).

Written for torch.compile on a CPU. Its own code for the statistics of a group goes through the few channels of one
group at each pixel, and fills a fraction of a vector register; sums over the pixels of every channel fill them all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelsLastGroupNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over each group of channels, float32 inside.

    Args:
        norm: the layer to replace, with weight and bias.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias"):
            values = getattr(norm, name).detach().float().view(norm.num_groups, -1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Normalise x + shift, which is never formed: [B, C, H, W] and [B, C] -> [B, C, H, W] in x's dtype."""
        values = x.to(torch.float32)
        means = values.mean((2, 3))
        shifts = torch.zeros_like(means) if shift is None else shift.to(torch.float32)
        centre = self._of_groups(means + shifts) - shifts.unflatten(1, self.weight.shape)
        deviation = values - _of_channels(centre)
        variance = self._of_groups((deviation * deviation).mean((2, 3)))
        scale = (variance + self.eps).rsqrt() * self.weight
        return (deviation * _of_channels(scale) + self.bias.view(-1, 1, 1)).to(x.dtype)

    def _of_groups(self, per_channel: Tensor) -> Tensor:
        """Average [B, C] over each group: [B, G, 1]."""
        return per_channel.unflatten(1, self.weight.shape).mean(dim=2, keepdim=True)


def _of_channels(values: Tensor) -> Tensor:
    """[B, G, C / G] -> [B, C, 1, 1] in memory: else Inductor computes the values again at every pixel."""
    batch, channels = values.shape[0], values[0].numel()
    return values.contiguous().as_strided((batch, channels), (channels, 1))[:, :, None, None]
