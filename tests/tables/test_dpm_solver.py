"""DPM-Solver++(2M) rows against Algorithm 2, DDIM, an exact ODE solution, and diffusers end to end."""

from __future__ import annotations

import math

import pytest
import torch

from fastddpm.schedules.diffusion import PREDICTION_TYPES
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.ddim import ddim_table
from fastddpm.tables.dpm_solver import dpm_solver_table
from tests.tables.float64 import DIFFUSERS_TYPES, execute_table64, linear_model, randn, relative_error

SCHEDULE = Schedule.linear()


def algorithm_2(
    model, x: torch.Tensor, alpha_bars: list[float], ts: list[int], second_order: list[bool]
) -> torch.Tensor:
    """Run Algorithm 2 of Lu et al. 2022 with Python floats; model(x, t) returns x_0."""
    q: list[torch.Tensor] = []
    alpha = [math.sqrt(a) for a in alpha_bars]
    sigma = [math.sqrt(1 - a) for a in alpha_bars]
    lam = [math.log(a / s) if s > 0 else math.inf for a, s in zip(alpha, sigma, strict=True)]
    for i in range(1, len(alpha_bars)):
        q.append(model(x, torch.tensor([ts[i - 1]])))
        h = lam[i] - lam[i - 1]
        D = q[-1]
        if second_order[i - 1]:
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * q[-1] - 1 / (2 * r) * q[-2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (math.exp(-h) - 1) * D
    return x


@pytest.mark.parametrize(
    ("steps", "final", "options", "last_is_second_order"),
    [
        (8, "zero", {}, False),
        (20, "zero", {}, False),
        (8, "sigma_min", {}, False),
        (8, "sigma_min", {"lower_order_final": False}, True),
        (20, "sigma_min", {}, True),
    ],
)
def test_dpm_solver_table_runs_algorithm_2(steps, final, options, last_is_second_order):
    table = dpm_solver_table(SCHEDULE, steps=steps, prediction_type="x_0", clip_range=None, final=final, **options)
    assert (table.history, table.use_m) == (1, False)
    ts = table.timesteps.tolist()
    end = 1.0 if final == "zero" else float(SCHEDULE.alphas_cumprod[0])
    alpha_bars = [*SCHEDULE.alphas_cumprod[table.timesteps].tolist(), end]
    second_order = [False, *[True] * (steps - 2), last_is_second_order]
    x_T = randn(2, 3)
    expected = algorithm_2(linear_model, x_T, alpha_bars, ts, second_order)
    assert relative_error(execute_table64(table, linear_model, x_T), expected) <= 1e-11


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_range", [0.7, None])
def test_dpm_solver_of_first_order_is_ddim(prediction_type, clip_range):
    # Lu et al. 2022, section 4.1: DPM-Solver++ of order 1 is DDIM with eta = 0, eps from the x_0 in use.
    timesteps = torch.arange(960, 0, -80)
    options = {"timesteps": timesteps, "prediction_type": prediction_type, "clip_range": clip_range}
    first, ddim = dpm_solver_table(SCHEDULE, order=1, **options), ddim_table(SCHEDULE, **options)
    assert first.history == 0
    torch.testing.assert_close(first.rows64, ddim.rows64, rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 10, 20])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_dpm_solver_table_samples_as_diffusers(prediction_type, spacing, steps, final_sigmas_type):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=DIFFUSERS_TYPES[prediction_type],
        timestep_spacing=spacing,
        final_sigmas_type=final_sigmas_type,
    )
    scheduler.set_timesteps(steps)
    table = dpm_solver_table(
        SCHEDULE,
        steps=steps,
        spacing=spacing,
        prediction_type=prediction_type,
        clip_range=None,
        final=final_sigmas_type,
    )
    assert torch.equal(table.timesteps, scheduler.timesteps)
    end = 1.0 if final_sigmas_type == "zero" else float(SCHEDULE.alphas_cumprod[0])
    # Their float32 noise levels are replaced by ours; their step still rounds its state to float32.
    levels = torch.cat([SCHEDULE.alphas_cumprod[table.timesteps], torch.tensor([end], dtype=torch.float64)])
    scheduler.sigmas = ((1 - levels) / levels).sqrt()
    x_T = randn(2, 3, 4)
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(linear_model(x, t), t, x).prev_sample
    assert relative_error(execute_table64(table, linear_model, x_T), x) <= 2e-6


def test_dpm_solver_first_row_has_no_predecessor():
    table = dpm_solver_table(SCHEDULE, steps=20)
    c_1 = table.column("c_1")
    assert (float(c_1[0]), float(c_1[-1])) == (0.0, 0.0)
    assert (c_1[1:-1] < 0).all()
    assert (table.column("sigma") == 0).all()


@pytest.mark.parametrize("prediction_type", ["v", "x_0"])
def test_dpm_solver_starts_from_zero_terminal_snr(prediction_type):
    schedule = SCHEDULE.zero_terminal_snr()
    table = dpm_solver_table(schedule, steps=20, prediction_type=prediction_type)
    # From pure noise lambda is -inf: neither the first row nor its successor can extrapolate.
    assert table.column("c_1")[:2].tolist() == [0.0, 0.0]
    # DDIM's step from alpha_bar = 0: x = sqrt(alpha_bar') x_0 + sqrt(1 - alpha_bar') x_T.
    alpha_bar = float(schedule.alphas_cumprod[table.timesteps[1]])
    assert float(table.column("c_x0")[0]) == pytest.approx(math.sqrt(alpha_bar), rel=1e-12)
    assert float(table.column("c_xt")[0]) == pytest.approx(math.sqrt(1 - alpha_bar), rel=1e-12)
    with pytest.raises(ValueError, match="'epsilon' cannot give x_0 where alpha_bar = 0"):
        dpm_solver_table(schedule, steps=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order must be an integer >= 1 and <= 3, got 4"),
        ({"tau": -1.0}, "tau must be a finite number >= 0.0, got -1.0"),
        ({"solver_type": "heum"}, r"unknown solver_type 'heum' \(did you mean 'heun'\?\)"),
    ],
)
def test_dpm_solver_table_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        dpm_solver_table(SCHEDULE, **options)
