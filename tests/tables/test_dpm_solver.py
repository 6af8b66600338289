"""DPM-Solver++(2M) rows against Algorithm 2, DDIM, an exact ODE solution, and diffusers end to end."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddpm.schedules.diffusion import PREDICTION_TYPES
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.ddim import ddim_table
from fastddpm.tables.dpm_solver import dpm_solver_table, dpm_solver_timesteps
from fastddpm.tables.table import Table
from tests.tables.float64 import execute_table64

SCHEDULE = Schedule.linear()
DIFFUSERS_TYPES = {"epsilon": "epsilon", "x_0": "sample", "v": "v_prediction"}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def linear_model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Depend on x, on its neighbours and on t, without saturating."""
    return 0.6 * x + 0.2 * x.roll(1, dims=-1) + t.reshape(-1, *[1] * (x.dim() - 1)) / 2000 - 0.2


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
        (8, 1.0, {}, False),
        (20, 1.0, {}, False),
        (8, float(SCHEDULE.alphas_cumprod[0]), {}, False),
        (8, float(SCHEDULE.alphas_cumprod[0]), {"lower_order_final": False}, True),
        (20, float(SCHEDULE.alphas_cumprod[0]), {}, True),
        (20, float(SCHEDULE.alphas_cumprod[0]), {"euler_at_final": True}, False),
    ],
)
def test_dpm_solver_table_runs_algorithm_2(steps, final, options, last_is_second_order):
    table = dpm_solver_table(
        SCHEDULE, steps=steps, prediction_type="x_0", clip_range=None, final_alpha_cumprod=final, **options
    )
    assert (table.history, table.use_m) == (1, False)
    ts = table.timesteps.tolist()
    alpha_bars = [*SCHEDULE.alphas_cumprod[table.timesteps].tolist(), final]
    second_order = [False, *[True] * (steps - 2), last_is_second_order]
    x_T = randn(2, 3)
    expected = algorithm_2(linear_model, x_T, alpha_bars, ts, second_order)
    assert relative_error(execute_table64(table, linear_model, x_T), expected) <= 1e-11


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_range", [0.7, None])
def test_dpm_solver_of_first_order_is_ddim(prediction_type, clip_range):
    # Lu et al. 2022, section 4.1: DPM-Solver++ of order 1 is DDIM with eta = 0, eps from the x_0 in use.
    timesteps = dpm_solver_timesteps(1000, 12)
    options = {"timesteps": timesteps, "prediction_type": prediction_type, "clip_range": clip_range}
    first, ddim = dpm_solver_table(SCHEDULE, order=1, **options), ddim_table(SCHEDULE, **options)
    assert first.history == 0
    torch.testing.assert_close(first.rows64, ddim.rows64, rtol=1e-11, atol=1e-13)


def gaussian_error(table: Table, schedule: Schedule, final_alpha_cumprod: float) -> float:
    """Compare a run with the exact flow of the diffusion ODE for data N(0, s^2), where x scales with its std."""
    s2 = 0.25

    def x_0_theta(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = schedule.alphas_cumprod[t].unsqueeze(1)
        return s2 * alpha_bar.sqrt() / (s2 * alpha_bar + 1 - alpha_bar) * x

    def variance(alpha_bar: float) -> float:
        return s2 * alpha_bar + 1 - alpha_bar

    first = float(schedule.alphas_cumprod[table.timesteps[0]])
    exact = math.sqrt(variance(final_alpha_cumprod) / variance(first))
    return abs(float(execute_table64(table, x_0_theta, torch.ones(1, 1, dtype=torch.float64))) - exact)


@pytest.mark.parametrize(("order", "low", "high"), [(1, 1.8, 2.2), (2, 3.5, 5.0)])
def test_dpm_solver_converges_at_its_order(order, low, high):
    # Halving the step divides the error by 2 ** order on a smooth part of a fine schedule.
    schedule = Schedule.linear_rescaled(64_000)
    errors = []
    for stride in (1000, 500, 250):
        timesteps = torch.arange(48_000, 8_000, -stride)
        final = float(schedule.alphas_cumprod[8_000])
        table = dpm_solver_table(
            schedule,
            timesteps=timesteps,
            prediction_type="x_0",
            clip_range=None,
            order=order,
            final_alpha_cumprod=final,
        )
        errors.append(gaussian_error(table, schedule, final))
    for coarse, fine in itertools.pairwise(errors):
        assert low < coarse / fine < high


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
    final = 1.0 if final_sigmas_type == "zero" else float(SCHEDULE.alphas_cumprod[0])
    table = dpm_solver_table(
        SCHEDULE,
        steps=steps,
        spacing=spacing,
        prediction_type=prediction_type,
        clip_range=None,
        final_alpha_cumprod=final,
    )
    assert torch.equal(table.timesteps, scheduler.timesteps)
    # Their float32 noise levels are replaced by ours; their step still rounds its state to float32.
    levels = torch.cat([SCHEDULE.alphas_cumprod[table.timesteps], torch.tensor([final], dtype=torch.float64)])
    scheduler.sigmas = ((1 - levels) / levels).sqrt()
    x_T = randn(2, 3, 4)
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(linear_model(x, t), t, x).prev_sample
    assert relative_error(execute_table64(table, linear_model, x_T), x) <= 2e-6


@st.composite
def lengths(draw):
    T = draw(st.integers(2, 2000))
    return T, draw(st.integers(1, T - 1))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@settings(deadline=None, max_examples=60)
@given(lengths())
def test_dpm_solver_timesteps_matches_diffusers(spacing, pair):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    T, steps = pair
    scheduler = diffusers.DPMSolverMultistepScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    theirs = scheduler.timesteps.tolist()
    # With trailing spacing np.arange overshoots for some pairs, and diffusers then visits a timestep -1 as well.
    assert theirs[steps:] in ([], [-1])
    assert dpm_solver_timesteps(T, steps, spacing).tolist() == theirs[:steps]


def test_dpm_solver_timesteps_at_full_length_visits_everything():
    assert dpm_solver_timesteps(5, 5).tolist() == [4, 3, 2, 1, 0]
    assert len(dpm_solver_table(Schedule.cosine(5))) == 5


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
        ({"order": 3}, "order must be 1 or 2, got 3"),
        ({"final_alpha_cumprod": 1.5}, "final_alpha_cumprod must lie above .* got 1.5"),
        ({"final_alpha_cumprod": 0.1}, "final_alpha_cumprod must lie above .* got 0.1"),
        ({"steps": 0}, "steps must lie in 1..1000"),
        ({"steps": 5, "timesteps": [5, 4]}, "give steps or timesteps, not both"),
        ({"timesteps": [4, 5]}, "must descend strictly"),
        ({"spacing": "karras"}, "unknown spacing 'karras'"),
        ({"prediction_type": "noise"}, "unknown prediction_type 'noise'"),
    ],
)
def test_dpm_solver_table_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        dpm_solver_table(SCHEDULE, **options)
