"""diffusers' steps as rows: its float32 arithmetic, in its order, once per timestep instead of once per step.

alpha_bar, 1 - alpha_bar and the betas of a respaced chain are differences of nearly equal numbers. In float32 they
carry errors up to 4e-4 (t = 2 of the default schedule), which belong to diffusers' images; rows made in float64 would
be right, and different. So these are float32 here too, and only what is built from them by multiplying and dividing
is rounded once.

Arguments that the builders share:
    alphas_cumprod: alpha_bar, float32 [T].
    t: int64 [n], in 0..T-1.
    prev_t: int64 [n]; below 0 for the end of the chain.
    prediction_type: "epsilon", "sample" or "v_prediction".
    bound: x_0 is clipped to [-bound, bound]; inf for no clipping.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm.schedules.diffusion import LEARNED
from fastddpm.tables.table import COLUMN, make_rows

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

# x_0 = (x_t - eps) / 0 at zero terminal SNR is +-inf, to be clipped. A power of two times (x_t - eps) has the sign of
# that and is clipped to the same bound, while inf * x_t - inf * eps would be NaN.
HUGE = 2.0**100


def ddpm_rows(
    alphas_cumprod: Tensor,
    t: Tensor,
    prev_t: Tensor,
    *,
    prediction_type: str,
    variance_kind: str,
    variance_type: str,
    bound: float,
) -> Tensor:
    """Tabulate DDPMScheduler.step: Ho et al. 2020, eqs. 7 and 15, from t to prev_t.

    Args:
        variance_kind: diffusers' `config.variance_type`; an unknown one means "fixed_small", as there. "learned" has
            sigma = 1 and leaves the network's variance to the caller.
        variance_type: the scheduler's own `variance_type`.

    Returns:
        float32 [n, K]. Noise is added wherever t > 0, also where prev_t is the end of the chain, alpha_bar = 1.
    """
    alpha_bar, alpha_bar_prev = alphas_cumprod[t], alphas_cumprod[prev_t.clamp(min=0)].where(prev_t >= 0, 1.0)
    beta_bar, beta_bar_prev = 1 - alpha_bar, 1 - alpha_bar_prev
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    sigma, h0, h1 = _ddpm_std(beta_bar_prev / beta_bar * beta, beta, variance_kind, variance_type)
    a, b = _x0_from_output(alpha_bar, beta_bar, prediction_type)
    c_x0, c_xt = (alpha_bar_prev.sqrt() * beta) / beta_bar, alpha.sqrt() * beta_bar_prev / beta_bar
    sigma = sigma.where(t > 0, 0.0)
    return make_rows(len(t), a=a, b=b, lo=-bound, hi=bound, c_x0=c_x0, c_xt=c_xt, sigma=sigma, h0=h0, h1=h1).float()


def ddim_rows(
    alphas_cumprod: Tensor,
    t: Tensor,
    prev_t: Tensor,
    final_alpha_cumprod: Tensor,
    *,
    prediction_type: str,
    bound: float,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
) -> Tensor:
    """Tabulate DDIMScheduler.step: Song et al. 2021, eqs. 12 and 16, from t to prev_t.

    Args:
        final_alpha_cumprod: alpha_bar of the end of the chain, [].
        eta: 0 for the deterministic sampler, 1 for the noise of DDPM.
        use_clipped_model_output: take eps from x_t and the clipped x_0 instead of from the network's output.

    Returns:
        float32 [n, K].
    """
    alpha_bar = alphas_cumprod[t]
    alpha_bar_prev = alphas_cumprod[prev_t.clamp(min=0)].where(prev_t >= 0, final_alpha_cumprod.cpu().float())
    beta_bar, beta_bar_prev = 1 - alpha_bar, 1 - alpha_bar_prev
    sigma = eta * ((beta_bar_prev / beta_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
    # With eta = 1 the difference is 0, and may round to less: diffusers then returns NaN.
    direction = (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt().double()
    a, b = _x0_from_output(alpha_bar, beta_bar, prediction_type)
    signal, noise = alpha_bar.sqrt().double(), beta_bar.sqrt().double()
    columns: dict[str, Any] = {"c_x0": alpha_bar_prev.sqrt()}
    if use_clipped_model_output:
        columns = {"c_x0": alpha_bar_prev.sqrt() - direction * signal / noise, "c_xt": direction / noise}
    elif prediction_type == "epsilon":
        columns["c_m"] = direction
    elif prediction_type == "sample":
        columns |= {"c_xt": direction / noise, "c_m": -direction * signal / noise}
    else:
        columns |= {"c_xt": direction * noise, "c_m": direction * signal}
    return make_rows(len(t), a=a, b=b, lo=-bound, hi=bound, sigma=sigma, **columns).float()


def q_rows(alphas_cumprod: Tensor) -> Tensor:
    """Tabulate add_noise: (sqrt(alpha_bar), sqrt(1 - alpha_bar)) in float32, then a row of NaN; [T + 1, 2]."""
    rows = torch.stack([alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()], dim=1)
    return torch.cat([rows, torch.full_like(rows[:1], float("nan"))]).contiguous()


def dynamic_rows(row: Tensor, x_t: Tensor, m: Tensor, ratio: float, largest: float) -> tuple[Tensor, Tensor]:
    """Return s [B, 1, ...] and one row per sample that clips x_0 to [-s, s] and divides it by s.

    s is the quantile `ratio` of |x_0| of the sample, at least 1 and at most `largest` (Saharia et al. 2022, section
    2.3); where that is below 1, it wins, as in diffusers.
    """
    x_0 = row[:, COLUMN["a"], None] * x_t.float().flatten(1) + row[:, COLUMN["b"], None] * m.float().flatten(1)
    s = torch.clamp(torch.quantile(x_0.abs(), ratio, dim=1), min=1, max=largest)
    rows = row.repeat(len(s), 1)
    rows[:, COLUMN["lo"]], rows[:, COLUMN["hi"]] = -s, s
    rows[:, COLUMN["c_x0"]] /= s
    return s.view(-1, *[1] * (x_t.dim() - 1)), rows


def _x0_from_output(alpha_bar: Tensor, beta_bar: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Return a and b of x_0 = a x_t + b m.

    Raises:
        ValueError: the prediction type is unknown.
    """
    if prediction_type == "epsilon":
        signal, noise = alpha_bar.sqrt().double(), beta_bar.sqrt().double()
        return (1 / signal).where(signal > 0, HUGE), (-noise / signal).where(signal > 0, -HUGE)
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt(), -beta_bar.sqrt()
    if prediction_type == "sample":
        return torch.zeros_like(alpha_bar), torch.ones_like(alpha_bar)
    raise ValueError(
        f"prediction_type given as {prediction_type} must be one of `epsilon`, `sample` or `v_prediction`; "
        "pass one of them to the scheduler"
    )


def _ddpm_std(variance: Tensor, beta: Tensor, kind: str, variance_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigma, h0 and h1 of std = sigma * exp(h0 + h1 * v).

    diffusers keeps a variance type in two places: its config's (`kind`) says which variance is taken, the scheduler's
    own (`variance_type`) what becomes of it. They are the same unless one was assigned.
    """
    zero, one = torch.zeros_like(beta), torch.ones_like(beta)
    # diffusers' floor, which keeps the logarithm finite.
    variance = variance.clamp(min=1e-20)
    if kind == "learned_range" and variance_type == kind:
        # log sigma^2 = f max + (1 - f) min with f = (v + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).
        smallest, largest = variance.log().double(), beta.log().double()
        return one, 0.25 * (largest + smallest), 0.25 * (largest - smallest)
    if kind in LEARNED:
        # The caller multiplies by a "learned" deviation; the root of a logarithm is NaN.
        return one if kind == "learned" else one * float("nan"), zero, zero
    if kind in ("fixed_large", "fixed_large_log"):
        variance = beta
    elif kind == "fixed_small_log":
        variance = (0.5 * variance.log()).exp()
    if variance_type == "fixed_small_log":
        return variance, zero, zero
    return (0.5 * variance).exp() if variance_type == "learned_range" else variance.sqrt(), zero, zero
