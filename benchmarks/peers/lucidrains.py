"""denoising-diffusion-pytorch around a network of ours."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import Case
from torch import Tensor, nn

NEEDS = {"denoising_diffusion_pytorch": "denoising-diffusion-pytorch", "torchvision": "torchvision"}


class _Adapter(nn.Module):
    """The attributes that GaussianDiffusion asks of a network."""

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.model, self.channels, self.out_dim, self.self_condition = model, channels, channels, False

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.model(x, t)


def diffusion(
    case: Case,
    model: Callable[[Tensor, Tensor], Tensor],
    timesteps: int,
    beta_schedule: str = "linear",
    objective: str = "pred_noise",
) -> Any:
    """GaussianDiffusion around a network."""
    library = importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    options = {"timesteps": timesteps, "beta_schedule": beta_schedule, "objective": objective, "auto_normalize": False}
    network = _Adapter(model, case.shape[0])
    return library.GaussianDiffusion(network, image_size=case.shape[-1], **options).to(torch.device(case.device))


def sample_loop(diffusion: Any, case: Case, **options: Any) -> Tensor:
    """Its p_sample_loop, or ours in its place, without the progress bar, which neither has an option for."""
    with contextlib.redirect_stderr(io.StringIO()):
        return diffusion.p_sample_loop(case.full_shape, **options)
