"""denoising-diffusion-pytorch around a network of ours."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import Case
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastddpm.schedules.schedule import Schedule

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
    """GaussianDiffusion, its progress bar off (ours as well)."""
    original: Any = importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    ours: Any = importlib.import_module("fastddpm.integrations.lucidrains")
    original.tqdm = ours.tqdm = functools.partial(tqdm, disable=True)
    return original.GaussianDiffusion(
        _Adapter(model, case.shape[0]),
        image_size=case.shape[-1],
        timesteps=timesteps,
        objective=objective,
        beta_schedule=beta_schedule,
        auto_normalize=False,
    ).to(torch.device(case.device))


def schedule_of(diffusion: Any) -> Schedule:
    """Its betas, which are float32, as a schedule."""
    return Schedule.from_betas(diffusion.betas.double().cpu())
