"""The walks of `fastddpm.pictures.process` against the reference and the closed forms."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddpm import Sampler, Schedule, ddpm_table, reference
from fastddpm.data import points
from fastddpm.noise import v1 as noise
from fastddpm.ops.draw import randn
from fastddpm.pictures import process as diffuse
from fastddpm.pictures.process import ExactDenoiser, Process, forward_walk, marginal, reverse_walk
from fastddpm.pictures.recording import point_diffusion
from fastddpm.tables.by_name import make_table

T = 8
# alpha_bar of eight cosine betas, from Nichol & Dhariwal 2021, eq. 17, with beta clipped at 0.999.
COSINE_8 = (0.9578, 0.8470, 0.6842, 0.4938, 0.3044, 0.1443, 0.0375, 3.7e-5)


@pytest.fixture(scope="module")
def cosine() -> Schedule:
    return Schedule.cosine(T)


@pytest.fixture(scope="module")
def roll() -> Tensor:
    return points.draw("swiss-roll", 400)


def whole(schedule: Schedule) -> Process:
    return Process.of(schedule, torch.arange(schedule.num_timesteps))


def linear(T: int) -> Schedule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Schedule.linear(T)


def test_process_names_states_as_the_paper_does(cosine: Schedule) -> None:
    process = whole(cosine)
    assert process.t == tuple(range(T + 1))
    assert [process.alpha_bar(i) for i in range(T + 1)] == pytest.approx([1.0, *COSINE_8], rel=2e-2)
    assert [process.snr(i) for i in (0, 4)] == [math.inf, pytest.approx(COSINE_8[3] / (1 - COSINE_8[3]), rel=1e-3)]


def test_process_visiting_keeps_the_numbers_of_the_whole_process() -> None:
    schedule = Schedule.linear(1000)
    process = Process.of(schedule, torch.tensor([999, 500, 3]))
    assert process.t == (0, 4, 501, 1000)
    expected = [1.0, *schedule.alphas_cumprod[[3, 500, 999]].tolist()]
    assert [process.alpha_bar(i) for i in range(4)] == pytest.approx(expected, rel=1e-12)


def test_cosine_ends_gaussian_in_eight_steps_and_linear_does_not(cosine: Schedule) -> None:
    assert whole(cosine).ends_gaussian()
    assert not whole(linear(T)).ends_gaussian()


def test_prior_term_matches_torch_distributions(cosine: Schedule, roll: Tensor) -> None:
    for schedule in (cosine, linear(T)):
        alpha_bar = schedule.alphas_cumprod[-1]
        q = torch.distributions.Normal(alpha_bar.sqrt() * roll.double(), (1 - alpha_bar).sqrt())
        standard = torch.distributions.Normal(torch.zeros(2).double(), torch.ones(2).double())
        expected = torch.distributions.kl_divergence(q, standard).sum(dim=1).mean()
        assert whole(schedule).prior_term(roll) == pytest.approx(float(expected), rel=1e-9)


def test_marginal_matches_the_moments_of_the_mixture(roll: Tensor) -> None:
    # q(x_t) is a mixture of equal Gaussians around the scaled points: its moments by enumeration.
    alpha_bar, centres = 0.3, math.sqrt(0.3) * roll.double().numpy()
    second = np.mean([np.outer(c, c) + (1 - alpha_bar) * np.eye(2) for c in centres], axis=0)
    mean, covariance = marginal(roll, alpha_bar)
    np.testing.assert_allclose(mean, centres.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, second - np.outer(mean, mean), rtol=1e-12, atol=1e-15)


def test_forward_walk_matches_the_reference_chain(cosine: Schedule, roll: Tensor) -> None:
    states = forward_walk(roll, cosine, range(T + 1), seed=3)
    x = roll
    assert torch.equal(states[0], x)
    for t in range(T):
        z = randn(tuple(roll.shape), seed=3, step=t, stream=noise.STREAM_FORWARD)
        x = reference.q_step(x, t, cosine, z)
        torch.testing.assert_close(states[t + 1], x, rtol=1e-5, atol=1e-6)


def test_forward_walk_reaches_the_exact_marginals(cosine: Schedule) -> None:
    n = 20_000
    x_0 = points.draw("two-moons", n)
    for i, x_t in zip((2, 5, 8), forward_walk(x_0, cosine, (2, 5, 8)).double(), strict=True):
        mean, covariance = marginal(x_0, whole(cosine).alpha_bar(i))
        assert ((x_t.mean(dim=0) - mean).abs() <= 5 * (covariance.diagonal() / n).sqrt()).all()
        products = (x_t - mean)[:, :, None] * (x_t - mean)[:, None, :]
        standard_error = products.std(dim=0) / math.sqrt(n)
        assert ((products.mean(dim=0) - covariance).abs() <= 5 * standard_error).all()


def test_forward_walk_records_what_is_asked_for(cosine: Schedule, roll: Tensor) -> None:
    every = forward_walk(roll, cosine, range(T + 1))
    assert torch.equal(forward_walk(roll, cosine, (0, 3, 8)), every[[0, 3, 8]])


def test_exact_denoiser_of_two_points_is_a_hyperbolic_tangent(cosine: Schedule) -> None:
    # E[x_0 | x_t] = a tanh(sqrt(alpha_bar) <a, x_t> / (1 - alpha_bar)) for the points a and -a.
    a = torch.tensor([0.8, -0.5], dtype=torch.float64)
    x, t = 2 * randn((40, 2), seed=0), torch.arange(40) % T
    alpha_bar = cosine.alphas_cumprod[t][:, None]
    mean = a * torch.tanh(alpha_bar.sqrt() * (x.double() @ a)[:, None] / (1 - alpha_bar))
    expected = (x.double() - alpha_bar.sqrt() * mean) / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(
        ExactDenoiser(torch.stack([a, -a]), cosine)(x, t), expected.float(), rtol=1e-5, atol=1e-6
    )


def test_exact_denoiser_splits_large_batches(cosine: Schedule, roll: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = randn((50, 2), seed=0), torch.arange(50) % T
    whole = ExactDenoiser(roll, cosine)(x, t)
    monkeypatch.setattr(diffuse, "_MAX_PAIRS", 7 * len(roll))
    torch.testing.assert_close(ExactDenoiser(roll, cosine)(x, t), whole, rtol=1e-6, atol=1e-7)


def test_reverse_walk_takes_the_sampler_s_steps(cosine: Schedule, roll: Tensor) -> None:
    exact = ExactDenoiser(roll, cosine)
    options: dict[str, Any] = {"variance_type": "fixed_large", "clip_range": 3.0}
    sampler = Sampler(exact, ddpm_table(cosine, **options), (2,), compile=False)
    states, x0_estimates = reverse_walk(sampler, 30, range(T + 1), seed=4)
    assert torch.equal(states[0], sampler.sample(seed=4, batch_size=30))
    assert torch.equal(states[T], randn((30, 2), seed=4, stream=noise.STREAM_X_T))
    for i in range(T, 0, -1):
        t = torch.full((30,), i - 1)
        z = randn((30, 2), seed=4, step=T - i)
        m = exact(states[i], t)
        mean, variance, x_0 = reference.p_mean_variance(states[i], m, t, cosine, **options)
        # The first step divides float32's rounding by sqrt(alpha_bar_T) = 0.006.
        torch.testing.assert_close(x0_estimates[i], x_0, rtol=0, atol=1e-4)
        torch.testing.assert_close(states[i - 1], mean + (i > 1) * variance.sqrt() * z, rtol=0, atol=1e-4)


def test_exact_reverse_process_returns_to_the_data() -> None:
    data = torch.tensor([[1.0, 0.5], [-1.0, 0.5], [0.0, -1.2]])
    schedule = Schedule.cosine(60)
    table = make_table("ddpm", point_diffusion(data, "cosine", 60), steps=60)
    sampler = Sampler(ExactDenoiser(data, schedule), table, (2,), device="cpu", compile=False)
    distances = torch.cdist(reverse_walk(sampler, 200, (0, 60))[0][0], data)
    assert float(distances.min(dim=1).values.max()) < 1e-2
    # Each point is as likely as the others: 200/3 +- 5 sqrt(200 * 2/9).
    assert distances.argmin(dim=1).bincount().tolist() == pytest.approx([200 / 3] * 3, abs=5 * math.sqrt(200 * 2 / 9))
