"""Denoisers D(x; sigma) of EDM and k-diffusion as models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.checks import integer, number
from fastddpm.schedules.diffusion import DiffusionConfig


class Denoiser(nn.Module):
    """A network that is given x_0 + sigma n and sigma, and returns x_0 (Karras et al. 2022), as a model.

    The state x_t is what it is given, times sqrt(alpha_bar) with alpha_bar = 1 / (1 + sigma^2), so that every table
    serves. log(sigma) rises evenly over the timesteps 0..T-1, and between them. Karras et al.'s own steps are
    ``fastddpm.sample(model, sampler="heun", steps=18, sampler_options={"spacing": "karras"})``.

    Args:
        denoiser: called as denoiser(x, sigma, **kwargs), sigma float32 [B].
        sigma_min, sigma_max: between which it was trained.
        num_timesteps: T.

    Attributes:
        diffusion: that process, of which x_0 is predicted and not clipped.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        num_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self.denoiser, self.training = denoiser, getattr(denoiser, "training", False)
        self._first = math.log(number("sigma_min", sigma_min, gt=0))
        span = math.log(number("sigma_max", sigma_max, gt=sigma_min)) - self._first
        self._step = span / (integer("num_timesteps", num_timesteps, 2) - 1)
        log_sigma = self._first + self._step * torch.arange(num_timesteps, dtype=torch.float64, device="cpu")
        log_alpha_bar = -torch.log1p((2 * log_sigma).exp())
        betas = tuple((-torch.expm1(log_alpha_bar.diff(prepend=log_alpha_bar.new_zeros(1)))).tolist())
        self.diffusion = DiffusionConfig(
            num_timesteps=num_timesteps, trained_betas=betas, prediction_type="x_0", clip_range=None
        )

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        """Return D(x / sqrt(alpha_bar_t); sigma_t)."""
        sigma = (self._first + self._step * t.float()).exp()
        scale = (1.0 + sigma**2).sqrt().reshape(-1, *[1] * (x.dim() - 1))
        return self.denoiser((x * scale).to(x.dtype), sigma, **kwargs)
