"""Enums, betas, float64 tables and rows of `fastddpm.integrations.openai`.

Names are those of OpenAI's improved-diffusion and guided-diffusion (Nichol & Dhariwal 2021; Dhariwal & Nichol 2021).
Coefficients are float64 NumPy arrays, rounded to float32 where they meet a tensor; rows repeat that arithmetic.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastddpm.schedules import spacing
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.table import make_rows

Array = np.ndarray[Any, np.dtype[np.float64]]
E = TypeVar("E", bound=enum.Enum)


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """Where the variance of p_theta comes from: learned log-variance, beta_tilde, beta, or learned between the two."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """The training objective; the RESCALED forms weigh the variational bound by T (MSE: T / 1000)."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether the objective is the variational bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class Tables:
    """The float64 attributes [T] of a diffusion."""

    betas: Array
    alphas_cumprod: Array
    alphas_cumprod_prev: Array
    alphas_cumprod_next: Array
    sqrt_alphas_cumprod: Array
    sqrt_one_minus_alphas_cumprod: Array
    log_one_minus_alphas_cumprod: Array
    sqrt_recip_alphas_cumprod: Array
    sqrt_recipm1_alphas_cumprod: Array
    posterior_variance: Array
    posterior_log_variance_clipped: Array
    posterior_mean_coef1: Array
    posterior_mean_coef2: Array


def as_member(kind: type[E], value: Any) -> E:
    """Return `value` as a member of `kind`; members of OpenAI's enum of the same name are translated.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, enum.Enum) and type(value).__name__ == kind.__name__ and value.name in kind.__members__:
        return kind[value.name]
    raise TypeError(f"expected a member of {kind.__name__} ({', '.join(kind.__members__)}), got {value!r}")


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> Array:
    """Return the betas of "linear" (ends scaled by 1000 / T) or "cosine" (Nichol & Dhariwal 2021, eq. 17), float64.

    Raises:
        NotImplementedError: another name.
    """
    T = num_diffusion_timesteps
    if schedule_name == "linear":
        return np.linspace(0.0001 * (1000 / T), 0.02 * (1000 / T), T, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(T, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise NotImplementedError(f"unknown beta schedule: {schedule_name}; known: linear, cosine")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> Array:
    """Return betas whose cumulative product follows alpha_bar: [0, 1] -> (0, 1], each at most max_beta; float64 [T]."""
    grid = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - after / before, max_beta) for before, after in itertools.pairwise(grid)])


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Return the timesteps that `section_counts` keeps, as a set; see `fastddpm.schedules.spacing.space_timesteps`."""
    return set(spacing.space_timesteps(num_timesteps, section_counts).tolist())


def make_tables(betas: Array) -> dict[str, Array]:
    """Compute the attributes `Tables` from betas [T], read-only since rows are made of them.

    In NumPy and in the order of the original's formulas, whose last bits differ from PyTorch's.
    """
    Schedule(torch.from_numpy(betas))  # which refuses betas that leave no process
    bar = np.cumprod(1.0 - betas)
    prev, rest = np.append(1.0, bar[:-1]), 1.0 - bar
    variance = betas * (1.0 - prev) / rest
    # A last beta of 1 leaves alpha_bar = 0: infinite coefficients, which only some options use.
    with np.errstate(divide="ignore"):
        recip = 1.0 / bar
    tables = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": prev,
        "alphas_cumprod_next": np.append(bar[1:], 0.0),
        "sqrt_alphas_cumprod": np.sqrt(bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(rest),
        "log_one_minus_alphas_cumprod": np.log(rest),
        "sqrt_recip_alphas_cumprod": np.sqrt(recip),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(recip - 1),
        "posterior_variance": variance,
        # beta_tilde is 0 at t = 0, where the value of t = 1 stands in.
        "posterior_log_variance_clipped": np.log(np.append(variance[1] if len(betas) > 1 else betas[0], variance[1:])),
        "posterior_mean_coef1": betas * np.sqrt(prev) / rest,
        "posterior_mean_coef2": (1.0 - prev) * np.sqrt(1.0 - betas) / rest,
    }
    for table in tables.values():
        table.flags.writeable = False
    return tables


def derive_tables(tables: Mapping[str, Array], var_type: ModelVarType) -> dict[str, Array]:
    """Compute what methods and rows need besides the attributes, float64 [T] each.

    model_variance and model_log_variance are those of FIXED_SMALL or FIXED_LARGE; where beta_tilde is 0, at t = 0, the
    latter (and both of FIXED_LARGE) hold the value of t = 1.
    """
    betas, log_small = tables["betas"], tables["posterior_log_variance_clipped"]
    variance, log_variance = tables["posterior_variance"], log_small
    if var_type is ModelVarType.FIXED_LARGE:
        variance = np.append(np.exp(log_small[0]) if len(betas) == 1 else variance[1], betas[1:])
        log_variance = np.log(variance)
    coef1, coef2 = tables["posterior_mean_coef1"], tables["posterior_mean_coef2"]
    return {
        "log_betas": np.log(betas),
        "one_minus_alphas_cumprod": 1.0 - tables["alphas_cumprod"],
        "model_variance": variance,
        "model_log_variance": log_variance,
        "recip_coef1": 1.0 / coef1,
        "coef2_over_coef1": coef2 / coef1,
    }


def p_rows(tables: Mapping[str, Array], mean_type: ModelMeanType, var_type: ModelVarType) -> Tensor:
    """Tabulate p_sample: float64 rows [T, K] of float32 values, row t for timestep t; of attributes and the derived."""
    a, b = _x0_coefficients(tables, mean_type)
    noisy = torch.ones(len(a), device="cpu")
    noisy[0] = 0.0
    columns: dict[str, Tensor] = {"a": a, "b": b, "sigma": noisy}
    if mean_type is ModelMeanType.PREVIOUS_X:
        columns["c_m"] = torch.ones_like(a)
    else:
        columns |= {"c_x0": f32(tables["posterior_mean_coef1"]), "c_xt": f32(tables["posterior_mean_coef2"])}
    if var_type is ModelVarType.LEARNED:
        columns["h1"] = 0.5 * noisy
    elif var_type is ModelVarType.LEARNED_RANGE:
        # log sigma^2 = f log beta + (1 - f) log beta_tilde with f = (v + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).
        low, high = (f32(tables[name]).double() for name in ("posterior_log_variance_clipped", "log_betas"))
        columns |= {"h0": 0.25 * (high + low) * noisy, "h1": 0.25 * (high - low) * noisy}
    else:
        columns["sigma"] = (0.5 * f32(tables["model_log_variance"])).exp() * noisy
    return make_rows(len(a), 1.0, **columns)


def ddim_rows(tables: Mapping[str, Array], mean_type: ModelMeanType, eta: float) -> Tensor:
    """Tabulate ddim_sample (Song et al. 2021, eq. 12); eps is derived again from the clipped x_0.

    x_prev = sqrt(bar_prev) x_0 + c eps + sigma z,  eps = (A x_t - x_0) / R,  A, R: the two sqrt_recip tables.
    """
    bar, bar_prev = f32(tables["alphas_cumprod"]), f32(tables["alphas_cumprod_prev"])
    sigma = eta * ((1 - bar_prev) / (1 - bar)).sqrt() * (1 - bar / bar_prev).sqrt()
    return _ddim(tables, mean_type, bar_prev.sqrt(), (1 - bar_prev - sigma**2).sqrt(), sigma)


def ddim_reverse_rows(tables: Mapping[str, Array], mean_type: ModelMeanType) -> Tensor:
    """Tabulate ddim_reverse_sample: the same step towards alpha_bar_{t+1}, without noise."""
    bar_next = f32(tables["alphas_cumprod_next"])
    return _ddim(tables, mean_type, bar_next.sqrt(), (1 - bar_next).sqrt(), torch.zeros_like(bar_next))


def q_rows(tables: Mapping[str, Array]) -> Tensor:
    """Tabulate q(x_t | x_0) for `ops.q_sample`, float32 [T, 2]."""
    return torch.stack([f32(tables["sqrt_alphas_cumprod"]), f32(tables["sqrt_one_minus_alphas_cumprod"])], dim=1)


def _ddim(tables: Mapping[str, Array], mean_type: ModelMeanType, signal: Tensor, c: Tensor, sigma: Tensor) -> Tensor:
    a, b = _x0_coefficients(tables, mean_type)
    A, R = (f32(tables[name]).double() for name in ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"))
    c = c.double()
    return make_rows(len(a), 1.0, a=a, b=b, c_x0=signal.double() - c / R, c_xt=c * A / R, sigma=sigma)


def _x0_coefficients(tables: Mapping[str, Array], mean_type: ModelMeanType) -> tuple[Tensor, Tensor]:
    """Return a and b of x_0 = a x_t + b m, float32 [T] each."""
    if mean_type is ModelMeanType.EPSILON:
        return f32(tables["sqrt_recip_alphas_cumprod"]), -f32(tables["sqrt_recipm1_alphas_cumprod"])
    if mean_type is ModelMeanType.PREVIOUS_X:
        return -f32(tables["coef2_over_coef1"]), f32(tables["recip_coef1"])
    ones = torch.ones(len(tables["betas"]), device="cpu")
    return torch.zeros_like(ones), ones


def f32(table: Array) -> Tensor:
    """Round a float64 table to float32, as the originals do where they meet a tensor."""
    return torch.from_numpy(np.array(table)).float()
