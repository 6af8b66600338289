"""Buffers and rows of `fastddpm.integrations.lucidrains`, in the arithmetic of denoising-diffusion-pytorch.

The buffers are computed in float64 and stored in float32; rows are made of the stored float32 values, since a
checkpoint may bring its own. Names of the buffers are those of the original's state_dict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastddpm.schedules.betas import MAX_BETA, named_betas
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.table import Table, level_rows, make_rows

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "loss_weight",
)


def linear_betas(timesteps: int) -> Tensor:
    """Space beta linearly between 0.1 / T and 20 / T; float64 [T].

    Raises:
        ValueError: T <= 20, where beta reaches 1 (the original then computes NaN).
    """
    if timesteps <= 20:
        raise ValueError(
            f"beta_schedule 'linear' reaches beta = {20 / timesteps:.4g} at timesteps = {timesteps}, and beta must "
            "stay below 1; use more than 20 timesteps, or beta_schedule='cosine'"
        )
    return named_betas("linear_rescaled", timesteps)


def cosine_betas(timesteps: int, s: float = 0.008) -> Tensor:
    """Let alpha_bar fall as cos^2 (Nichol & Dhariwal 2021, eq. 17); float64 [T]."""
    return _betas_of(torch.cos((_unit_grid(timesteps) + s) / (1 + s) * math.pi * 0.5) ** 2)


def sigmoid_betas(timesteps: int, start: float = -3, end: float = 3, tau: float = 1, clamp_min: float = 1e-5) -> Tensor:
    """Let alpha_bar fall as a sigmoid (Jabri et al. 2022, figure 8); float64 [T]. clamp_min is unused, as there."""
    del clamp_min
    # The two ends are float32 in the original, which shifts the last alpha_bar visibly.
    first, last = (float(torch.tensor(edge / tau, device="cpu").sigmoid()) for edge in (start, end))
    inner = ((_unit_grid(timesteps) * (end - start) + start) / tau).sigmoid()
    return _betas_of((last - inner) / float(torch.tensor(last, device="cpu") - torch.tensor(first, device="cpu")))


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas, "sigmoid": sigmoid_betas}


def make_buffers(betas: Tensor, objective: str, min_snr_gamma: float | None) -> dict[str, Tensor]:
    """Compute the 13 buffers, float32 [T] each, in the order of `BUFFERS`.

    Args:
        betas: float64 [T].
        objective: one of `OBJECTIVES`; it decides the loss weights.
        min_snr_gamma: cap on the signal-to-noise ratio in the loss weights (Hang et al. 2023), None for no cap.
    """
    schedule = Schedule(betas)
    bar = schedule.alphas_cumprod
    snr = bar / (1.0 - bar)
    weight = snr if min_snr_gamma is None else snr.clamp(max=min_snr_gamma)
    others = {
        "log_one_minus_alphas_cumprod": (1.0 - bar).log(),
        "sqrt_recipm1_alphas_cumprod": (1.0 / bar - 1.0).sqrt(),
        "posterior_log_variance_clipped": schedule.posterior_variance.clamp(min=1e-20).log(),
        "loss_weight": {"pred_noise": weight / snr, "pred_x0": weight, "pred_v": weight / (snr + 1.0)}[objective],
    }
    return {name: (others[name] if name in others else getattr(schedule, name)).float() for name in BUFFERS}


def ddpm_table(buffers: Mapping[str, Tensor], objective: str, start: int | None = None) -> Table:
    """Tabulate p_sample for t = start - 1 .. 0 (T - 1 .. 0): the posterior with its small variance, x_0 clipped."""
    buffers = _on_cpu(buffers)
    a, b = _x0_coefficients(buffers, objective)
    sigma = (0.5 * buffers["posterior_log_variance_clipped"]).exp()
    sigma[0] = 0.0
    rows64 = make_rows(
        len(sigma),
        1.0,
        a=a,
        b=b,
        c_x0=buffers["posterior_mean_coef1"],
        c_xt=buffers["posterior_mean_coef2"],
        sigma=sigma,
    )
    bar = buffers["alphas_cumprod"].double()[:start].flip(0)
    return Table(
        rows64[:start].flip(0),
        torch.arange(len(sigma), device="cpu")[:start].flip(0),
        name="lucidrains-ddpm",
        levels=level_rows(bar, bar.new_ones(1)),
    )


def ddim_timesteps(T: int, sampling_timesteps: int) -> list[int]:
    """List the timesteps that DDIM visits, from T - 1 down to -1, truncated towards zero as in the original."""
    return torch.linspace(-1, T - 1, steps=sampling_timesteps + 1, device="cpu").int().flip(0).tolist()


def ddim_table(
    buffers: Mapping[str, Tensor], objective: str, sampling_timesteps: int, eta: float, rederives: bool = True
) -> Table:
    """Tabulate ddim_sample, whose last row returns x_0 itself.

    x_next = sqrt(alpha_bar_next) x_0 + c eps + sigma z,  eps = (A x_t - x_0) / R,  A, R: the two sqrt_recip buffers;
    or, without `rederives`, eps is the output of a network that predicts it.

    Raises:
        ValueError: eta makes c imaginary.
    """
    buffers = _on_cpu(buffers)
    times = ddim_timesteps(len(buffers["betas"]), sampling_timesteps)
    visited, following = (torch.tensor(part, dtype=torch.int64, device="cpu") for part in (times[:-1], times[1:-1]))
    bar = buffers["alphas_cumprod"]
    alpha, alpha_next = bar[visited[:-1]], bar[following]
    sigma = eta * ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
    c = (1 - alpha_next - sigma**2).sqrt()
    if not c.isfinite().all():
        raise ValueError(f"ddim_sampling_eta = {eta} asks for more noise than there is; use a value in [0, 1]")
    A, R = (buffers[f"sqrt_{name}_alphas_cumprod"][visited[:-1]].double() for name in ("recip", "recipm1"))
    a, b = (value[visited] for value in _x0_coefficients(buffers, objective))
    last = torch.zeros(1, dtype=torch.float64, device="cpu")
    use_m = objective == "pred_noise" and not rederives
    through_x0 = torch.zeros_like(R) if use_m else c.double() / R
    rows64 = make_rows(
        len(visited),
        1.0,
        a=a,
        b=b,
        c_x0=torch.cat([alpha_next.sqrt().double() - through_x0, last + 1.0]),
        c_xt=torch.cat([through_x0 * A, last]),
        c_m=torch.cat([c.double() * use_m, last]),
        sigma=torch.cat([sigma.double(), last]),
    )
    return Table(rows64, visited, name="lucidrains-ddim", use_m=use_m)


def q_rows(buffers: Mapping[str, Tensor]) -> Tensor:
    """Tabulate q(x_t | x_0) for `ops.q_sample`, float32 [T, 2] on the buffers' device."""
    return torch.stack([buffers["sqrt_alphas_cumprod"], buffers["sqrt_one_minus_alphas_cumprod"]], dim=1)


def _x0_coefficients(buffers: Mapping[str, Any], objective: str) -> tuple[Tensor, Tensor]:
    """Return a and b of x_0 = a x_t + b m, [T] each."""
    if objective == "pred_noise":
        return buffers["sqrt_recip_alphas_cumprod"], -buffers["sqrt_recipm1_alphas_cumprod"]
    if objective == "pred_v":
        return buffers["sqrt_alphas_cumprod"], -buffers["sqrt_one_minus_alphas_cumprod"]
    return torch.zeros_like(buffers["betas"]), torch.ones_like(buffers["betas"])


def _on_cpu(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in buffers.items()}


def _unit_grid(timesteps: int) -> Tensor:
    return torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64, device="cpu") / timesteps


def _betas_of(alphas_cumprod: Tensor) -> Tensor:
    alphas_cumprod = alphas_cumprod / alphas_cumprod[0]
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, MAX_BETA)
