"""What every provider of a benchmark is given: the same tensors, from fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from fastddpm.benchmarks.harness.case import Case
from torch import Tensor

from fastddpm.noise import v1 as noise
from fastddpm.noise.seeds import resolve_seeds
from fastddpm.noise.v1 import Counter
from fastddpm.schedules.schedule import Schedule

T = 1000
# Somewhere in the middle, where no coefficient is 0 or 1.
MIDDLE = 500


def gaussian(seed: int, shape: Sequence[int], device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """torch.randn from its own generator, drawn on the CPU so that it does not depend on the device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def state_and_output(case: Case) -> tuple[Tensor, Tensor]:
    """x_t, and a network's output for it."""
    return gaussian(1, case.full_shape, case.device), gaussian(2, case.full_shape, case.device)


def images_and_timesteps(case: Case) -> tuple[Tensor, Tensor]:
    """x_0 in [-1, 1], and t int64 [B] spread over all timesteps."""
    t = torch.linspace(0, T - 1, case.batch).round().to(torch.int64)
    return gaussian(1, case.full_shape, case.device).clamp(-1, 1), t.to(case.device)


def schedule() -> Schedule:
    """Ho et al.'s linear betas, T = 1000."""
    return Schedule.linear(T)


def counter(case: Case, stream: int, step: int = 0) -> Counter:
    """noise-v1 of seeds 0, 1, 2, ..."""
    return noise.counter(resolve_seeds(seeds=range(case.batch)), step, stream, case.device)


def normals(case: Case, stream: int, step: int = 0) -> Tensor:
    """What noise-v1 draws for `counter`, by its twin on the CPU."""
    words = counter(replace(case, device="cpu"), stream, step)
    return noise.normals(*words, case.n_elements // case.batch).reshape(case.full_shape)


def two_sizes(benchmark: str, device: str, smoke: bool) -> list[Case]:
    """One batch inside the caches, one far outside."""
    large = (64 if device == "cpu" else 128, (3, 256, 256))
    sizes = [(2, (3, 32, 32))] if smoke else [(16, (3, 32, 32)), large]
    return [Case(benchmark, batch, shape, device=device) for batch, shape in sizes]


def twin_only(case: Case) -> str | None:
    """Return why there is no eager twin to measure; None where there is one."""
    return None if case.device == "cpu" else "a kernel runs on CUDA"


class Coefficients(NamedTuple):
    """Float32 [T] tables of Ho et al. 2020 as implementations in plain PyTorch keep them, and the step they make."""

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, schedule: Schedule, device: str) -> Coefficients:
        """Tabulate a schedule, fixed_small variance."""
        columns = [getattr(schedule, name) for name in cls._fields[:-1]]
        return cls(*(c.to(device, torch.float32) for c in [*columns, schedule.posterior_variance.sqrt()]))

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Ho et al. 2020, eq. 4; t int64 [B]."""
        return _at(self.sqrt_alphas_cumprod, t, x_0) * x_0 + _at(self.sqrt_one_minus_alphas_cumprod, t, x_0) * eps

    def mean(self, x_t: Tensor, eps_theta: Tensor, t: Tensor) -> Tensor:
        """Ho et al. 2020, eqs. 7 and 15, x_0 clipped to [-1, 1]; t int64 [B]."""
        recip, recipm1 = _at(self.sqrt_recip_alphas_cumprod, t, x_t), _at(self.sqrt_recipm1_alphas_cumprod, t, x_t)
        x_0 = (recip * x_t - recipm1 * eps_theta).clamp(-1, 1)
        return _at(self.posterior_mean_coef1, t, x_t) * x_0 + _at(self.posterior_mean_coef2, t, x_t) * x_t

    def p_sample(self, x_t: Tensor, eps_theta: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Ho et al. 2020, Algorithm 2, lines 3 and 4; t int64 [B]."""
        return self.mean(x_t, eps_theta, t) + _at(self.sigma, t, x_t) * z


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return table[t].reshape(-1, *(1,) * (like.dim() - 1))
