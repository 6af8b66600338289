"""The betas of the named schedules, float64 [T], with their sources."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddpm.checks import integer, number, one_of

MAX_TIMESTEPS = 1_000_000

# Nichol & Dhariwal 2021, section 3.2: beta is clipped below 1 to prevent singularities near t = T.
MAX_BETA = 0.999


def check_num_timesteps(num_timesteps: int) -> int:
    """Return T; raise unless 1 <= T <= 1,000,000."""
    return integer("num_timesteps", num_timesteps, 1, MAX_TIMESTEPS)


def named_betas(name: str, num_timesteps: int, **options: Any) -> Tensor:
    """Compute the float64 betas [T] of one of `SCHEDULES`."""
    one_of("beta schedule", name, SCHEDULES)
    check_num_timesteps(num_timesteps)
    return SCHEDULES[name](num_timesteps, **options)


def _linear_betas(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    check_ends(beta_start, beta_end)
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64, device="cpu")


def _linear_rescaled_betas(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    check_ends(beta_start, beta_end)
    scale = 1000.0 / T
    if max(beta_start, beta_end) * scale >= 1.0:
        raise ValueError(
            f"linear_rescaled reaches beta = {max(beta_start, beta_end) * scale:.4g} at num_timesteps = {T}, and beta "
            "must stay below 1; use the cosine schedule for so few steps"
        )
    return torch.linspace(beta_start * scale, beta_end * scale, T, dtype=torch.float64, device="cpu")


def _scaled_linear_betas(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    check_ends(beta_start, beta_end)
    return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64, device="cpu") ** 2


def _sigmoid_geodiff_betas(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    check_ends(beta_start, beta_end)
    return torch.linspace(-6, 6, T, dtype=torch.float64, device="cpu").sigmoid() * (beta_end - beta_start) + beta_start


def _cosine_betas(T: int) -> Tensor:
    # s = 0.008 keeps sqrt(beta_0) just below the pixel bin 1 / 127.5 (Nichol & Dhariwal 2021, section 3.2).
    return _betas_from_alpha_bar(T, lambda u: ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2)


def _sigmoid_jabri_betas(T: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    start, end, tau = number("start", start), number("end", end), number("tau", tau)
    if not start < end or not tau > 0:
        raise ValueError(f"sigmoid_jabri needs start < end and tau > 0, got start={start}, end={end}, tau={tau}")
    # The paper's affine normalisation to alpha_bar(0) = 1 and alpha_bar(1) = 0.
    first, last = (1.0 / (1.0 + math.exp(-edge / tau)) for edge in (start, end))
    return _betas_from_alpha_bar(T, lambda u: (last - ((u * (end - start) + start) / tau).sigmoid()) / (last - first))


def _laplace_betas(T: int) -> Tensor:
    def alpha_bar(u: Tensor) -> Tensor:
        log_snr = -0.5 * torch.copysign(torch.ones_like(u), 0.5 - u) * (1 - 2 * (0.5 - u).abs() + 1e-6).log()
        return log_snr.sigmoid().sqrt()

    return _betas_from_alpha_bar(T, alpha_bar)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": _linear_betas,
    "linear_rescaled": _linear_rescaled_betas,
    "scaled_linear": _scaled_linear_betas,
    "cosine": _cosine_betas,
    "sigmoid_geodiff": _sigmoid_geodiff_betas,
    "sigmoid_jabri": _sigmoid_jabri_betas,
    "laplace": _laplace_betas,
}


def _betas_from_alpha_bar(T: int, alpha_bar: Callable[[Tensor], Tensor]) -> Tensor:
    """beta_i = min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), 0.999)."""
    values = alpha_bar(torch.arange(T + 1, dtype=torch.float64, device="cpu") / T)
    return (1.0 - values[1:] / values[:-1]).clamp(max=MAX_BETA)


def check_ends(beta_start: float, beta_end: float) -> None:
    for field, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        number(field, value, gt=0.0, lt=1.0)
