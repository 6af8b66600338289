"""Euler's, Euler's ancestral and Heun's method in sigma / alpha as tables (Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from fastddpm.schedules.levels import Levels
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.multistep import multistep_columns
from fastddpm.tables.solver import SolverOptions, solver_table
from fastddpm.tables.table import Table


def euler_table(schedule: Schedule, **options: Unpack[SolverOptions]) -> Table:
    """Tabulate Euler's method for dx / ds = (x - x_0) / s in s = sigma / alpha, which is DDIM without noise.

    Arguments, result and errors are those of `solver_table`.
    """
    return solver_table("euler", schedule, options, lambda levels: multistep_columns(levels, 1))


def euler_ancestral_table(schedule: Schedule, **options: Unpack[SolverOptions]) -> Table:
    """Tabulate Euler's method down to less noise than the next level has, and noise up to it (k-diffusion).

    s_up^2 = s_next^2 (s^2 - s_next^2) / s^2, s_down^2 = s_next^2 - s_up^2: DDPM's step with the small variance.

    Arguments, result and errors are those of `solver_table`.
    """
    return solver_table("euler_a", schedule, options, lambda levels: multistep_columns(levels, 1, tau=1.0))


def heun_table(schedule: Schedule, **options: Unpack[SolverOptions]) -> Table:
    """Tabulate Heun's method (Karras et al. 2022, Algorithm 1) as two rows a step: Euler's, and its correction.

    With s = sigma / alpha, the correction of x' by the mean of both slopes is linear in x' and the two estimates,
        x = x' - alpha_next (s_next - s) / (2 s_next) (x_0(x') - x_0(x)),
    so that the state before the step need not be kept. The last step ends without noise and is Euler's alone.

    Arguments, result (2 steps - 1 rows) and errors are those of `solver_table`; final is "zero", or sigmas end in 0.
    """
    return solver_table("heun", schedule, options, _heun_columns, rows=_twice)


def _twice(levels: Levels) -> tuple[Tensor, Tensor]:
    """Visit each level but the first twice."""
    if levels.alphas_cumprod[0] == 0.0 or levels.alphas_cumprod[-1] != 1.0:
        raise ValueError(
            "Heun's method needs signal at every level and a last step that ends without noise, got alpha_bar from "
            f"{float(levels.alphas_cumprod[0]):.6g} to {float(levels.alphas_cumprod[-1]):.6g}; use unipc"
        )
    return levels.timesteps.repeat_interleave(2)[1:], levels.alphas_cumprod[:-1].repeat_interleave(2)[1:]


def _heun_columns(levels: Levels) -> dict[str, Tensor]:
    euler = multistep_columns(levels, 1)
    s = levels.sigma / levels.alpha
    gain = levels.alpha[1:-1] * (s[:-2] - s[1:-1]) / (2.0 * s[1:-1])
    c_xt, c_x0, c_1 = torch.zeros(3, 2 * len(levels.timesteps) - 1, dtype=torch.float64, device="cpu")
    c_xt[::2], c_x0[::2] = euler["c_xt"], euler["c_x0"]
    c_xt[1::2], c_x0[1::2], c_1[1::2] = 1.0, gain, -gain
    return {"c_xt": c_xt, "c_x0": c_x0, "c_1": c_1}
