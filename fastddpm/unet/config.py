"""The UNet's configuration: the keys of diffusers' UNet2DModel that this library supports, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from fastddpm.checks import integer, nearest, number, one_of, shown

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "mish": functional.mish,
    "gelu": functional.gelu,
    "relu": functional.relu,
}
DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")

# Keys of UNet2DModel without a counterpart here, with the only value that asks for nothing of them.
UNSUPPORTED: dict[str, Any] = {
    "time_embedding_type": "positional",
    "mid_block_type": "UNetMidBlock2D",
    "downsample_type": "conv",
    "upsample_type": "conv",
    "class_embed_type": None,
}
# Keys that change nothing in a network of this kind: num_train_timesteps belongs to learned time embeddings, the others
# are what diffusers' EMAModel keeps beside an average.
IGNORED = (
    *("num_train_timesteps", "decay", "min_decay", "optimization_step", "update_after_step"),
    *("use_ema_warmup", "inv_gamma", "power"),
)

# A configuration comes from a file: building a network from it must not take memory or time without bound.
MAX_BLOCKS, MAX_LAYERS, MAX_CHANNELS, MAX_SIZE = 8, 32, 16_384, 65_536


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a UNet; names, defaults and meaning are UNet2DModel's (plus `null_class`).

    Attributes:
        sample_size: height and width it was trained at, an int or a pair; only a default for callers.
        in_channels: channels of x_t.
        out_channels: channels returned; twice in_channels for a learned variance.
        center_input_sample: feed 2x - 1 instead of x.
        flip_sin_to_cos: cosines before sines in the time embedding.
        freq_shift: 0 or 1, see `blocks.timestep_embedding`.
        time_embedding_dim: width of the time embedding; None means 4 * block_out_channels[0].
        down_block_types: "DownBlock2D" or "AttnDownBlock2D" per resolution, finest first.
        up_block_types: "UpBlock2D" or "AttnUpBlock2D" per resolution, coarsest first.
        block_out_channels: width per resolution, finest first.
        layers_per_block: residual blocks per resolution on the way down (one more on the way up); at most 32 in all.
        mid_block_scale_factor: divides the outputs of the middle block's parts.
        downsample_padding: 1, or 0 to pad right and below only (Ho et al.'s checkpoints).
        dropout: probability, in the residual blocks.
        act_fn: silu (swish), mish, gelu or relu.
        attention_head_dim: channels per attention head; None means one head.
        norm_num_groups: groups of every GroupNorm; divides every width.
        attn_norm_num_groups: groups of the middle attention's GroupNorm; None means norm_num_groups, or no norm
            when resnet_time_scale_shift is "scale_shift" (as in diffusers).
        norm_eps: added to the variance in GroupNorm.
        resnet_time_scale_shift: "default" adds the time embedding before the second norm, "scale_shift" scales and
            shifts after it.
        add_attention: self-attention in the middle block.
        num_class_embeds: rows of the class embedding, the null class included; None means unconditional.
        null_class: the row that means "no class", used when no labels are given (classifier-free guidance).

    Raises:
        ValueError: a value of the wrong type or outside its range, or values that do not fit together.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_embedding_dim: int | None = None
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    num_class_embeds: int | None = None
    null_class: int | None = None

    @property
    def temb_channels(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @classmethod
    def cifar10(cls) -> UNetConfig:
        """google/ddpm-cifar10-32: Ho et al.'s CIFAR-10 network, 35.7 M parameters, attention at 16x16."""
        return cls(
            sample_size=32,
            flip_sin_to_cos=False,
            freq_shift=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(128, 256, 256, 256),
            downsample_padding=0,
            attention_head_dim=None,
            norm_eps=1e-6,
        )

    @classmethod
    def digits(cls) -> UNetConfig:
        """The shipped digits model: 1x32x32, ten classes and a null class; 1.71 M parameters, 0.218 GFLOP an image.

        Widths are multiples of 16 (bfloat16 matrix tiles); the width sits at 8x8 and 4x4, where it costs least.
        """
        return cls(
            sample_size=32,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32, 64, 96),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=8,
            num_class_embeds=11,
            null_class=10,
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a configuration as diffusers writes it; keys that begin with an underscore are metadata.

        Args:
            config: mapping of names to JSON values; lists become tuples, missing keys take their default.

        Raises:
            ValueError: an unknown key, a feature of UNet2DModel that this network does not have, or a value that is
                wrong.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in config.items():
            if key.startswith("_") or key in IGNORED:
                continue
            if key in UNSUPPORTED:
                if value != UNSUPPORTED[key]:
                    raise ValueError(f"{key}={shown(value)} is not supported; only {UNSUPPORTED[key]!r} is")
            elif key not in known:
                hint = f" (did you mean {nearest(key, known)!r}?)" if nearest(key, known) else ""
                raise ValueError(f"unknown key {shown(key)} with value {shown(value)} in a UNet configuration{hint}")
            else:
                values[key] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON values under diffusers' keys; `null_class` only where it is set (diffusers ignores it)."""
        values = {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }
        if values["null_class"] is None:
            del values["null_class"]
        return {**values, **UNSUPPORTED}

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()
        self._check_blocks()
        self._check_groups_and_heads()

    def _check_types(self) -> None:
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise ValueError(f"{name} must be a sequence, got {shown(value)}")
            object.__setattr__(self, name, tuple(value))
        if isinstance(self.sample_size, list | tuple):
            object.__setattr__(self, "sample_size", tuple(self.sample_size))
        for name in ("center_input_sample", "flip_sin_to_cos", "add_attention"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {shown(getattr(self, name))}")

    def _check_ranges(self) -> None:
        size = self.sample_size
        if isinstance(size, tuple) and len(size) != 2:
            raise ValueError(f"sample_size must be an int or [height, width], got {shown(list(size))}")
        for part in size if isinstance(size, tuple) else (size,):
            _optional("sample_size", part, 1, MAX_SIZE)
        for name in ("in_channels", "out_channels", "norm_num_groups"):
            integer(name, getattr(self, name), 1, MAX_CHANNELS)
        for name in ("attention_head_dim", "attn_norm_num_groups", "time_embedding_dim"):
            _optional(name, getattr(self, name), 1, MAX_CHANNELS)
        _optional("num_class_embeds", self.num_class_embeds, 1, 2**31 - 1)
        _optional("null_class", self.null_class, 0, (self.num_class_embeds or 0) - 1)
        integer("freq_shift", self.freq_shift, 0, 1)
        integer("downsample_padding", self.downsample_padding, 0, 1)
        number("dropout", self.dropout, ge=0, lt=1)
        number("norm_eps", self.norm_eps, gt=0)
        if number("mid_block_scale_factor", self.mid_block_scale_factor) == 0:
            raise ValueError("mid_block_scale_factor must not be 0")
        one_of("act_fn", self.act_fn, ACTIVATIONS)
        one_of("resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))

    def _check_blocks(self) -> None:
        lengths = (len(self.block_out_channels), len(self.down_block_types), len(self.up_block_types))
        if len(set(lengths)) != 1 or not 1 <= lengths[0] <= MAX_BLOCKS:
            raise ValueError(
                "block_out_channels, down_block_types and up_block_types must have the same length, "
                f"1 to {MAX_BLOCKS}, got {lengths[0]}, {lengths[1]} and {lengths[2]}"
            )
        integer("layers_per_block", self.layers_per_block, 1, MAX_LAYERS // lengths[0])
        for width in self.block_out_channels:
            integer("block_out_channels", width, 4, MAX_CHANNELS)
        for kind in self.down_block_types:
            one_of("down_block_types", kind, DOWN_BLOCKS)
        for kind in self.up_block_types:
            one_of("up_block_types", kind, UP_BLOCKS)

    def _check_groups_and_heads(self) -> None:
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups={self.norm_num_groups} must divide every entry of "
                    f"block_out_channels={list(self.block_out_channels)}; {width} is no multiple"
                )
        last = self.block_out_channels[-1]
        if self.attn_norm_num_groups is not None and last % self.attn_norm_num_groups:
            raise ValueError(f"attn_norm_num_groups={self.attn_norm_num_groups} must divide {last}, the last width")
        if self.attention_head_dim is None:
            return
        for width in self._attention_widths():
            if width % self.attention_head_dim:
                raise ValueError(
                    f"attention_head_dim={self.attention_head_dim} must divide the width {width} of a block with "
                    f"attention (block_out_channels={list(self.block_out_channels)})"
                )

    def _attention_widths(self) -> set[int]:
        down = zip(self.block_out_channels, self.down_block_types, strict=True)
        up = zip(self.block_out_channels[::-1], self.up_block_types, strict=True)
        widths = {width for width, kind in [*down, *up] if kind.startswith("Attn")}
        return widths | ({self.block_out_channels[-1]} if self.add_attention else set())


def _optional(name: str, value: object, low: int, high: int) -> None:
    if value is not None:
        integer(name, value, low, high)
