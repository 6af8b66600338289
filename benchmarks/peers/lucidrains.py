"""denoising-diffusion-pytorch around a network of ours."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import Case
from torch import Tensor, nn
from tqdm.auto import tqdm

NEEDS = {"denoising_diffusion_pytorch": "denoising-diffusion-pytorch", "torchvision": "torchvision"}
_MODULES = (
    "denoising_diffusion_pytorch.denoising_diffusion_pytorch",
    "fastddpm.integrations.lucidrains.diffusion",
)


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
        importlib.import_module(_MODULES[0])
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


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Switch off the progress bar of lucidrains' loop and of ours in its place, which neither has an option for."""
    modules: list[Any] = [importlib.import_module(name) for name in _MODULES]
    before = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar
