"""DEIS and iPNDM as tables: multistep methods that interpolate eps (Zhang & Chen 2022, arXiv:2204.13902).

    x_{i+1} = alpha_{i+1} / alpha_i x_i - alpha_{i+1} sigma_i / alpha_i h int_0^1 exp(-u h) eps(lambda_i + u h) du

The same integral as in `fastddpm.tables.multistep` with u counted from the other end, so that it takes its moments. The
rows keep eps instead of x_0, which is therefore not clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from fastddpm.checks import integer
from fastddpm.schedules.levels import Levels
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.multistep import moments, node_counts, weights
from fastddpm.tables.solver import SolverOptions, solver_table
from fastddpm.tables.table import HISTORY, Table

# From lambda_0 .. lambda_{i+1} and a number of estimates to their weights in the step to lambda_{i+1}.
Combine = Callable[[list[float], int], Tensor]


def deis_table(
    schedule: Schedule, *, order: int = 3, lower_order_final: bool = True, **options: Unpack[SolverOptions]
) -> Table:
    """Tabulate DEIS with polynomials in log(sigma / alpha), diffusers' "logrho" (section 3.3, eq. 15).

    Args:
        order: how many estimates of eps a step reads, 1 to 4.
        lower_order_final: lower the order towards the last step.
        schedule, options: as the result and the errors, those of `solver_table`.
    """
    integer("order", order, 1, 4)
    return solver_table(
        "deis", schedule, options, lambda levels: _columns(levels, order, lower_order_final, _exponential), "eps"
    )


def ipndm_table(
    schedule: Schedule, *, order: int = 4, lower_order_final: bool = False, **options: Unpack[SolverOptions]
) -> Table:
    """Tabulate iPNDM: DDIM's step with Adams-Bashforth's combination of the last eps (section 4, Table 2).

    Args:
        order: how many estimates of eps a step reads, 1 to 4; with 4, (55, -59, 37, -9) / 24.
        lower_order_final: lower the order towards the last step.
        schedule, options: as the result and the errors, those of `solver_table`.
    """
    integer("order", order, 1, 4)
    return solver_table(
        "ipndm", schedule, options, lambda levels: _columns(levels, order, lower_order_final, _adams_bashforth), "eps"
    )


def _columns(levels: Levels, order: int, falling: bool, combine: Combine) -> dict[str, Tensor]:
    if levels.alphas_cumprod[0] == 0.0:
        raise ValueError("solvers that interpolate eps need signal at every level, and alpha_bar is 0 at T; use unipc")
    alpha, sigma, lam = levels.alpha, levels.sigma, levels.lambda_.tolist()
    rows = torch.zeros(len(levels.timesteps), len(HISTORY) + 1, dtype=torch.float64, device="cpu")
    for i, count in enumerate(node_counts(levels, order, falling)):
        rows[i, :count] = combine(lam[: i + 2], count)
    rows *= (-alpha[1:] * sigma[:-1] / alpha[:-1])[:, None]
    return {"c_xt": alpha[1:] / alpha[:-1], "c_x0": rows[:, 0], **{c: rows[:, k + 1] for k, c in enumerate(HISTORY)}}


def _exponential(lam: list[float], count: int) -> Tensor:
    """Weigh the last `count` of lambda_0 .. lambda_i for the step to lambda_{i+1}, the last of the list."""
    h = lam[-1] - lam[-2]
    nodes = [1.0] if math.isinf(h) else [(lam[-1] - lam[-2 - j]) / h for j in range(count)]
    return weights(nodes, moments(h, count))


def _adams_bashforth(lam: list[float], count: int) -> Tensor:
    even = weights([-float(j) for j in range(count)], [1.0 / (k + 1) for k in range(count)])
    return even * moments(lam[-1] - lam[-2], 1)[0]
