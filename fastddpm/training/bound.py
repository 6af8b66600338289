"""The variational bound's terms (Ho et al. 2020, eq. 5) from rows, so that samples at any t share a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastddpm.ops.twins import columns
from fastddpm.reference import discretized_log_likelihood, mean_flat, normal_kl
from fastddpm.schedules.diffusion import LEARNED, check_clip_range
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.ddpm import log_variance_coefficients, x0_coefficients

# Bits in a nat.
BITS = 1.0 / math.log(2.0)


@dataclass(frozen=True, eq=False)
class Bound:
    """Everything that a term of the bound needs, one row a timestep.

    Attributes:
        rows: [T, 7], columns (a, b, c_x0, c_xt, h_q, h0, h1): x0 = a x_t + b m, mean = c_x0 x0 + c_xt x_t, the
            posterior's log-variance h_q and the model's h0 + h1 v. At t = 0, where beta_tilde is 0, fixed variances
            and the posterior have that of t = 1 (as in Ho et al.'s code).
        learned: the network has twice the channels, the second half v.
        clip_range: bound on |x0|, or None.
    """

    rows: Tensor
    learned: bool
    clip_range: float | None

    @classmethod
    def of(cls, schedule: Schedule, prediction_type: str, variance_type: str, clip_range: float | None = 1.0) -> Bound:
        """Tabulate a process in float64.

        Raises:
            ValueError: an argument is unknown or out of range, or epsilon is predicted where alpha_bar = 0.
        """
        check_clip_range(clip_range)
        a, b = x0_coefficients(schedule.alphas_cumprod, prediction_type)
        h0, h1 = log_variance_coefficients(schedule, variance_type)
        means = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
        rows = torch.stack([a, b, *means, schedule.posterior_log_variance_clipped, h0, h1], dim=1)
        return cls(rows, variance_type in LEARNED, clip_range)

    def to(self, device: torch.device, dtype: torch.dtype) -> Bound:
        """Move the rows, in whose dtype terms are computed."""
        return replace(self, rows=self.rows.to(device, dtype))

    def terms(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, *, fixed_mean: bool = False) -> Tensor:
        """Return each sample's term in nats per dimension, [B] in the rows' dtype   (eqs. 5, 7, 13).

        t > 0: KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)); t = 0: -log p_theta(x_0 | x_1), of 8-bit x_0.

        Args:
            output: the network's output [B, C, ...], or [B, 2C, ...] if the variance is learned.
            x_0, x_t: [B, C, ...].
            t: int64 [B].
            fixed_mean: let no gradient reach the mean: there the bound's is too noisy (Nichol & Dhariwal 2021, 3.1).
        """
        output, x_0, x_t = (x.to(self.rows.dtype) for x in (output, x_0, x_t))
        a, b, c_x0, c_xt, h_q, h0, h1 = columns(self.rows, t, x_t)
        m, log_variance = output, h0
        if self.learned:
            m, v = output.chunk(2, dim=1)
            log_variance = h0 + h1 * v
        x0 = a * x_t + b * (m.detach() if fixed_mean else m)
        if self.clip_range is not None:
            x0 = x0.clamp(-self.clip_range, self.clip_range)
        mean = c_x0 * x0 + c_xt * x_t
        kl = normal_kl(c_x0 * x_0 + c_xt * x_t, h_q, mean, log_variance)
        likelihood = discretized_log_likelihood(x_0, mean, 0.5 * log_variance)
        return torch.where(t == 0, -mean_flat(likelihood), mean_flat(kl))


def prior_term(x_0: Tensor, schedule: Schedule) -> Tensor:
    """Return KL(q(x_T | x_0) || N(0, I)) in nats per dimension, float64 [B]: L_T, which no training changes."""
    mean = schedule.sqrt_alphas_cumprod[-1].to(x_0.device) * x_0.double()
    log_variance = 2.0 * schedule.sqrt_one_minus_alphas_cumprod[-1].log().to(x_0.device)
    zero = torch.zeros_like(log_variance)
    return mean_flat(normal_kl(mean, log_variance, zero, zero))
