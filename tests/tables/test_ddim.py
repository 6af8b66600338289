"""DDIM rows against eq. 12 in float64, against DDPM where they coincide, and against diffusers end to end."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastddpm import reference
from fastddpm.schedules.diffusion import PREDICTION_TYPES
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.ddim import ddim_inversion_table, ddim_table
from fastddpm.tables.ddpm import ddpm_table
from tests.ops.pairs import all_pairs, case_id
from tests.tables.float64 import DIFFUSERS_TYPES, execute_row64, execute_table64, linear_model, randn, relative_error

SCHEDULE = Schedule.linear()
ZERO_SNR = SCHEDULE.zero_terminal_snr()


def eps_of(m: torch.Tensor, x_t: torch.Tensor, t: int, schedule: Schedule, prediction_type: str) -> torch.Tensor:
    """Solve x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps for eps, given the network's output alone."""
    if prediction_type == "epsilon":
        return m
    x_0 = reference.predict_x0(x_t, m, t, schedule, prediction_type)
    alpha_bar = schedule.alphas_cumprod[t]
    return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()


ROWS = {
    "schedule": ["linear", "zero_snr"],
    "prediction_type": PREDICTION_TYPES,
    "final_alpha_cumprod": [1.0, float(SCHEDULE.alphas_cumprod[0])],
    "rederive_eps": [True, False],
    "eta": [0.0, 0.3, 1.0],
    "clip_range": [0.5, None],
}


@pytest.mark.parametrize(
    "case",
    # epsilon is refused where alpha_bar = 0.
    [case for case in all_pairs(ROWS) if (case["schedule"], case["prediction_type"]) != ("zero_snr", "epsilon")],
    ids=case_id,
)
def test_ddim_row_equals_equation_12(case):
    schedule, prediction_type, final_alpha_cumprod, rederive_eps, eta, clip_range = case.values()
    schedule = {"linear": SCHEDULE, "zero_snr": ZERO_SNR}[schedule]
    table = ddim_table(
        schedule,
        steps=17,
        spacing="trailing",
        prediction_type=prediction_type,
        eta=eta,
        clip_range=clip_range,
        rederive_eps=rederive_eps,
        final_alpha_cumprod=final_alpha_cumprod,
    )
    assert table.use_m == (not rederive_eps)
    visited = table.timesteps.tolist()
    levels = [*schedule.alphas_cumprod[table.timesteps], torch.tensor(final_alpha_cumprod, dtype=torch.float64)]
    x_t, m, z = randn(3, 2, 4), randn(3, 2, 4, seed=1), randn(3, 2, 4, seed=2)
    for r, t in enumerate(visited):
        x_0 = reference.predict_x0(x_t, m, t, schedule, prediction_type)
        if clip_range is not None:
            x_0 = x_0.clamp(-clip_range, clip_range)
        eps = eps_of(m, x_t, t, schedule, prediction_type)
        if rederive_eps:
            eps = (x_t - levels[r].sqrt() * x_0) / (1 - levels[r]).sqrt()
        expected = reference.ddim_step(x_0, eps, levels[r], levels[r + 1], eta, z)
        # From alpha_bar = 0 with eta = 1, 1 - alpha_bar_prev - sigma^2 is 0: the paper's form leaves sqrt(2^-53).
        tolerance = 1e-7 if eta == 1.0 and levels[r] == 0.0 else 1e-12
        assert relative_error(execute_row64(table, r, x_t, m, z)[0], expected) <= tolerance


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_range", [1.0, None])
def test_ddim_with_eta_1_is_ddpm_with_the_small_variance(prediction_type, clip_range):
    # Song et al. 2021, section 4.1: eta = 1 is DDPM. With eps from the clipped x_0 this holds under clipping too.
    options = {"steps": 23, "prediction_type": prediction_type, "clip_range": clip_range}
    ddim, ddpm = ddim_table(SCHEDULE, eta=1.0, **options), ddpm_table(SCHEDULE, **options)
    assert torch.equal(ddim.timesteps, ddpm.timesteps)
    for column in ("a", "b", "lo", "hi", "c_x0", "c_xt", "sigma"):
        torch.testing.assert_close(ddim.column(column), ddpm.column(column), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_analytic_variances_keep_a_gaussians_marginals(eta):
    # For data N(0, s^2) the network is exact and linear, and Analytic-DPM's step is the exact reverse of the process:
    # x_t of variance alpha_bar s^2 + 1 - alpha_bar goes to x_prev of the like, whatever eta (Bao et al. 2022).
    s2 = 0.3
    alpha_bar = SCHEDULE.alphas_cumprod[torch.arange(950, 0, -100)]
    variance = alpha_bar * s2 + 1 - alpha_bar
    table = ddim_table(
        SCHEDULE,
        timesteps=torch.arange(950, 0, -100),
        eta=eta,
        clip_range=None,
        eps_square=(1 - alpha_bar) / variance,  # eps_theta = sqrt(1 - alpha_bar) x_t / variance
    )
    for r in range(len(table) - 1):
        slope = float((1 - alpha_bar[r]).sqrt() / variance[r])
        x = torch.ones(1, 1, dtype=torch.float64)
        gain = float(execute_row64(table, r, x, slope * x, torch.zeros_like(x))[0])
        moved = gain**2 * float(variance[r]) + float(table.column("sigma")[r]) ** 2
        assert moved == pytest.approx(float(variance[r + 1]), rel=1e-12)
    assert float(table.column("sigma")[-1]) == 0.0


def test_analytic_variances_refuse_what_is_no_statistic():
    with pytest.raises(ValueError, match="eps_square must hold 5 numbers, one for each timestep; got 2"):
        ddim_table(SCHEDULE, steps=5, eps_square=[0.5, 0.5])
    with pytest.raises(ValueError, match=r"eps_square\[1\] must be a finite number >= 0.0 and <= 1.0, got 1.5"):
        ddim_table(SCHEDULE, steps=2, eps_square=[0.5, 1.5])


def test_ddim_without_noise_has_no_sigma():
    assert (ddim_table(SCHEDULE, steps=50).column("sigma") == 0).all()


@pytest.mark.parametrize("final_alpha_cumprod", [1.0, float(SCHEDULE.alphas_cumprod[0])])
@pytest.mark.parametrize(
    ("prediction_type", "eta", "rederive_eps"),
    list(itertools.product(PREDICTION_TYPES, [0.0, 0.7, 1.0], [True, False])),
)
def test_ddim_table_samples_as_diffusers(prediction_type, eta, rederive_eps, final_alpha_cumprod):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    scheduler = diffusers.DDIMScheduler(
        prediction_type=DIFFUSERS_TYPES[prediction_type], set_alpha_to_one=final_alpha_cumprod == 1.0, steps_offset=1
    )
    scheduler.set_timesteps(20)
    # Their float32 tables are replaced by ours, so that what is compared is the step.
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(final_alpha_cumprod, dtype=torch.float64)
    table = ddim_table(
        SCHEDULE,
        steps=20,
        spacing="leading",
        steps_offset=1,
        prediction_type=prediction_type,
        eta=eta,
        rederive_eps=rederive_eps,
        final_alpha_cumprod=final_alpha_cumprod,
    )
    assert torch.equal(table.timesteps, scheduler.timesteps)
    x_T, z = randn(2, 3, 4), list(randn(20, 2, 3, 4, seed=5))
    x = x_T
    for r, t in enumerate(scheduler.timesteps):
        noise = z[r] if eta > 0 else None
        x = scheduler.step(
            linear_model(x, t), t, x, eta=eta, use_clipped_model_output=rederive_eps, variance_noise=noise
        ).prev_sample
    assert relative_error(execute_table64(table, linear_model, x_T, z), x) <= 1e-10


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_range", [1.0, None])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0)])
def test_ddim_inversion_table_inverts_as_diffusers(spacing, offset, clip_range, prediction_type):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    start = 1.0 if prediction_type != "x_0" else float(SCHEDULE.alphas_cumprod[0])
    scheduler = diffusers.DDIMInverseScheduler(
        prediction_type=DIFFUSERS_TYPES[prediction_type],
        clip_sample=clip_range is not None,
        timestep_spacing=spacing,
        steps_offset=offset,
    )
    scheduler.set_timesteps(25)
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.initial_alpha_cumprod = torch.tensor(start, dtype=torch.float64)
    table = ddim_inversion_table(
        SCHEDULE,
        steps=25,
        spacing=spacing,
        steps_offset=offset,
        prediction_type=prediction_type,
        clip_range=clip_range,
        initial_alpha_cumprod=start,
    )
    assert torch.equal(table.timesteps, scheduler.timesteps)
    x_0 = randn(2, 3, 4)
    x = x_0
    for t in scheduler.timesteps:
        x = scheduler.step(linear_model(x, t), t, x).prev_sample
    assert relative_error(execute_table64(table, linear_model, x_0), x) <= 1e-10


def test_ddim_inversion_row_equals_equation_12_upwards():
    table = ddim_inversion_table(SCHEDULE, timesteps=[900, 400, 7])
    assert table.timesteps.tolist() == [7, 400, 900]
    levels = [torch.tensor(1.0, dtype=torch.float64), *SCHEDULE.alphas_cumprod[table.timesteps]]
    x, m = randn(2, 3), randn(2, 3, seed=1)
    for r in range(3):
        x_0 = (x - (1 - levels[r]).sqrt() * m) / levels[r].sqrt()
        expected = reference.ddim_step(x_0, m, levels[r], levels[r + 1])
        assert relative_error(execute_row64(table, r, x, m)[0], expected) <= 1e-12


@pytest.mark.parametrize("prediction_type", ["epsilon", "v"])
def test_ddim_table_undoes_the_inversion_of_a_straight_path(prediction_type):
    # Where the network's eps does not change along the path, both directions are exact.
    eps = randn(2, 3, seed=3)

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return eps

    x_0 = randn(2, 3)
    options = {"steps": 30, "spacing": "trailing"}
    x_T = execute_table64(ddim_inversion_table(SCHEDULE, **options), model, x_0)
    alpha_bar = SCHEDULE.alphas_cumprod[-1]
    torch.testing.assert_close(x_T, alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps, rtol=1e-11, atol=1e-11)
    back = execute_table64(ddim_table(SCHEDULE, clip_range=None, **options), model, x_T)
    torch.testing.assert_close(back, x_0, rtol=0, atol=1e-10)


def test_ddim_inversion_and_back_is_of_first_order():
    # Data N(0, 0.3^2), whose exact network is linear.
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = SCHEDULE.alphas_cumprod[t]
        return (1 - alpha_bar).sqrt() / (0.09 * alpha_bar + 1 - alpha_bar) * x

    error, x_0 = [], randn(1)
    for steps in (100, 200, 400):
        x_T = execute_table64(ddim_inversion_table(SCHEDULE, steps=steps), model, x_0)
        back = execute_table64(ddim_table(SCHEDULE, steps=steps, spacing="linspace", clip_range=None), model, x_T)
        error.append(relative_error(back, x_0))
    assert error[0] < 0.1
    assert error[1] / error[2] == pytest.approx(2, abs=0.3)
    assert error[0] / error[1] == pytest.approx(2, abs=0.3)


def test_learned_variance_is_ignored():
    output, x_t, z = randn(2, 6, 4, seed=1), randn(2, 3, 4), randn(2, 3, 4, seed=2)
    learned = ddim_table(SCHEDULE, steps=9, eta=0.5, learned=True)
    plain = ddim_table(SCHEDULE, steps=9, eta=0.5)
    assert (learned.learned, plain.learned) == (True, False)
    for r in range(9):
        ours = execute_row64(learned, r, x_t, output, z)[0]
        assert torch.equal(ours, execute_row64(plain, r, x_t, output[:, :3], z)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": -0.1}, "eta must be a finite number >= 0.0 and <= 1.0, got -0.1"),
        ({"eta": math.nan}, "eta must be a finite number >= 0.0 and <= 1.0, got nan"),
        ({"final_alpha_cumprod": 1.1}, "final_alpha_cumprod must lie between .* got 1.1"),
        ({"final_alpha_cumprod": 0.5}, "final_alpha_cumprod must lie between .* got 0.5"),
        ({"prediction_type": "noise"}, "unknown prediction_type 'noise'"),
        ({"clip_range": 0.0}, "clip_range must be positive"),
        ({"steps": 0}, "steps must be an integer >= 1 and <= 1000, got 0"),
    ],
)
def test_ddim_table_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ddim_table(SCHEDULE, **options)


def test_ddim_table_refuses_epsilon_at_zero_alpha_bar():
    with pytest.raises(ValueError, match="'epsilon' cannot give x_0 where alpha_bar = 0"):
        ddim_table(ZERO_SNR, steps=10)


@pytest.mark.parametrize("options", [{"rederive_eps": True}, {"prediction_type": "x_0"}])
def test_ddim_inversion_table_refuses_eps_from_clean_data(options):
    with pytest.raises(ValueError, match="initial_alpha_cumprod = 1 means data without noise"):
        ddim_inversion_table(SCHEDULE, steps=10, **options)
    first = float(SCHEDULE.alphas_cumprod[0])
    assert len(ddim_inversion_table(SCHEDULE, timesteps=[900, 50], initial_alpha_cumprod=first, **options)) == 2


def test_ddim_inversion_table_refuses_a_start_below_the_first_timestep():
    with pytest.raises(ValueError, match=r"initial_alpha_cumprod must lie between .* got 0\.2"):
        ddim_inversion_table(SCHEDULE, steps=10, initial_alpha_cumprod=0.2)
