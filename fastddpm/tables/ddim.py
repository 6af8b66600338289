"""DDIM as a table: deterministic or stochastic sampling, and its inversion (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm.checks import number
from fastddpm.schedules.schedule import Schedule
from fastddpm.schedules.spacing import resolve_timesteps
from fastddpm.tables.ddpm import x0_coefficients
from fastddpm.tables.table import Table, level_rows, make_rows


def ddim_table(
    schedule: Schedule,
    *,
    steps: int | None = None,
    timesteps: Sequence[int] | Tensor | None = None,
    spacing: str = "linspace",
    steps_offset: int = 0,
    prediction_type: str = "epsilon",
    eta: float = 0.0,
    clip_range: float | None = 1.0,
    rederive_eps: bool = True,
    final_alpha_cumprod: float = 1.0,
    learned: bool = False,
    eps_square: Sequence[float] | Tensor | None = None,
) -> Table:
    """Tabulate x_prev = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev - sigma^2) eps + sigma z (eq. 12).

    sigma = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_prev)   (eq. 16)

    With `eps_square` the noise has Analytic-DPM's standard deviation instead, which adds the spread of x_0 given x_t,
    sigma*^2 = sigma^2 + (sqrt((1 - alpha_bar_t) alpha_bar_prev / alpha_bar_t) - sqrt(1 - alpha_bar_prev - sigma^2))^2
               (1 - eps_square)      (Bao et al. 2022, arXiv:2201.06503, theorem 1),
    and none on the last row.

    Args:
        schedule: the schedule the network was trained with.
        steps, timesteps, spacing, steps_offset: what is visited, see `fastddpm.schedules.spacing.resolve_timesteps`.
        prediction_type: what the network returns: "epsilon", "x_0" or "v".
        eta: 0 for the deterministic sampler, 1 for the noise of DDPM's fixed_small.
        clip_range: x_0 is clipped to [-clip_range, clip_range]; None switches clipping off.
        rederive_eps: take eps from x_t and the clipped x_0 (OpenAI, lucidrains, diffusers' use_clipped_model_output)
            rather than from the network's output alone (diffusers' default). Without clipping both are the same.
        final_alpha_cumprod: alpha_bar after the last step; alpha_bar_0 for diffusers' set_alpha_to_one=False.
        learned: the network was trained with a learned variance: the second half of its output is ignored.
        eps_square: the mean of eps_theta(x_t, t)^2 over data and elements at each timestep visited, in [0, 1]:
            Analytic-DDPM with eta = 1, Analytic-DDIM with eta = 0.

    Returns:
        A table of one row per timestep, each leading to the next timestep of the list.

    Raises:
        ValueError: an argument is unknown or out of range, or epsilon is predicted where alpha_bar = 0.
    """
    eta = number("eta", eta, ge=0.0, le=1.0)
    final_alpha_cumprod = number("final_alpha_cumprod", final_alpha_cumprod)
    visited = resolve_timesteps(
        schedule.num_timesteps, steps=steps, timesteps=timesteps, spacing=spacing, steps_offset=steps_offset
    )
    alpha_bar = schedule.alphas_cumprod[visited]
    alpha_bar_prev = torch.cat([alpha_bar[1:], alpha_bar.new_tensor([final_alpha_cumprod])])
    if not float(alpha_bar[-1]) <= final_alpha_cumprod <= 1.0:
        raise ValueError(
            f"final_alpha_cumprod must lie between alpha_bar = {float(alpha_bar[-1]):.6g} of the last timestep and 1, "
            f"got {final_alpha_cumprod}"
        )
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
    # 1 - alpha_bar_prev - sigma^2 without its cancellation, which would leave 1e-8 of noise as eta nears 1.
    kept = 1 - eta**2 + eta**2 * alpha_bar * (1 - alpha_bar_prev) / (alpha_bar_prev * (1 - alpha_bar))
    direction = ((1 - alpha_bar_prev) * kept).sqrt()
    columns = _ddim_columns(alpha_bar, alpha_bar_prev, direction, prediction_type, rederive_eps)
    if eps_square is not None:
        spread = ((1 - alpha_bar) * alpha_bar_prev / alpha_bar).sqrt() - direction
        sigma = (sigma**2 + spread**2 * (1 - _mean_squares(eps_square, len(visited)))).sqrt()
        sigma[-1] = 0.0
    return Table(
        make_rows(len(visited), clip_range, sigma=sigma, **columns),
        visited,
        name="ddim",
        clip=clip_range is not None,
        learned=learned,
        use_m="c_m" in columns,
        levels=level_rows(alpha_bar, alpha_bar_prev[-1:]),
    )


def ddim_inversion_table(
    schedule: Schedule,
    *,
    steps: int | None = None,
    timesteps: Sequence[int] | Tensor | None = None,
    spacing: str = "linspace",
    steps_offset: int = 0,
    prediction_type: str = "epsilon",
    clip_range: float | None = None,
    rederive_eps: bool = False,
    initial_alpha_cumprod: float = 1.0,
    learned: bool = False,
) -> Table:
    """Tabulate eq. 12 with eta = 0 from data to noise, in ascending timesteps.

    The row of timestep t takes the state from the previous noise level to that of t, and the network is asked at t,
    as in diffusers' DDIMInverseScheduler; the same timesteps in descending order then come back with `ddim_table`.

    Args:
        schedule: the schedule the network was trained with.
        steps, timesteps, spacing, steps_offset: as for `ddim_table`, and `timesteps` descends there too.
        prediction_type: what the network returns: "epsilon", "x_0" or "v".
        clip_range: x_0 is clipped to [-clip_range, clip_range]; None, the default, keeps the map invertible.
        rederive_eps: as in `ddim_table`; not possible from alpha_bar = 1, where x_t holds no eps.
        initial_alpha_cumprod: alpha_bar of the data; alpha_bar_0 for diffusers' set_alpha_to_one=False.
        learned: the network was trained with a learned variance: the second half of its output is ignored.

    Returns:
        A deterministic table of one row per timestep, ascending.

    Raises:
        ValueError: an argument is unknown or out of range, or eps cannot be had from the first state.
    """
    initial_alpha_cumprod = number("initial_alpha_cumprod", initial_alpha_cumprod)
    visited = resolve_timesteps(
        schedule.num_timesteps, steps=steps, timesteps=timesteps, spacing=spacing, steps_offset=steps_offset
    ).flip(0)
    target = schedule.alphas_cumprod[visited]
    source = torch.cat([target.new_tensor([initial_alpha_cumprod]), target[:-1]])
    if not float(target[0]) <= initial_alpha_cumprod <= 1.0:
        raise ValueError(
            f"initial_alpha_cumprod must lie between alpha_bar = {float(target[0]):.6g} of the first timestep and 1, "
            f"got {initial_alpha_cumprod}"
        )
    if initial_alpha_cumprod == 1.0 and (rederive_eps or prediction_type == "x_0"):
        raise ValueError(
            "initial_alpha_cumprod = 1 means data without noise, from which x_0 gives no eps; pass "
            "initial_alpha_cumprod=schedule.alphas_cumprod[0], or predict epsilon or v with rederive_eps=False"
        )
    columns = _ddim_columns(source, target, (1 - target).sqrt(), prediction_type, rederive_eps)
    return Table(
        make_rows(len(visited), clip_range, **columns),
        visited,
        name="ddim_inversion",
        clip=clip_range is not None,
        learned=learned,
        use_m="c_m" in columns,
        levels=level_rows(source, target[-1:]),
    )


def _mean_squares(eps_square: Sequence[float] | Tensor, n: int) -> Tensor:
    values = eps_square.tolist() if isinstance(eps_square, Tensor) else list(eps_square)
    if len(values) != n:
        raise ValueError(f"eps_square must hold {n} numbers, one for each timestep; got {len(values)}")
    checked = [number(f"eps_square[{i}]", value, ge=0.0, le=1.0) for i, value in enumerate(values)]
    return torch.tensor(checked, dtype=torch.float64, device="cpu")


def _ddim_columns(
    alpha_bar: Tensor, alpha_bar_prev: Tensor, direction: Tensor, prediction_type: str, rederive_eps: bool
) -> dict[str, Tensor]:
    """Write sqrt(alpha_bar_prev) x_0 + direction eps as columns; a column left out is a term that is off."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    a, b = x0_coefficients(alpha_bar, prediction_type)
    columns = {"a": a, "b": b, "c_x0": alpha_bar_prev.sqrt()}
    if rederive_eps:
        # eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)
        return columns | {"c_x0": alpha_bar_prev.sqrt() - direction * signal / noise, "c_xt": direction / noise}
    if prediction_type == "epsilon":
        return columns | {"c_m": direction}
    if prediction_type == "v":
        # eps = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v   (Salimans & Ho 2022, appendix D)
        return columns | {"c_xt": direction * noise, "c_m": direction * signal}
    return columns | {"c_xt": direction / noise, "c_m": -direction * signal / noise}
