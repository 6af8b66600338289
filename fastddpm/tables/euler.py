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

    Args:
        schedule: the schedule the network was trained with.
        options: see `SolverOptions`.

    Returns:
        A deterministic table of one row per step.

    Raises:
        ValueError: an argument is unknown or out of range, or epsilon is predicted where alpha_bar = 0.
        TypeError: there is no such option.
    """
    return solver_table("euler", schedule, options, lambda levels: multistep_columns(levels, 1))


def euler_ancestral_table(schedule: Schedule, **options: Unpack[SolverOptions]) -> Table:
    """Tabulate Euler's method down to less noise than the next level has, and noise up to it (k-diffusion).

    s_up^2 = s_next^2 (s^2 - s_next^2) / s^2, s_down^2 = s_next^2 - s_up^2: DDPM's step with the small variance.

    Args:
        schedule: the schedule the network was trained with.
        options: see `SolverOptions`.

    Returns:
        A stochastic table of one row per step.

    Raises:
        ValueError: an argument is unknown or out of range, or epsilon is predicted where alpha_bar = 0.
        TypeError: there is no such option.
    """
    return solver_table("euler_a", schedule, options, lambda levels: multistep_columns(levels, 1, tau=1.0))


def heun_table(schedule: Schedule, **options: Unpack[SolverOptions]) -> Table:
    """Tabulate Heun's method (Karras et al. 2022, Algorithm 1) as two rows a step: Euler's, and its correction.

    With s = sigma / alpha, the correction of x' by the mean of both slopes is linear in x' and the two estimates,
        x = x' - alpha_next (s_next - s) / (2 s_next) (x_0(x') - x_0(x)),
    so that the state before the step need not be kept. The last step ends without noise and is Euler's alone.

    Args:
        schedule: the schedule the network was trained with.
        options: see `SolverOptions`; final is "zero", or sigmas end in 0.

    Returns:
        A deterministic table of 2 steps - 1 rows.

    Raises:
        ValueError: an argument is unknown or out of range, or alpha_bar is 0 at a level.
        TypeError: there is no such option.
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
    columns = {
        name: torch.zeros(2 * len(levels.timesteps) - 1, dtype=torch.float64, device="cpu")
        for name in ("c_xt", "c_x0", "c_1")
    }
    for name in ("c_xt", "c_x0"):
        columns[name][::2] = euler[name]
    columns["c_xt"][1::2], columns["c_x0"][1::2], columns["c_1"][1::2] = 1.0, gain, -gain
    return columns
