"""denoising-diffusion-pytorch's GaussianDiffusion1D on the fused step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastddpm.integrations.lucidrains.diffusion import GaussianDiffusion


class GaussianDiffusion1D(GaussianDiffusion):
    """Train and sample sequences [B, C, L] as the original's class of this name does.

    The network is called as model(x, t, **model_forward_kwargs), and DDIM takes eps from the output itself where that
    predicts it. After `batch_size`, `shape` and `noise` arguments go by name.

    Args:
        model: the network.
        seq_length: L.
        self_condition: whether the network takes its last estimate of x_0 as x_self_cond, by default as it says.
        channel_first: False for sequences [B, L, C].
        options: as for `GaussianDiffusion`, and channels, by default the model's.

    Raises:
        ValueError: a value does not fit (an AssertionError too, where the original raises that).
    """

    _names, _rederives, _shows_all = ("seq length",), False, False

    def __init__(
        self,
        model: nn.Module,
        *,
        seq_length: int,
        channel_first: bool = True,
        self_condition: bool | None = None,
        **options: Any,
    ) -> None:
        defaults = {"objective": "pred_noise", "beta_schedule": "cosine"}
        super().__init__(model, **{**defaults, **options, "image_size": seq_length})
        if self_condition is not None:
            self.self_condition = self_condition
        self.seq_length, self.channel_first = seq_length, channel_first
        self.seq_index, self._sizes = (-1, slice(2, None)) if channel_first else (-2, slice(1, -1))

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.channels, self.seq_length) if self.channel_first else (self.seq_length, self.channels)

    @staticmethod
    def _call(model: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return model(x, t, **kwargs)
