"""The network of Ho et al. 2020: a UNet with residual blocks, self-attention and a time embedding.

Configuration keys, parameter names and arithmetic are those of diffusers' UNet2DModel for the features listed in
`UNetConfig`, so its checkpoints load unchanged and ours load there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastddpm.unet.blocks import (
    Attention,
    DownBlock,
    MidBlock,
    ResnetBlock,
    TimestepEmbedding,
    UpBlock,
    timestep_embedding,
)
from fastddpm.unet.config import UNetConfig

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from fastddpm.schedules.diffusion import DiffusionConfig

__all__ = ["UNet", "UNetConfig"]


class UNet(nn.Module):
    """eps_theta(x_t, t) (or x_0, v, and a second half for a learned variance; Ho et al. 2020, appendix B).

    A fresh network follows Ho et al. in starting every residual branch and the output at zero (their scale 1e-10),
    so it is the identity inside and returns zeros until it has been trained for a step; all other weights start as
    torch's layers do. `zero_init=False` leaves those at torch's default as well, for tests that need an output.

    Args:
        config: the architecture.
        zero_init: start conv2 of every residual block, the projection of every attention and conv_out at zero.

    Attributes:
        config: the architecture.
        diffusion: schedule, prediction type and variance it was trained with, or None where nobody said.
        folder: where it was loaded from, or None.
    """

    diffusion: DiffusionConfig | None
    folder: Path | None = None

    def __init__(self, config: UNetConfig, *, zero_init: bool = True) -> None:
        super().__init__()
        self.config = config
        self.diffusion = None
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], config.temb_channels)
        self.class_embedding = _embedding(config.num_class_embeds, config.temb_channels)
        self.down_blocks = _down_path(config)
        self.mid_block = MidBlock(config)
        self.up_blocks = _up_path(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        if zero_init:
            self._zero_residual_branches()

    def __repr__(self) -> str:
        config, count = self.config, sum(p.numel() for p in self.parameters())
        size = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
        classes = f"{config.num_class_embeds} class embeddings" if config.num_class_embeds else "no classes"
        shape = f"x [B, {config.in_channels}, {', '.join('?' if n is None else str(n) for n in size)}]"
        widths = "-".join(map(str, config.block_out_channels))
        trained = (
            f", predicts {self.diffusion.prediction_type}, T = {self.diffusion.num_timesteps}" if self.diffusion else ""
        )
        return f"UNet({shape}, {count / 1e6:.2f} M parameters, widths {widths}, {classes}{trained})"

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return self.conv_in.weight.dtype

    def resnets(self) -> Iterator[ResnetBlock]:
        """The residual blocks in the order in which `forward` runs them."""
        for block in [*self.down_blocks, self.mid_block, *self.up_blocks]:
            yield from block.resnets

    def embed(self, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Embed timesteps and labels: the sinusoidal embedding through two layers, plus the class embedding.

        Args:
            t: [B], integer or floating point; the sines are computed in float32 whatever the weights' dtype.
            class_labels: int64 [B], [1] or 0-dim; None means the null class, or that the network has no classes.

        Returns:
            [B, temb_channels] in the weights' dtype.

        Raises:
            ValueError, TypeError: see `forward`.
        """
        labels = self.labels(class_labels, t)
        temb = self.time_embedding(self.sinusoids(t).to(self.dtype))
        return temb if self.class_embedding is None else temb + self.class_embedding(labels)

    def sinusoids(self, t: Tensor) -> Tensor:
        """Return the timesteps' sines and cosines, see `blocks.timestep_embedding`."""
        config = self.config
        return timestep_embedding(
            t, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )

    def project_time(self, temb: Tensor) -> list[Tensor]:
        """Every residual block's projection of the embedding, in the order of `resnets()`; independent of x."""
        return [resnet.project_time(temb) for resnet in self.resnets()]

    def denoise(self, x: Tensor, time: Sequence[Tensor]) -> Tensor:
        """The network after its embedding: x [B, C_in, H, W] and `project_time`'s list -> [B, C_out, H, W]."""
        if self.config.center_input_sample:
            x = 2 * x - 1
        x = self.conv_in(x)
        skips = [x]
        layers = self.config.layers_per_block
        remaining = iter(time)
        for block in self.down_blocks:
            x, more = block(x, list(islice(remaining, layers)))
            skips.extend(more)
        x = self.mid_block(x, list(islice(remaining, 2)))
        for block in self.up_blocks:
            x = block(x, skips, list(islice(remaining, layers + 1)))
        return self.conv_out(functional.silu(self.conv_norm_out(x)))

    def forward(
        self, x: Tensor, t: Tensor | float, class_labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Predict from a noisy image at a timestep.

        Args:
            x: x_t, [B, C, H, W], in the weights' dtype; H and W multiples of 2^(blocks - 1).
            t: [B], [1], 0-dim or a number; 0-based timestep, integer or floating point.
            class_labels: int64 [B], 0 <= label < num_class_embeds. None means the null class.
            condition: what the network sees beside x, as its last channels: [B, in_channels - C, H, W] (the picture to
                enlarge, a map to follow, the frames before; Saharia et al. 2021, arXiv:2104.07636).

        Returns:
            [B, out_channels, H, W] in x's dtype (autocast's, where that is on).

        Raises:
            ValueError: a shape that does not fit; labels given to an unconditional network, or missing where the
                network has classes and no null class.
            TypeError: x is not floating point, or of another dtype than the weights outside autocast; labels that are
                not integers.
        """
        x = beside(x, condition)
        self.check_image(x)
        t = _per_sample(torch.as_tensor(t, device=x.device), x.shape[0], "t")
        return self.denoise(x, self.project_time(self.embed(t, class_labels)))

    def save_pretrained(
        self, directory: str | os.PathLike[str], layout: str = "flat", dtype: torch.dtype | None = None
    ) -> None:
        """Write the network, its configuration and its diffusion to a folder; see `fastddpm.unet.save`."""
        from fastddpm.unet.save import save_pretrained

        save_pretrained(self, directory, layout, dtype)

    def check_image(self, x: Tensor) -> None:
        """Raise unless `forward` takes x."""
        config = self.config
        if x.dim() != 4 or x.shape[1] != config.in_channels:
            raise ValueError(
                f"x must have shape [B, {config.in_channels}, H, W], condition included, got {list(x.shape)}; "
                "reshape it, pass the other channels as condition=, or use a network with another in_channels"
            )
        multiple = 2 ** (len(config.block_out_channels) - 1)
        if x.shape[2] % multiple or x.shape[3] % multiple or x.shape[2] == 0 or x.shape[3] == 0:
            raise ValueError(
                f"height and width of x must be positive multiples of {multiple} "
                f"(the network halves them {len(config.block_out_channels) - 1} times), got {list(x.shape)}; pad x"
            )
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}; scale images to [-1, 1] first")
        if x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x is {x.dtype} and the weights are {self.dtype}; convert one of them with .to()")

    def labels(self, class_labels: Tensor | None, t: Tensor) -> Tensor | None:
        """Return one label for each of t [B], the null class where none are given; None where there are no classes."""
        config = self.config
        if config.num_class_embeds is None:
            if class_labels is not None:
                raise ValueError("class_labels given to a network without classes (num_class_embeds is None)")
            return None
        if class_labels is not None:
            if class_labels.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"class_labels must be int64, got {class_labels.dtype}")
            return _per_sample(class_labels.to(t.device), t.shape[0], "class_labels")
        if config.null_class is None:
            raise ValueError(
                f"this network has {config.num_class_embeds} classes and no null class: pass class_labels, int64 [B]"
            )
        return torch.full_like(t, config.null_class, dtype=torch.int64)

    def _zero_residual_branches(self) -> None:
        projections = [module.to_out for module in self.modules() if isinstance(module, Attention)]
        for layer in (self.conv_out, *(resnet.conv2 for resnet in self.resnets()), *projections):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)


def beside(x: Tensor, condition: Tensor | None) -> Tensor:
    """Return x with the channels of a condition after its own, in its dtype and channels last where it is.

    Raises:
        ValueError: they do not fit together.
    """
    if condition is None:
        return x
    if condition.dim() != 4 or (len(condition), *condition.shape[2:]) != (len(x), *x.shape[2:]):
        raise ValueError(
            f"condition must be [{len(x)}, channels, {', '.join(map(str, x.shape[2:]))}], got {list(condition.shape)}"
        )
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return torch.cat([x, condition.to(x.dtype, memory_format=layout)], dim=1)


def _embedding(rows: int | None, width: int) -> nn.Embedding | None:
    if rows is None:
        return None
    weight = torch.empty(rows, width)
    # Drawing on the meta device, as nn.Embedding does by itself, imports torch._dynamo, which takes seconds.
    return nn.Embedding(rows, width, _weight=weight if weight.is_meta else nn.init.normal_(weight))


def _down_path(config: UNetConfig) -> nn.ModuleList:
    widths = config.block_out_channels
    attends = [kind == "AttnDownBlock2D" for kind in config.down_block_types]
    last = len(widths) - 1
    return nn.ModuleList(
        DownBlock(widths[max(i - 1, 0)], widths[i], config, attention=attends[i], downsample=i < last)
        for i in range(len(widths))
    )


def _up_path(config: UNetConfig) -> nn.ModuleList:
    widths = config.block_out_channels[::-1]
    attends = [kind == "AttnUpBlock2D" for kind in config.up_block_types]
    below, above, last = (widths[0], *widths), (*widths[1:], widths[-1]), len(widths) - 1
    return nn.ModuleList(
        UpBlock(below[i], above[i], widths[i], config, attention=attends[i], upsample=i < last)
        for i in range(len(widths))
    )


def _per_sample(value: Tensor, batch: int, name: str) -> Tensor:
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, batch)):
        raise ValueError(f"{name} must have shape [{batch}] (one per image), [1] or [], got {list(value.shape)}")
    return value.expand(batch)
