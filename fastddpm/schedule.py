"""Noise schedules: the betas of the forward process and everything derived from them, in float64.

Names are those of Ho et al. 2020. Index t is 0-based: the paper's t is t + 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

MAX_TIMESTEPS = 1_000_000

# Above this alpha_bar_T the last latent keeps more than 22 % of the data's scale (sqrt(0.05)).
GAUSSIAN_END = 0.05

# Nichol & Dhariwal 2021, section 3.2: beta is clipped below 1 to prevent singularities near t = T.
MAX_BETA = 0.999


@dataclass(frozen=True, eq=False)
class Schedule:
    """Hold the betas of q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (Ho et al. 2020, eq. 2).

    Every attribute is a float64 CPU tensor [T].

    Args:
        betas: [T] variances in (0, 1); the last may be exactly 1 (zero terminal SNR).

    Raises:
        ValueError: betas is empty, longer than a million, not finite, outside (0, 1), or so large in total that
            alphas_cumprod reaches 0 before the last step.
        TypeError: betas is not a tensor.
    """

    betas: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.betas, Tensor):
            raise TypeError(f"betas must be a tensor, got {type(self.betas).__name__}; use Schedule.from_betas(values)")
        if self.betas.dim() != 1:
            raise ValueError(f"betas must have one dimension [T], got shape {tuple(self.betas.shape)}")
        check_num_timesteps(len(self.betas))
        object.__setattr__(self, "betas", self.betas.detach().to("cpu", torch.float64, copy=True))
        _check_betas(self.betas)
        _check_alphas_cumprod(self.alphas_cumprod)

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps of the forward process."""
        return len(self.betas)

    @cached_property
    def alphas(self) -> Tensor:
        """alpha_t = 1 - beta_t (Ho et al. 2020, section 2)."""
        return 1.0 - self.betas

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha_bar_t = prod_{s <= t} alpha_s (Ho et al. 2020, section 2)."""
        return torch.cumprod(self.alphas, dim=0)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """alpha_bar_{t-1}, with alpha_bar = 1 before the first step."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @cached_property
    def sqrt_alphas_cumprod(self) -> Tensor:
        """Coefficient of x_0 in q(x_t | x_0) (eq. 4)."""
        return self.alphas_cumprod.sqrt()

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Tensor:
        """Standard deviation of q(x_t | x_0) (eq. 4)."""
        return (1.0 - self.alphas_cumprod).sqrt()

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> Tensor:
        """Coefficient of x_t in x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t) (eq. 15)."""
        return (1.0 / self.alphas_cumprod).sqrt()

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> Tensor:
        """Coefficient of -eps in x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t) (eq. 15)."""
        return ((1.0 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @cached_property
    def posterior_variance(self) -> Tensor:
        """beta_tilde_t, the variance of q(x_{t-1} | x_t, x_0) (eq. 7); 0 at t = 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef1(self) -> Tensor:
        """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0) (eq. 7)."""
        return self.alphas_cumprod_prev.sqrt() * self.betas / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Tensor:
        """Coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0) (eq. 7)."""
        return self.alphas.sqrt() * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Space beta linearly, the same ends for every T (Ho et al. 2020, section 4)."""
        return cls.named("linear", T, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def linear_rescaled(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Space beta linearly with both ends multiplied by 1000 / T, so that alpha_bar_T hardly depends on T."""
        return cls.named("linear_rescaled", T, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Space sqrt(beta) linearly (Rombach et al. 2022's code)."""
        return cls.named("scaled_linear", T, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def cosine(cls, T: int = 1000) -> Schedule:
        """Let alpha_bar fall as cos^2 (Nichol & Dhariwal 2021, eq. 17); diffusers' squaredcos_cap_v2."""
        return cls.named("cosine", T)

    @classmethod
    def sigmoid_geodiff(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Let beta rise as a sigmoid over [-6, 6] (Xu et al. 2022, GeoDiff); diffusers' "sigmoid"."""
        return cls.named("sigmoid_geodiff", T, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def sigmoid_jabri(cls, T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Schedule:
        """Let alpha_bar fall as a sigmoid (Jabri et al. 2022, arXiv:2212.11972); lucidrains' "sigmoid"."""
        return cls.named("sigmoid_jabri", T, start=start, end=end, tau=tau)

    @classmethod
    def laplace(cls, T: int = 1000) -> Schedule:
        """Distribute the log-SNR as a Laplace density (Hang et al. 2024, arXiv:2407.03297); diffusers' form."""
        return cls.named("laplace", T)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> Schedule:
        """Use explicit betas [T], first step first; warn when they do not end near a Gaussian."""
        schedule = cls(torch.as_tensor(betas, dtype=torch.float64))
        warn_unless_gaussian_end(schedule)
        return schedule

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Sequence[float] | Tensor) -> Schedule:
        """Use explicit alpha_bar [T]: beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}.

        Raises:
            ValueError: alphas_cumprod does not fall strictly, or leaves [0, 1).
        """
        alphas_cumprod = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
        _check_alphas_cumprod(alphas_cumprod)
        return cls.from_betas(_betas_from_alphas_cumprod(alphas_cumprod))

    @classmethod
    def named(cls, name: str, num_timesteps: int = 1000, **options: Any) -> Schedule:
        """Build one of `SCHEDULES` by name; options are those of the constructor of the same name.

        Raises:
            ValueError: the name is unknown, or an argument is out of range.
        """
        schedule = cls(named_betas(name, num_timesteps, **options))
        warn_unless_gaussian_end(schedule)
        return schedule

    def zero_terminal_snr(self) -> Schedule:
        """Shift and scale sqrt(alpha_bar) so that alpha_bar_T = 0 and alpha_bar_1 stays (Lin et al. 2023, Alg. 1).

        The result suits v and x_0 prediction; epsilon says nothing about x_0 where alpha_bar is 0.

        Raises:
            ValueError: T = 1, which leaves nothing to scale.
        """
        if self.num_timesteps < 2:
            raise ValueError("zero_terminal_snr needs num_timesteps >= 2, got 1; use Schedule.from_betas([1.0])")
        root = self.sqrt_alphas_cumprod
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return Schedule(_betas_from_alphas_cumprod(root**2))

    def respaced(self, timesteps: Tensor) -> Schedule:
        """Keep only `timesteps`: beta'_i = 1 - alpha_bar_{t_i} / alpha_bar_{t_{i-1}} (Nichol & Dhariwal 2021, eq. 19).

        Args:
            timesteps: int64, distinct, in either order; step i of the result is the i-th smallest of them.
        """
        kept = timesteps.sort().values
        if len(kept) == self.num_timesteps:
            return self
        return Schedule(_betas_from_alphas_cumprod(self.alphas_cumprod[kept]))


def warn_unless_gaussian_end(schedule: Schedule) -> None:
    """Warn when x_T still carries data, so that starting from N(0, I) does not match the forward process."""
    alpha_bar_T = float(schedule.alphas_cumprod[-1])
    if alpha_bar_T > GAUSSIAN_END:
        T = schedule.num_timesteps
        # linear_rescaled needs 0.02 * 1000 / T < 1.
        fix = "Schedule.linear_rescaled(T) or Schedule.cosine(T)" if T > 20 else "Schedule.cosine(T)"
        warnings.warn(
            f"the schedule does not end near a Gaussian: alpha_bar_T = {alpha_bar_T:.4g} after T = {T} steps, so x_T "
            f"keeps {math.sqrt(alpha_bar_T):.0%} of the data and sampling from N(0, I) will not match; use {fix}",
            UserWarning,
            stacklevel=4,
        )


def check_num_timesteps(num_timesteps: int) -> None:
    """Raise unless 1 <= num_timesteps <= 1,000,000."""
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int):
        raise TypeError(f"num_timesteps must be an int, got {num_timesteps!r}")
    if not 1 <= num_timesteps <= MAX_TIMESTEPS:
        raise ValueError(f"num_timesteps must lie in 1..{MAX_TIMESTEPS}, got {num_timesteps}")


def named_betas(name: str, num_timesteps: int, **options: Any) -> Tensor:
    """Compute the float64 betas [T] of one of `SCHEDULES`."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown beta schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    check_num_timesteps(num_timesteps)
    return SCHEDULES[name](num_timesteps, **options)


def _linear_betas(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    _check_ends(beta_start, beta_end)
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64)


def _linear_rescaled_betas(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    _check_ends(beta_start, beta_end)
    scale = 1000.0 / T
    if max(beta_start, beta_end) * scale >= 1.0:
        raise ValueError(
            f"linear_rescaled reaches beta = {max(beta_start, beta_end) * scale:.4g} at num_timesteps = {T}, and beta "
            "must stay below 1; use Schedule.cosine(T) for so few steps"
        )
    return torch.linspace(beta_start * scale, beta_end * scale, T, dtype=torch.float64)


def _scaled_linear_betas(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    _check_ends(beta_start, beta_end)
    return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2


def _sigmoid_geodiff_betas(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    _check_ends(beta_start, beta_end)
    return torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid() * (beta_end - beta_start) + beta_start


def _cosine_betas(T: int) -> Tensor:
    # s = 0.008 keeps sqrt(beta_0) just below the pixel bin 1 / 127.5 (Nichol & Dhariwal 2021, section 3.2).
    return _betas_from_alpha_bar(T, lambda u: ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2)


def _sigmoid_jabri_betas(T: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
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
    values = alpha_bar(torch.arange(T + 1, dtype=torch.float64) / T)
    return (1.0 - values[1:] / values[:-1]).clamp(max=MAX_BETA)


def _betas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return 1.0 - alphas_cumprod / previous


def _check_ends(beta_start: float, beta_end: float) -> None:
    for field, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{field} must lie in (0, 1), got {value}")


def _check_betas(betas: Tensor) -> None:
    inside = (betas > 0.0) & (betas < 1.0)
    inside[-1] |= betas[-1] == 1.0
    if not inside.all():
        t = int((~inside).nonzero()[0])
        raise ValueError(f"betas must lie in (0, 1), the last may be 1; got betas[{t}] = {float(betas[t])}")


def _check_alphas_cumprod(alphas_cumprod: Tensor) -> None:
    ones = torch.ones(1, dtype=torch.float64)
    falls = (alphas_cumprod < torch.cat([ones, alphas_cumprod[:-1]])) & (alphas_cumprod >= 0.0)
    if not falls.all():
        t = int((~falls).nonzero()[0])
        raise ValueError(
            f"alphas_cumprod must fall strictly from 1 towards 0; got alphas_cumprod[{t}] = {float(alphas_cumprod[t])} "
            f"after {float(alphas_cumprod[t - 1]) if t else 1.0}; use smaller betas or fewer steps"
        )
