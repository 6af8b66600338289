"""denoising-diffusion-pytorch around a network of ours."""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import Case
from torch import Tensor, nn

NEEDS = {"denoising_diffusion_pytorch": "denoising-diffusion-pytorch", "torchvision": "torchvision"}


class _Adapter(nn.Module):
    """The attributes that GaussianDiffusion asks of a network."""

    def __init__(self, model: nn.Module, channels: int) -> None:
        super().__init__()
        self.model, self.channels, self.out_dim, self.self_condition = model, channels, channels, False

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.model(x, t)


def diffusion(
    case: Case, model: nn.Module, timesteps: int, beta_schedule: str = "linear", objective: str = "pred_noise"
) -> Any:
    """GaussianDiffusion around a network."""
    return (
        importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
        .GaussianDiffusion(
            _Adapter(model, case.shape[0]),
            image_size=case.shape[-1],
            timesteps=timesteps,
            objective=objective,
            beta_schedule=beta_schedule,
            auto_normalize=False,
        )
        .to(torch.device(case.device))
    )


class Given(nn.Module):
    """A network that returns m, whatever it sees."""

    def __init__(self, m: Tensor) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return m."""
        return self.m


def no_progress_bar() -> contextlib.AbstractContextManager[object]:
    """Swallow the progress bar of lucidrains' loop, and of ours in its place, which neither has an option for."""
    return contextlib.redirect_stderr(io.StringIO())
