"""RePaint's jumps: the walk of diffusers, and at every network call the distribution of the paper's own loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastddpm import Schedule, ddpm_table
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.tables.by_name import make_table
from fastddpm.tables.repaint import repaint_table
from fastddpm.tables.table import Table

diffusers = pytest.importorskip("diffusers")

SCHEDULE = Schedule.linear()
# Data N(0, 0.3^2), whose exact network is linear: eps = k_t x_t.
VARIANCE = 0.09


def spread_by_rows(table: Table) -> list[float]:
    """The variance of x_t before each network call, and at the end, by a table's rows."""
    variance, seen = 1.0, []
    for row, t in zip(table.rows64, table.timesteps.tolist(), strict=True):
        seen.append(variance)
        a, b, _, _, c_x0, c_xt, c_m, _, sigma, *_ = row.tolist()
        k = slope(t)
        variance = (c_x0 * (a + b * k) + c_xt + c_m * k) ** 2 * variance + sigma**2
    return [*seen, variance]


def slope(t: int) -> float:
    alpha_bar = float(SCHEDULE.alphas_cumprod[t])
    return (1 - alpha_bar) ** 0.5 / (alpha_bar * VARIANCE + 1 - alpha_bar)


def spread_by_the_paper(visits: list[int], steps: list[int]) -> list[float]:
    """The same by Algorithm 1: eqs. 6, 7 and 11 of Ho et al. down, eq. 2 up, one level at a time."""
    alpha_bar = [float(SCHEDULE.alphas_cumprod[t]) for t in steps]
    variance, seen, last = 1.0, [], None
    for position in visits:
        here, before = alpha_bar[position], alpha_bar[position - 1] if position else 1.0
        if last is not None and position > last:
            # To the level of the step that was taken last.
            above, below = alpha_bar[last], alpha_bar[last - 1] if last else 1.0
            variance = above / below * variance + 1 - above / below
        else:
            seen.append(variance)
            beta = 1 - here / before
            x_0 = (1 - (1 - here) ** 0.5 * slope(steps[position])) / here**0.5
            mean = before**0.5 * beta / (1 - here) * x_0 + (1 - beta) ** 0.5 * (1 - before) / (1 - here)
            variance = mean**2 * variance + (1 - before) / (1 - here) * beta
        last = position
    return [*seen, variance]


@pytest.mark.parametrize(("steps", "jump_length", "jump_n_sample"), [(20, 5, 3), (10, 1, 2), (12, 10, 10), (5, 10, 4)])
def test_jumps_are_those_of_diffusers_and_of_the_paper(steps: int, jump_length: int, jump_n_sample: int) -> None:
    scheduler = diffusers.RePaintScheduler()
    scheduler.set_timesteps(steps, jump_length, jump_n_sample)
    visited = scheduler.timesteps.tolist()
    called = [t for t, before in zip(visited, [1001, *visited[:-1]], strict=True) if t < before]
    plain = ddpm_table(SCHEDULE, timesteps=sorted(set(visited), reverse=True), clip_range=None)
    table = repaint_table(plain, jump_length=jump_length, jump_n_sample=jump_n_sample)
    assert table.timesteps.tolist() == called
    listed = sorted(set(visited))
    exact = spread_by_the_paper([listed.index(t) for t in visited], listed)
    assert spread_by_rows(table) == pytest.approx(exact, rel=1e-9)
    torch.testing.assert_close(table.levels[-1], plain.levels[-1])
    alpha_bar = SCHEDULE.alphas_cumprod[table.timesteps]
    torch.testing.assert_close(table.levels[:-1, 0], alpha_bar.sqrt(), rtol=1e-9, atol=0)


def test_jumps_are_options_of_every_one_step_sampler() -> None:
    config = DiffusionConfig()
    for name in ("ddpm", "ddim", "euler_a"):
        table = make_table(name, config, steps=6, jump_length=2, jump_n_sample=3)
        assert len(table) == 6 + 2 * 2 * 2
    options: dict[str, Any] = {"jump_length": 2, "jump_n_sample": 2}
    assert len(make_table("ddim", config, steps=6, strength=0.5, **options)) == 3 + 2
    with pytest.raises(ValueError, match="older x_0; use ddpm or ddim"):
        make_table("unipc3", config, steps=6, **options)
    learned = ddpm_table(SCHEDULE, steps=4, variance_type="learned_range")
    with pytest.raises(ValueError, match="a learned variance"):
        repaint_table(learned)
    with pytest.raises(ValueError, match="jump_length"):
        repaint_table(ddpm_table(SCHEDULE, steps=4), jump_length=0)
