"""DPM-Solver++(2M) as a table (Lu et al. 2022, arXiv:2211.01095, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm.schedules.schedule import Schedule
from fastddpm.schedules.spacing import check_steps, spaced_timesteps, validate_timesteps
from fastddpm.tables.ddpm import x0_coefficients
from fastddpm.tables.table import Table, make_rows

# Below this many steps the last one is of first order (diffusers' lower_order_final).
FEW_STEPS = 15


def dpm_solver_table(
    schedule: Schedule,
    *,
    steps: int | None = None,
    timesteps: Sequence[int] | Tensor | None = None,
    spacing: str = "linspace",
    steps_offset: int = 0,
    prediction_type: str = "epsilon",
    clip_range: float | None = 1.0,
    order: int = 2,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    final_alpha_cumprod: float = 1.0,
    learned: bool = False,
) -> Table:
    """Tabulate x_i = sigma_i / sigma_{i-1} x_{i-1} - alpha_i (exp(-h_i) - 1) D_i, for the diffusion ODE in lambda.

    D_i = (1 + 1 / (2 r_i)) x_0(x_{i-1}) - 1 / (2 r_i) x_0(x_{i-2}), r_i = h_{i-1} / h_i, h_i = lambda_i - lambda_{i-1},
    with alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = log(alpha / sigma). The first row has no
    predecessor and is of first order, which is DDIM; so is a last row that ends without noise.

    Args:
        schedule: the schedule the network was trained with.
        steps: how many timesteps to visit, chosen by `dpm_solver_timesteps`; all T by default.
        timesteps: the timesteps themselves, strictly descending, instead of `steps`.
        spacing: "linspace", "leading" or "trailing".
        steps_offset: added to "leading" timesteps, as in diffusers.
        prediction_type: what the network returns: "epsilon", "x_0" or "v".
        clip_range: x_0 is clipped to [-clip_range, clip_range]; None switches clipping off.
        order: 2, or 1 for the first-order solver throughout.
        lower_order_final: with fewer than 15 steps, take the last one at first order.
        euler_at_final: take the last step at first order whatever the number of steps.
        final_alpha_cumprod: alpha_bar after the last step; alpha_bar_0 for diffusers' final_sigmas_type="sigma_min".
        learned: the network was trained with a learned variance: the second half of its output is ignored.

    Returns:
        A deterministic table of one row per timestep.

    Raises:
        ValueError: an argument is unknown or out of range, or epsilon is predicted where alpha_bar = 0.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    visited = _visited(schedule.num_timesteps, steps, timesteps, spacing, steps_offset)
    alpha_bar = schedule.alphas_cumprod[visited]
    if not float(alpha_bar[-1]) < final_alpha_cumprod <= 1.0:
        raise ValueError(
            f"final_alpha_cumprod must lie above alpha_bar = {float(alpha_bar[-1]):.6g} of the last timestep and not "
            f"above 1, got {final_alpha_cumprod}"
        )
    levels = torch.cat([alpha_bar, alpha_bar.new_tensor([final_alpha_cumprod])])
    n = len(visited)
    first_order_final = euler_at_final or final_alpha_cumprod == 1.0 or (lower_order_final and n < FEW_STEPS)
    a, b = x0_coefficients(alpha_bar, prediction_type)
    c_xt, gain, extrapolation = _step_coefficients(levels)
    if order == 1:
        extrapolation = torch.zeros_like(extrapolation)
    elif first_order_final:
        extrapolation[-1] = 0.0
    rows64 = make_rows(
        n,
        clip_range,
        a=a,
        b=b,
        c_x0=gain * (1 + extrapolation),
        c_xt=c_xt,
        c_1=0.0 - gain * extrapolation,
    )
    return Table(
        rows64, visited, name="dpm++2m", clip=clip_range is not None, learned=learned, history=int(order == 2 and n > 1)
    )


def dpm_solver_timesteps(T: int, steps: int, spacing: str = "linspace", steps_offset: int = 0) -> Tensor:
    """Choose the solver's timesteps as diffusers does: "linspace" and "leading" drop the last of steps + 1.

    The noise level after the last row is the data's, which stands for the timestep dropped. With steps = T nothing is
    left to drop, and every timestep is visited.

    Returns:
        int64 [steps], strictly descending.

    Raises:
        ValueError: as `spaced_timesteps`.
    """
    check_steps(steps, T)
    if spacing == "trailing" or steps == T:
        return spaced_timesteps(T, steps, spacing, steps_offset)
    return spaced_timesteps(T, steps + 1, spacing, steps_offset)[:-1]


def _visited(T: int, steps: int | None, timesteps: Sequence[int] | Tensor | None, spacing: str, offset: int) -> Tensor:
    if timesteps is None:
        return dpm_solver_timesteps(T, T if steps is None else steps, spacing, offset)
    if steps is not None:
        raise ValueError(f"give steps or timesteps, not both; got steps = {steps} and a list of timesteps")
    return validate_timesteps(timesteps, T)


def _step_coefficients(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigma_i / sigma_{i-1}, -alpha_i (exp(-h_i) - 1) and 1 / (2 r_i), float64 [n], from alpha_bar [n + 1].

    Where alpha_bar is 0 (zero terminal SNR) lambda is -inf: the row after it has r = inf and is of first order.
    """
    alpha, sigma = levels.sqrt(), (1 - levels).sqrt()
    lambda_ = alpha.log() - sigma.log()
    h = lambda_.diff()
    gain = -alpha[1:] * torch.expm1(-h)
    extrapolation = torch.zeros_like(gain)
    # A last level without noise has h = inf, and its row is of first order.
    extrapolation[1:] = torch.where(h[1:].isinf(), 0.0, 0.5 * h[1:] / h[:-1])
    return sigma[1:] / sigma[:-1], gain, extrapolation
