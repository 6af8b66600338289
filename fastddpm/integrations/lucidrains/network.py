"""What a diffusion of denoising-diffusion-pytorch asks of its network, and how it calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fastddpm.integrations.shared import require

Kwargs = Mapping[str, Any] | None


class Called(nn.Module):
    """A network as a diffusion calls it: call(model, x, t, **settings, **conditions)."""

    def __init__(
        self, model: nn.Module, call: Callable[..., Tensor], settings: Mapping[str, Any], self_condition: bool
    ) -> None:
        super().__init__()
        self.self_condition = self_condition
        self.model, self.call, self.settings = model, call, settings
        self.training = model.training

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """Return the prediction."""
        return self.call(self.model, x, t, **self.settings, **conditions)


def unsupported(what: str) -> NotImplementedError:
    """Describe a feature that only the original has."""
    return NotImplementedError(f"{what} is not supported here; use denoising_diffusion_pytorch's own class for it")


def check_network(model: Any, channels: int) -> None:
    returned = getattr(model, "out_dim", channels)
    require(
        returned == channels,
        f"the model takes {channels} channels and returns {returned}; they must be equal here (a learned "
        "variance is denoising_diffusion_pytorch.LearnedGaussianDiffusion's)",
    )
    require(
        not getattr(model, "random_or_learned_sinusoidal_cond", False),
        "a model with learned or random sinusoidal time embedding expects continuous time, not timesteps",
    )
