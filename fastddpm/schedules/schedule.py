"""Noise schedules: the betas of the forward process and everything derived from them, in float64.

Names are those of Ho et al. 2020. Index t is 0-based: the paper's t is t + 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastddpm.checks import shown
from fastddpm.schedules.betas import check_num_timesteps, named_betas
from fastddpm.schedules.sketch import curve

# Above this alpha_bar_T the last latent keeps more than 22 % of the data's scale (sqrt(0.05)).
MISMATCH_BEYOND = 0.05


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
        _check_alphas_cumprod(self.alphas_cumprod, self.betas)

    def __repr__(self) -> str:
        first, last, end = float(self.betas[0]), float(self.betas[-1]), float(self.alphas_cumprod[-1])
        return f"Schedule(T = {self.num_timesteps}, betas from {first:.4g} to {last:.4g}, alpha_bar_T = {end:.4g})"

    def _repr_html_(self) -> str:
        return f"<code>{self}</code><br>{curve(self.alphas_cumprod.tolist(), 'alpha_bar_t over t')}"

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
        return torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), self.alphas_cumprod[:-1]])

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
    def posterior_log_variance_clipped(self) -> Tensor:
        """log beta_tilde_t, with the value of t = 1 at t = 0, where beta_tilde is 0 (Nichol & Dhariwal 2021's code)."""
        variance = self.posterior_variance.clone()
        variance[0] = variance[1] if self.num_timesteps > 1 else self.betas[0]
        return variance.log()

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
        return cls._checked(named_betas("linear", T, beta_start=beta_start, beta_end=beta_end))

    @classmethod
    def linear_rescaled(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Space beta linearly with both ends multiplied by 1000 / T, so that alpha_bar_T hardly depends on T."""
        return cls._checked(named_betas("linear_rescaled", T, beta_start=beta_start, beta_end=beta_end))

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Space sqrt(beta) linearly (Rombach et al. 2022's code)."""
        return cls._checked(named_betas("scaled_linear", T, beta_start=beta_start, beta_end=beta_end))

    @classmethod
    def cosine(cls, T: int = 1000) -> Schedule:
        """Let alpha_bar fall as cos^2 (Nichol & Dhariwal 2021, eq. 17); diffusers' squaredcos_cap_v2."""
        return cls._checked(named_betas("cosine", T))

    @classmethod
    def sigmoid_geodiff(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Let beta rise as a sigmoid over [-6, 6] (Xu et al. 2022, GeoDiff); diffusers' "sigmoid"."""
        return cls._checked(named_betas("sigmoid_geodiff", T, beta_start=beta_start, beta_end=beta_end))

    @classmethod
    def sigmoid_jabri(cls, T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Schedule:
        """Let alpha_bar fall as a sigmoid (Jabri et al. 2022, arXiv:2212.11972); lucidrains' "sigmoid"."""
        return cls._checked(named_betas("sigmoid_jabri", T, start=start, end=end, tau=tau))

    @classmethod
    def laplace(cls, T: int = 1000) -> Schedule:
        """Distribute the log-SNR as a Laplace density (Hang et al. 2024, arXiv:2407.03297); diffusers' form."""
        return cls._checked(named_betas("laplace", T))

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> Schedule:
        """Use explicit betas [T], first step first; warn when they do not end near a Gaussian."""
        return cls._checked(_as_float64("betas", betas))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Sequence[float] | Tensor) -> Schedule:
        """Use explicit alpha_bar [T]: beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}.

        Raises:
            ValueError: alphas_cumprod does not fall strictly, or leaves [0, 1).
        """
        alphas_cumprod = _as_float64("alphas_cumprod", alphas_cumprod)
        _check_alphas_cumprod(alphas_cumprod)
        return cls._checked(_betas_from_alphas_cumprod(alphas_cumprod))

    @classmethod
    def named(cls, name: str, num_timesteps: int = 1000, **options: Any) -> Schedule:
        """Build one of `fastddpm.schedules.betas.SCHEDULES` by name, with the options of the constructor so named.

        Raises:
            ValueError: the name is unknown, or an argument is out of range.
        """
        return cls._checked(named_betas(name, num_timesteps, **options))

    @classmethod
    def _checked(cls, betas: Tensor) -> Schedule:
        schedule = cls(betas)
        warn_unless_gaussian_end(schedule, stacklevel=4)
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


def warn_unless_gaussian_end(schedule: Schedule, stacklevel: int = 3) -> None:
    """Warn when x_T still carries data, so that starting from N(0, I) does not match the forward process."""
    alpha_bar_T = float(schedule.alphas_cumprod[-1])
    if alpha_bar_T > MISMATCH_BEYOND:
        T = schedule.num_timesteps
        # linear_rescaled needs 0.02 * 1000 / T < 1.
        rescaled = "rescaled linear (Schedule.linear_rescaled) or " if T > 20 else ""
        warnings.warn(
            f"the schedule does not end near a Gaussian: alpha_bar_T = {alpha_bar_T:.4g} after T = {T} steps, so x_T "
            f"keeps {math.sqrt(alpha_bar_T):.0%} of the data and sampling from N(0, I) will not match; use "
            f"{rescaled}cosine betas (Schedule.cosine)",
            UserWarning,
            stacklevel=stacklevel,
        )


def _betas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    previous = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), alphas_cumprod[:-1]])
    return 1.0 - alphas_cumprod / previous


def _check_betas(betas: Tensor) -> None:
    inside = (betas > 0.0) & (betas < 1.0)
    inside[-1] |= betas[-1] == 1.0
    if not inside.all():
        t = int((~inside).nonzero()[0])
        raise ValueError(f"betas must lie in (0, 1), the last may be 1; got betas[{t}] = {float(betas[t])}")


def _as_float64(name: str, values: Sequence[float] | Tensor) -> Tensor:
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise ValueError(f"{name} must be a list of numbers, got {shown(values)}") from None
    if tensor.dim() != 1:
        raise ValueError(f"{name} must have one dimension [T], got shape {tuple(tensor.shape)}")
    return tensor


def _check_alphas_cumprod(alphas_cumprod: Tensor, betas: Tensor | None = None) -> None:
    ones = torch.ones(1, dtype=torch.float64, device="cpu")
    falls = (alphas_cumprod < torch.cat([ones, alphas_cumprod[:-1]])) & (alphas_cumprod >= 0.0)
    if not falls.all():
        t = int((~falls).nonzero()[0])
        raise ValueError(
            f"alphas_cumprod must fall strictly from 1 towards 0; got alphas_cumprod[{t}] = {float(alphas_cumprod[t])} "
            f"after {float(alphas_cumprod[t - 1]) if t else 1.0}"
            + ("" if betas is None else f", where betas[{t}] = {float(betas[t]):.6g}; use smaller betas or fewer steps")
        )
