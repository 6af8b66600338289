"""DDPM's ancestral sampler as a table (Ho et al. 2020, Algorithm 2; Nichol & Dhariwal 2021 for learned variances)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm.checks import one_of
from fastddpm.schedules.diffusion import LEARNED, PREDICTION_TYPES, VARIANCE_TYPES
from fastddpm.schedules.schedule import Schedule
from fastddpm.schedules.spacing import resolve_timesteps
from fastddpm.tables.table import Table, level_rows, make_rows

# 1 / sqrt(alpha_bar), times a state, is finite in float32.
_LEAST_ALPHA_BAR = 1e-68


def ddpm_table(
    schedule: Schedule,
    *,
    steps: int | None = None,
    timesteps: Sequence[int] | Tensor | None = None,
    spacing: str = "linspace",
    steps_offset: int = 0,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_range: float | None = 1.0,
) -> Table:
    """Tabulate x_{t-1} = mu_tilde(x_t, x_0) + sigma_t z (Ho et al. 2020, eqs. 7 and 11) over the visited timesteps.

    With fewer than T timesteps the betas are those of the respaced process (Nichol & Dhariwal 2021, eq. 19).

    Args:
        schedule: the schedule the network was trained with.
        steps, timesteps, spacing, steps_offset: what is visited, see `fastddpm.schedules.spacing.resolve_timesteps`.
        prediction_type: what the network returns: "epsilon", "x_0" or "v".
        variance_type: "fixed_small" (sigma^2 = beta_tilde), "fixed_large" (sigma^2 = beta), "learned" (the second half
            of the output is log sigma^2) or "learned_range" (it interpolates between the logs of the first two).
        clip_range: x_0 is clipped to [-clip_range, clip_range]; None switches clipping off.

    Returns:
        A table of one row per timestep; sigma is 0 on the last row.

    Raises:
        ValueError: an argument is unknown or out of range, or epsilon is predicted where alpha_bar = 0.
    """
    visited = resolve_timesteps(
        schedule.num_timesteps, steps=steps, timesteps=timesteps, spacing=spacing, steps_offset=steps_offset
    )
    respaced = schedule.respaced(visited)
    a, b = x0_coefficients(respaced.alphas_cumprod, prediction_type)
    sigma, h0, h1 = _std_coefficients(respaced, variance_type)
    rows64 = make_rows(
        len(visited),
        clip_range,
        a=a,
        b=b,
        c_x0=respaced.posterior_mean_coef1,
        c_xt=respaced.posterior_mean_coef2,
        sigma=sigma,
        h0=h0,
        h1=h1,
    )
    return Table(
        rows64.flip(0),
        visited,
        name="ddpm",
        clip=clip_range is not None,
        learned=variance_type in LEARNED,
        levels=level_rows(respaced.alphas_cumprod.flip(0), torch.ones(1, dtype=torch.float64, device="cpu")),
    )


def x0_coefficients(alpha_bar: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Return a and b of x_0 = a x_t + b m, float64 and shaped like alpha_bar.

    epsilon: x_0 = (x_t - sqrt(1 - alpha_bar_t) m) / sqrt(alpha_bar_t)      (Ho et al. 2020, eq. 15)
    v:       x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) m          (Salimans & Ho 2022, section 4)

    Raises:
        ValueError: the type is unknown, or epsilon is predicted where alpha_bar = 0.
    """
    if prediction_type == "epsilon":
        least = float(alpha_bar.min())
        if least < _LEAST_ALPHA_BAR:
            raise ValueError(
                f"prediction_type 'epsilon' cannot give x_0 where alpha_bar = {least:.3g}: x_t is pure noise there, "
                "and (x_t - eps) / sqrt(alpha_bar) is not finite in float32; use a network trained for 'v' or 'x_0', "
                "smaller betas, or no rescaling to zero terminal SNR"
            )
        return (1.0 / alpha_bar).sqrt(), -((1.0 - alpha_bar) / alpha_bar).sqrt()
    if prediction_type == "v":
        return alpha_bar.sqrt(), -(1.0 - alpha_bar).sqrt()
    one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    return torch.zeros_like(alpha_bar), torch.ones_like(alpha_bar)


def eps_coefficients(alpha_bar: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Return a and b of eps = a x_t + b m, float64 and shaped like alpha_bar.

    v: eps = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v      (Salimans & Ho 2022, appendix D)

    Raises:
        ValueError: the type is unknown.
    """
    one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    signal, noise = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        return torch.zeros_like(signal), torch.ones_like(signal)
    return (noise, signal) if prediction_type == "v" else (1.0 / noise, -signal / noise)


def log_variance_coefficients(schedule: Schedule, variance_type: str) -> tuple[Tensor, Tensor]:
    """Return h0 and h1 of log sigma_t^2 = h0 + h1 v, float64 [T]; v is the second half of the network's output.

    Fixed variances have the value of beta_tilde at t = 1 at t = 0 too, for the likelihood of x_0: beta_tilde is 0.

    Raises:
        ValueError: the type is unknown.
    """
    one_of("variance_type", variance_type, VARIANCE_TYPES)
    log_beta, log_beta_tilde = schedule.betas.log(), schedule.posterior_log_variance_clipped
    zero = torch.zeros_like(log_beta)
    if variance_type == "fixed_small":
        return log_beta_tilde, zero
    if variance_type == "fixed_large":
        return torch.cat([log_beta_tilde[:1], log_beta[1:]]), zero
    if variance_type == "learned":
        return zero, zero + 1.0
    # log sigma^2 = f log beta + (1 - f) log beta_tilde with f = (v + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).
    return 0.5 * (log_beta + log_beta_tilde), 0.5 * (log_beta - log_beta_tilde)


def _std_coefficients(schedule: Schedule, variance_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigma, h0 and h1 of std = sigma * exp(h0 + h1 * v), float64 [T] each; 0 at t = 0, which adds no noise."""
    noisy = torch.ones_like(schedule.betas)
    noisy[0] = 0.0
    if variance_type == "fixed_small":
        return schedule.posterior_variance.sqrt() * noisy, 0 * noisy, 0 * noisy
    if variance_type == "fixed_large":
        return schedule.betas.sqrt() * noisy, 0 * noisy, 0 * noisy
    h0, h1 = log_variance_coefficients(schedule, variance_type)
    return noisy, 0.5 * h0 * noisy, 0.5 * h1 * noisy
