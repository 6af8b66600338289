"""Schedules against published values, scalar formulas in plain Python, and diffusers."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch

from fastddpm.schedules.betas import SCHEDULES
from fastddpm.schedules.schedule import Schedule

# alpha_bar at t = 0, 500, 999 for T = 1000, measured on diffusers and denoising-diffusion-pytorch; all printed digits.
KNOWN_ALPHA_BAR = {
    "linear": (0.99990, 0.077797, 4.0358e-5),
    "linear_rescaled": (0.99990, 0.077797, 4.0358e-5),
    "scaled_linear": (0.99990, 0.331275, 7.3341e-4),
    "cosine": (0.9999587, 0.492285, 2.4287e-9),
    "sigmoid_geodiff": (0.999851, 0.298888, 3.9682e-5),
    "sigmoid_jabri": (0.9996997, 0.4983428, 3.003e-7),
    "laplace": (0.978846, 0.707284, 0.0316228),
}
DIFFUSERS_NAMES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid_geodiff": "sigmoid",
    "laplace": "laplace",
}


def quiet(name: str, T: int) -> Schedule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Schedule.named(name, T)


def scalar_beta(name: str, t: int, T: int) -> float:
    """Compute one beta with Python floats, from the formula as published."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def alpha_bar(u: float) -> float:
        if name == "cosine":
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        if name == "sigmoid_jabri":
            return (sigmoid(3) - sigmoid(6 * u - 3)) / (sigmoid(3) - sigmoid(-3))
        snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
        return math.sqrt(snr / (1 + snr))

    fraction = t / (T - 1) if T > 1 else 0.0
    if name == "linear":
        return 1e-4 + (0.02 - 1e-4) * fraction
    if name == "linear_rescaled":
        return 1000 / T * (1e-4 + (0.02 - 1e-4) * fraction)
    if name == "scaled_linear":
        return (1e-4**0.5 + (0.02**0.5 - 1e-4**0.5) * fraction) ** 2
    if name == "sigmoid_geodiff":
        return sigmoid(-6 + 12 * fraction) * (0.02 - 1e-4) + 1e-4
    return min(1 - alpha_bar((t + 1) / T) / alpha_bar(t / T), 0.999)


@pytest.mark.parametrize("name", SCHEDULES)
def test_named_schedule_has_the_known_alpha_bar(name):
    alphas_cumprod = Schedule.named(name).alphas_cumprod
    for t, known in zip((0, 500, 999), KNOWN_ALPHA_BAR[name], strict=True):
        # The known values were printed with four to seven digits.
        assert float(alphas_cumprod[t]) == pytest.approx(known, rel=1e-4)


@pytest.mark.parametrize("T", [1, 2, 37, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_named_schedule_follows_its_formula(name, T):
    if name == "linear_rescaled" and T <= 20:
        pytest.skip("beta would exceed 1: test_linear_rescaled_refuses_few_steps")
    betas = quiet(name, T).betas
    # A beta is a difference of numbers near 1: absolute rounding of a few units of 1.
    for t in range(T):
        assert float(betas[t]) == pytest.approx(scalar_beta(name, t, T), rel=1e-12, abs=2e-15)


@pytest.mark.parametrize("T", [1000, 300])
@pytest.mark.parametrize("name", DIFFUSERS_NAMES)
def test_named_schedule_matches_diffusers_in_float32(name, T):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=T, beta_schedule=DIFFUSERS_NAMES[name])
    schedule = quiet(name, T)
    # Their tables are float32 throughout, hence 1 - ratio of float32 in the worst case.
    torch.testing.assert_close(scheduler.betas.double(), schedule.betas, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "theirs", "rtol"),
    # Their sigmoid normalises by ends in float32, which the last betas amplify.
    [("linear_rescaled", "linear_beta_schedule", 1e-12), ("sigmoid_jabri", "sigmoid_beta_schedule", 2e-5)],
)
def test_named_schedule_matches_lucidrains(name, theirs, rtol):
    module = pytest.importorskip(
        "denoising_diffusion_pytorch.denoising_diffusion_pytorch", reason="denoising-diffusion-pytorch is the oracle"
    )
    betas = getattr(module, theirs)(1000).double()
    torch.testing.assert_close(betas, Schedule.named(name).betas, rtol=rtol, atol=1e-9)


def test_cosine_at_eight_steps_has_the_known_alpha_bar():
    known = torch.tensor([0.9578, 0.8470, 0.6842, 0.4938, 0.3044, 0.1443, 0.0375, 4e-5], dtype=torch.float64)
    torch.testing.assert_close(Schedule.cosine(8).alphas_cumprod, known, rtol=0, atol=6e-5)


def test_constructors_agree_with_named():
    for name in SCHEDULES:
        assert torch.equal(getattr(Schedule, name)().betas, Schedule.named(name).betas)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_the_product_of_the_two_gaussians(name):
    # Bayes: q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0), so precisions add.
    s = Schedule.named(name)
    beta, alpha, prior = s.betas[1:], s.alphas[1:], 1 - s.alphas_cumprod[:-1]
    precision = alpha / beta + 1 / prior
    torch.testing.assert_close(s.posterior_variance[1:], 1 / precision, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        s.posterior_mean_coef1[1:], s.alphas_cumprod[:-1].sqrt() / prior / precision, rtol=1e-10, atol=0
    )
    torch.testing.assert_close(s.posterior_mean_coef2[1:], alpha.sqrt() / beta / precision, rtol=1e-10, atol=0)
    assert (float(s.posterior_mean_coef1[0]), float(s.posterior_mean_coef2[0])) == (pytest.approx(1.0, rel=1e-11), 0.0)
    assert float(s.posterior_variance[0]) == 0.0


def test_derived_tables_are_float64_and_consistent():
    s = Schedule.linear()
    for t in (0, 1, 10, 500, 999):
        log_alpha_bar = math.fsum(math.log1p(-beta) for beta in s.betas[: t + 1].tolist())
        assert float(s.alphas_cumprod[t]) == pytest.approx(math.exp(log_alpha_bar), rel=1e-13)
    torch.testing.assert_close(s.sqrt_alphas_cumprod * s.sqrt_recip_alphas_cumprod, torch.ones_like(s.betas))
    torch.testing.assert_close(
        s.sqrt_recipm1_alphas_cumprod * s.sqrt_alphas_cumprod, s.sqrt_one_minus_alphas_cumprod, rtol=1e-14, atol=0
    )
    assert torch.equal(s.alphas_cumprod_prev[1:], s.alphas_cumprod[:-1])
    assert float(s.alphas_cumprod_prev[0]) == 1.0
    assert torch.equal(s.posterior_log_variance_clipped[1:], s.posterior_variance[1:].log())
    # The value of improved-diffusion at t = 0.
    assert float(s.posterior_log_variance_clipped[0]) == pytest.approx(-9.8167, abs=5e-5)
    for name, value in vars(type(s)).items():
        if not name.startswith("_") and hasattr(value, "attrname"):
            assert getattr(s, name).dtype == torch.float64, name
            assert getattr(s, name).shape == (1000,), name


def test_zero_terminal_snr_ends_at_zero_and_keeps_the_start():
    plain = Schedule.linear()
    rescaled = plain.zero_terminal_snr()
    assert float(rescaled.alphas_cumprod[-1]) == 0.0
    assert float(rescaled.betas[-1]) == 1.0
    assert float(rescaled.alphas_cumprod[0]) == pytest.approx(float(plain.alphas_cumprod[0]), rel=1e-14)
    # Measured on diffusers.
    assert float(rescaled.alphas_cumprod[998]) == pytest.approx(4.2e-9, rel=0.01)
    # Lin et al. 2023: the map is affine in sqrt(alpha_bar).
    x, y = plain.sqrt_alphas_cumprod, rescaled.sqrt_alphas_cumprod
    torch.testing.assert_close((y - y[-1]) / (y[0] - y[-1]), (x - x[-1]) / (x[0] - x[-1]), rtol=1e-10, atol=1e-15)


def test_zero_terminal_snr_matches_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=True)
    ours = Schedule.linear().zero_terminal_snr()
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), ours.alphas_cumprod, rtol=1e-3, atol=1e-9)


def test_zero_terminal_snr_refuses_a_single_step():
    with pytest.raises(ValueError, match="num_timesteps >= 2, got 1"):
        Schedule.from_betas([0.999]).zero_terminal_snr()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Schedule.linear(0), "num_timesteps must be an integer >= 1 and <= 1000000, got 0"),
        (lambda: Schedule.cosine(-3), "num_timesteps must be an integer >= 1 and <= 1000000, got -3"),
        (lambda: Schedule.cosine(1_000_001), "num_timesteps must be an integer >= 1 and <= 1000000, got 1000001"),
        (lambda: Schedule.cosine(10.0), "num_timesteps must be an integer >= 1 and <= 1000000, got 10.0"),
        (lambda: Schedule.cosine(True), "num_timesteps must be an integer >= 1 and <= 1000000, got True"),
        (lambda: Schedule.linear(10, beta_start=0.0), "beta_start must be a finite number > 0.0 and < 1.0, got 0.0"),
        (lambda: Schedule.linear(10, beta_end=1.5), "beta_end must be a finite number > 0.0 and < 1.0, got 1.5"),
        (lambda: Schedule.linear(10, beta_end=math.nan), "beta_end must be a finite number > 0.0 and < 1.0, got nan"),
        (lambda: Schedule.from_betas([]), "num_timesteps must be an integer >= 1 and <= 1000000, got 0"),
        (lambda: Schedule.from_betas([0.1, -0.1]), r"betas must lie in \(0, 1\).*betas\[1\] = -0.1"),
        (lambda: Schedule.from_betas([0.1, 0.0]), r"betas\[1\] = 0.0"),
        (lambda: Schedule.from_betas([1.0, 0.1]), r"betas\[0\] = 1.0"),
        (lambda: Schedule.from_betas([0.1, math.nan]), r"betas\[1\] = nan"),
        (lambda: Schedule.from_betas([0.1, math.inf]), r"betas\[1\] = inf"),
        (lambda: Schedule.from_betas([[0.1], [0.2]]), r"one dimension \[T\], got shape \(2, 1\)"),
        (lambda: Schedule.from_alphas_cumprod([0.9, 0.9, 0.1]), r"alphas_cumprod\[1\] = 0.9 after 0.9"),
        (lambda: Schedule.from_alphas_cumprod([0.9, -0.1]), r"alphas_cumprod\[1\] = -0.1"),
        (lambda: Schedule.from_alphas_cumprod([1.2, 0.1]), r"alphas_cumprod\[0\] = 1.2 after 1.0"),
        (lambda: Schedule.named("sigmoid"), "unknown beta schedule 'sigmoid' .*; choose one of .*sigmoid_geodiff"),
        (lambda: Schedule.sigmoid_jabri(10, start=3, end=-3), "start < end and tau > 0"),
        (lambda: Schedule.sigmoid_jabri(10, tau=0.0), "start < end and tau > 0"),
    ],
)
def test_schedule_refuses_bad_input_by_name_and_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_schedule_refuses_betas_that_are_no_tensor():
    with pytest.raises(TypeError, match=r"use Schedule\.from_betas"):
        Schedule([0.1, 0.2])


def test_schedule_refuses_alpha_bar_that_underflows():
    # prod(1 - beta) of the default betas is below the smallest float64 from T of about 74,000 on.
    with pytest.raises(ValueError, match=r"alphas_cumprod must fall strictly.*use smaller betas or fewer steps"):
        Schedule.linear(200_000)


def test_linear_rescaled_refuses_few_steps():
    with pytest.raises(ValueError, match=r"reaches beta = 2.5 at num_timesteps = 8.*use the cosine schedule"):
        Schedule.linear_rescaled(8)


@pytest.mark.parametrize("name", ["linear_rescaled", "cosine"])
def test_schedule_works_at_a_million_steps(name):
    assert 0.0 < float(Schedule.named(name, 1_000_000).alphas_cumprod[-1]) < 1e-4


@pytest.mark.parametrize(("T", "fix"), [(50, "linear_rescaled"), (8, "cosine")])
def test_schedule_warns_when_it_does_not_end_near_a_gaussian(T, fix):
    alpha_bar_T = math.prod(1 - (1e-4 + (0.02 - 1e-4) * t / (T - 1)) for t in range(T))
    with pytest.warns(UserWarning, match=rf"alpha_bar_T = {alpha_bar_T:.4g} after T = {T} steps.*{fix}") as caught:
        Schedule.linear(T)
    assert caught[0].filename == __file__


def test_fix_named_by_the_warning_works():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Schedule.linear_rescaled(50)
        Schedule.cosine(8)
        for name in SCHEDULES:
            Schedule.named(name, 1000)


def test_schedule_is_immutable_and_owns_its_betas():
    betas = torch.full((1000,), 0.01, dtype=torch.float64)
    schedule = Schedule(betas)
    betas[0] = 0.5
    assert float(schedule.betas[0]) == 0.01
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.betas = betas


def test_from_alphas_cumprod_inverts_alphas_cumprod():
    s = Schedule.cosine(100)
    torch.testing.assert_close(Schedule.from_alphas_cumprod(s.alphas_cumprod).betas, s.betas, rtol=1e-11, atol=1e-15)


def test_respaced_keeps_alpha_bar_at_the_kept_timesteps():
    s = Schedule.linear()
    kept = torch.tensor([999, 700, 31, 2])
    respaced = s.respaced(kept)
    torch.testing.assert_close(respaced.alphas_cumprod, s.alphas_cumprod[kept.flip(0)], rtol=1e-13, atol=0)
    assert torch.equal(s.respaced(kept.flip(0)).betas, respaced.betas)


def test_respaced_to_all_timesteps_is_the_schedule_itself():
    s = Schedule.linear()
    assert torch.equal(s.respaced(torch.arange(1000)).betas, s.betas)
