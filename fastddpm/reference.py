"""The maths in the papers' own form, to be read beside Ho et al. 2020 (arXiv:2006.11239). No rows, no kernels.

States x are [B, ...] of any shape, in float32 or float64, and results have the dtype of the state. t is an int, or
int64 [B] with one timestep per sample; it is 0-based: the paper's t is t + 1. Noise is given (eps forward, z reverse)
or drawn with torch.randn from `generator`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddpm.schedules.schedule import Schedule

Model = Callable[[Tensor, Tensor], Any]
# Half the width of a bin of 8-bit images scaled to [-1, 1]; the outermost bins reach to infinity (section 3.3).
_HALF_BIN, _EDGE = 1.0 / 255.0, 0.999


def q_step(
    x_prev: Tensor, t: Tensor | int, schedule: Schedule, eps: Tensor | None = None, generator: Any = None
) -> Tensor:
    """Draw x_t from q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)   (eq. 2)."""
    eps = _noise(eps, x_prev, generator)
    beta = _at(schedule.betas, t, x_prev)
    return (1 - beta).sqrt() * x_prev + beta.sqrt() * eps


def q_sample(
    x_0: Tensor, t: Tensor | int, schedule: Schedule, eps: Tensor | None = None, generator: Any = None
) -> Tensor:
    """Draw x_t from q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)   (eq. 4)."""
    eps = _noise(eps, x_0, generator)
    return _at(schedule.sqrt_alphas_cumprod, t, x_0) * x_0 + _at(schedule.sqrt_one_minus_alphas_cumprod, t, x_0) * eps


def q_posterior(x_0: Tensor, x_t: Tensor, t: Tensor | int, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return mean [B, ...] and variance [B, 1, ...] of q(x_{t-1} | x_t, x_0) = N(mu_tilde, beta_tilde_t I)   (eq. 7).

    mu_tilde = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
             + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t
    """
    mean = _at(schedule.posterior_mean_coef1, t, x_t) * x_0 + _at(schedule.posterior_mean_coef2, t, x_t) * x_t
    return mean, _at(schedule.posterior_variance, t, x_t)


def predict_x0(x_t: Tensor, m: Tensor, t: Tensor | int, schedule: Schedule, prediction_type: str = "epsilon") -> Tensor:
    """Return the x_0 that the network's output m stands for.

    epsilon: (x_t - sqrt(1 - alpha_bar_t) m) / sqrt(alpha_bar_t)    (eq. 15)
    v:       sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) m        (Salimans & Ho 2022, section 4)
    x_0:     m
    """
    signal, noise = _at(schedule.sqrt_alphas_cumprod, t, x_t), _at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    if prediction_type == "epsilon":
        return (x_t - noise * m) / signal
    if prediction_type == "v":
        return signal * x_t - noise * m
    if prediction_type == "x_0":
        return m
    raise ValueError(f"unknown prediction_type {prediction_type!r}; choose one of epsilon, x_0, v")


def p_mean_variance(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor | int,
    schedule: Schedule,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_range: float | None = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mu_theta, sigma_t^2 and x_0 of p_theta(x_{t-1} | x_t) = N(mu_theta(x_t, t), sigma_t^2 I)   (eqs. 1, 11).

    fixed_small:   sigma_t^2 = beta_tilde_t                                     (section 3.2)
    fixed_large:   sigma_t^2 = beta_t                                           (section 3.2)
    learned:       sigma_t^2 = exp(v), v the second half of the output's channels
    learned_range: sigma_t^2 = exp(f log beta_t + (1 - f) log beta_tilde_t), f = (v + 1) / 2
                   (Nichol & Dhariwal 2021, eq. 15, with v on [-1, 1])
    """
    m = v = model_output
    if variance_type in ("learned", "learned_range"):
        m, v = model_output.chunk(2, dim=1)
    x_0 = predict_x0(x_t, m, t, schedule, prediction_type)
    if clip_range is not None:
        x_0 = x_0.clamp(-clip_range, clip_range)
    mean, beta_tilde = q_posterior(x_0, x_t, t, schedule)
    beta = _at(schedule.betas, t, x_t)
    if variance_type == "fixed_small":
        variance = beta_tilde
    elif variance_type == "fixed_large":
        variance = beta
    elif variance_type == "learned":
        variance = v.exp()
    elif variance_type == "learned_range":
        f = (v + 1) / 2
        variance = (f * beta.log() + (1 - f) * _at(schedule.posterior_log_variance_clipped, t, x_t)).exp()
    else:
        raise ValueError(
            f"unknown variance_type {variance_type!r}; choose one of fixed_small, fixed_large, learned, learned_range"
        )
    return mean, variance, x_0


def p_sample(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor | int,
    schedule: Schedule,
    z: Tensor | None = None,
    generator: Any = None,
    **options: Any,
) -> Tensor:
    """Draw x_{t-1} = mu_theta(x_t, t) + sigma_t z, without noise at t = 0   (Algorithm 2, lines 3 and 4).

    `options` are those of `p_mean_variance`.
    """
    mean, variance, _ = p_mean_variance(x_t, model_output, t, schedule, **options)
    noisy = _at(torch.arange(schedule.num_timesteps, device="cpu"), t, x_t) > 0
    return torch.where(noisy, mean + variance.sqrt() * _noise(z, x_t, generator), mean)


def p_sample_loop(
    model: Model,
    x_T: Tensor,
    schedule: Schedule,
    *,
    timesteps: Sequence[int] | Tensor | None = None,
    z: Sequence[Tensor] | Tensor | None = None,
    generator: Any = None,
    **options: Any,
) -> Tensor:
    """Draw x_0 from x_T ~ N(0, I) by ancestral sampling   (Algorithm 2).

    Args:
        model: called as model(x_t, t) with t int64 [B].
        x_T: [B, ...], the noise to start from.
        timesteps: the timesteps to visit, descending; all by default.
        z: one noise tensor [B, ...] per step, in order of execution.
        generator: used where z is not given.
        options: those of `p_mean_variance`.
    """
    visited = (
        torch.arange(schedule.num_timesteps, device="cpu").flip(0)
        if timesteps is None
        else torch.as_tensor(timesteps, device="cpu")
    )
    respaced = schedule.respaced(visited)
    x = x_T
    for i, t in enumerate(visited.tolist()):
        output = model(x, torch.full((len(x),), t, device=x.device))
        x = p_sample(x, output, len(visited) - 1 - i, respaced, None if z is None else z[i], generator, **options)
    return x


def simple_loss(
    model: Model,
    x_0: Tensor,
    t: Tensor,
    schedule: Schedule,
    eps: Tensor | None = None,
    generator: Any = None,
) -> Tensor:
    """Return L_simple = E || eps - eps_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t) ||^2   (eq. 14).

    The mean runs over the elements as well as the batch.
    """
    eps = _noise(eps, x_0, generator)
    return (eps - model(q_sample(x_0, t, schedule, eps), t)).square().mean()


def hybrid_loss(
    model: Model,
    x_0: Tensor,
    t: Tensor,
    schedule: Schedule,
    eps: Tensor | None = None,
    generator: Any = None,
    *,
    variance_type: str = "learned_range",
    vlb_weight: float = 0.001,
) -> Tensor:
    """Return L_simple + lambda L_vlb, the bound for the variance alone   (Nichol & Dhariwal 2021, eq. 16).

    T times the term at t, in bits per dimension, estimates L_vlb.
    """
    eps = _noise(eps, x_0, generator)
    x_t = q_sample(x_0, t, schedule, eps)
    m, v = model(x_t, t).chunk(2, dim=1)
    frozen = torch.cat([m.detach(), v], dim=1)
    term = vlb_term(frozen, x_0, x_t, t, schedule, variance_type=variance_type, clip_range=None)
    return (eps - m).square().mean() + vlb_weight * schedule.num_timesteps * term.mean() / math.log(2.0)


def vlb_term(
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_range: float | None = 1.0,
) -> Tensor:
    """Return each sample's term of the variational bound in nats per element, [B]   (eq. 5).

    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)), in closed form for Gaussians
    L_0     = -log p_theta(x_0 | x_1), a Gaussian's mass in the bins of 8-bit images   (eq. 13)

    At t = 0 fixed variances are beta_tilde of the next timestep, since beta_tilde itself is 0 (Ho et al.'s code).
    """
    mean, variance, _ = p_mean_variance(
        x_t,
        model_output,
        t,
        schedule,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_range=clip_range,
    )
    log_beta_tilde = _at(schedule.posterior_log_variance_clipped, t, x_t)
    log_variance = variance.log()
    if variance_type in ("fixed_small", "fixed_large"):
        first = _at(torch.arange(schedule.num_timesteps, device="cpu"), t, x_t) == 0
        log_variance = torch.where(first, log_beta_tilde, log_variance)
    kl = normal_kl(q_posterior(x_0, x_t, t, schedule)[0], log_beta_tilde, mean, log_variance)
    likelihood = discretized_log_likelihood(x_0, mean, 0.5 * log_variance)
    return torch.where(torch.as_tensor(t, device=x_t.device) == 0, -mean_flat(likelihood), mean_flat(kl))


def mean_flat(x: Tensor) -> Tensor:
    """Average over all but the batch dimension: [B, ...] -> [B]."""
    return x.mean(dim=tuple(range(1, x.dim())))


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, elementwise."""
    ratio = (log_variance1 - log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 + ratio + (mean1 - mean2) ** 2 * (-log_variance2).exp() - 1.0)


def discretized_log_likelihood(
    x: Tensor, mean: Tensor, log_sigma: Tensor, cdf: Callable[[Tensor], Tensor] = torch.special.ndtr
) -> Tensor:
    """Return the log of a Gaussian's mass in the 8-bit bin around x in [-1, 1]   (Ho et al. 2020, eq. 13).

    A mass counts as 1e-12 at least, as in the authors' code; float32 loses digits from about 4 sigma on.
    """
    inverse_sigma = (-log_sigma).exp()
    below_upper = cdf((x - mean + _HALF_BIN) * inverse_sigma)
    below_lower = cdf((x - mean - _HALF_BIN) * inverse_sigma)
    mass = torch.where(x > _EDGE, 1.0 - below_lower, below_upper - below_lower)
    return torch.where(x < -_EDGE, below_upper, mass).clamp(min=1e-12).log()


def ddim_step(
    x_0: Tensor,
    eps: Tensor,
    alpha_bar_t: Tensor,
    alpha_bar_prev: Tensor,
    eta: float = 0.0,
    z: Tensor | float = 0.0,
) -> Tensor:
    """Compose x at noise level alpha_bar_prev from the x_0 and eps read off x_t   (Song et al. 2021, eqs. 12 and 16).

    In the notation of Ho et al. (arXiv:2010.02502 writes alpha for alpha_bar). With eta = 0 and alpha_bar_prev below
    alpha_bar_t it is the inversion, from data to noise.
    """
    sigma = torch.zeros((), device="cpu")
    if eta > 0:
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)).sqrt()
    # Rounding can leave a negative number where sigma^2 is the whole variance.
    direction = (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt()
    return alpha_bar_prev.sqrt() * x_0 + direction * eps + sigma * z


def _at(coefficients: Tensor, t: Tensor | int, x: Tensor) -> Tensor:
    """Pick coefficients[t] for every sample: [B, 1, ...] (or [1, 1, ...]) in the dtype of x."""
    t = torch.as_tensor(t, device="cpu").cpu().reshape(-1)
    return coefficients[t].to(x.device, x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def _noise(given: Tensor | None, like: Tensor, generator: Any) -> Tensor:
    if given is not None:
        return given
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
