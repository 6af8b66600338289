"""The reference against the papers' equations in other forms: Bayes' rule, composition, eq. 11 and exact cases."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal

from fastddpm import reference
from fastddpm.schedules.schedule import Schedule

SCHEDULE = Schedule.cosine(50)
T = SCHEDULE.num_timesteps
SHAPES = {"points": (7, 2), "scalars": (7,), "images": (7, 3, 5, 4), "odd": (7, 1, 3, 17)}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def per_sample_t(n: int = 7) -> torch.Tensor:
    return torch.linspace(0, T - 1, n).round().long()


def test_reference_reads_like_the_paper():
    source = Path(reference.__file__).read_text()
    imported = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert {name for name in imported if name.startswith("fastddpm")} == {"fastddpm.schedules.schedule"}
    assert not {name for name in imported if name.startswith("triton")}


def test_q_sample_is_the_composition_of_q_steps():
    # Propagate mean and variance of the chain through q_step itself: x -> sqrt(1 - beta) x + sqrt(beta) eps.
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    mean, variance = 1.0, 0.0
    for t in range(T):
        scale = float(reference.q_step(one, t, SCHEDULE, eps=zero))
        std = float(reference.q_step(zero, t, SCHEDULE, eps=one))
        mean, variance = scale * mean, scale**2 * variance + std**2
        assert float(reference.q_sample(one, t, SCHEDULE, eps=zero)) == pytest.approx(mean, rel=1e-12)
        assert float(reference.q_sample(zero, t, SCHEDULE, eps=one)) == pytest.approx(math.sqrt(variance), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_q_posterior_satisfies_bayes_rule(shape):
    x_0, x_t, x_prev = randn(*shape), randn(*shape, seed=1), randn(*shape, seed=2)
    t = per_sample_t().clamp(min=1)
    column = (-1, *[1] * (len(shape) - 1))
    alpha_bar, alpha_bar_prev = SCHEDULE.alphas_cumprod[t], SCHEDULE.alphas_cumprod[t - 1]
    beta = SCHEDULE.betas[t].reshape(column)
    mean, variance = reference.q_posterior(x_0, x_t, t, SCHEDULE)
    left = Normal(mean, variance.sqrt()).log_prob(x_prev) + Normal(
        alpha_bar.sqrt().reshape(column) * x_0, (1 - alpha_bar).sqrt().reshape(column)
    ).log_prob(x_t)
    right = Normal((1 - beta).sqrt() * x_prev, beta.sqrt()).log_prob(x_t) + Normal(
        alpha_bar_prev.sqrt().reshape(column) * x_0, (1 - alpha_bar_prev).sqrt().reshape(column)
    ).log_prob(x_prev)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_q_posterior_is_a_point_at_t0():
    x_0 = randn(2, 3)
    mean, variance = reference.q_posterior(x_0, randn(2, 3, seed=1), 0, SCHEDULE)
    torch.testing.assert_close(mean, x_0, rtol=1e-11, atol=0)
    assert (variance == 0).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_predict_x0_inverts_q_sample(shape):
    x_0, eps, t = randn(*shape), randn(*shape, seed=1), per_sample_t()
    x_t = reference.q_sample(x_0, t, SCHEDULE, eps)
    angle = torch.atan2(SCHEDULE.sqrt_one_minus_alphas_cumprod, SCHEDULE.sqrt_alphas_cumprod)[t]
    angle = angle.reshape(-1, *[1] * (len(shape) - 1))
    # Salimans & Ho 2022: v = d x_t / d phi with x_t = cos(phi) x_0 + sin(phi) eps.
    targets = {"epsilon": eps, "x_0": x_0, "v": angle.cos() * eps - angle.sin() * x_0}
    for prediction_type, m in targets.items():
        predicted = reference.predict_x0(x_t, m, t, SCHEDULE, prediction_type)
        # epsilon divides by sqrt(alpha_bar), which is 1 / 1600 at the last of fifty steps.
        torch.testing.assert_close(predicted, x_0, rtol=0, atol=1e-11)


@pytest.mark.parametrize("t", [0, 1, 25, T - 1])
def test_p_mean_variance_matches_equation_11(t):
    # mu_theta = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_t), valid without clipping.
    x_t, eps_theta = randn(3, 4), randn(3, 4, seed=1)
    beta, alpha, alpha_bar = (float(c[t]) for c in (SCHEDULE.betas, SCHEDULE.alphas, SCHEDULE.alphas_cumprod))
    expected = (x_t - beta / math.sqrt(1 - alpha_bar) * eps_theta) / math.sqrt(alpha)
    mean, _, _ = reference.p_mean_variance(x_t, eps_theta, t, SCHEDULE, clip_range=None)
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-10)


def test_p_mean_variance_clips_x0_before_the_mean():
    x_t, eps_theta, t = randn(7, 4), randn(7, 4, seed=1), per_sample_t()
    _, _, raw = reference.p_mean_variance(x_t, eps_theta, t, SCHEDULE, clip_range=None)
    mean, _, x_0 = reference.p_mean_variance(x_t, eps_theta, t, SCHEDULE, clip_range=0.5)
    assert (raw.abs() > 0.5).any()
    assert torch.equal(x_0, raw.clamp(-0.5, 0.5))
    assert torch.equal(mean, reference.q_posterior(x_0, x_t, t, SCHEDULE)[0])


def test_p_mean_variance_offers_the_papers_variances():
    x_t, m, v = randn(3, 4, 5), randn(3, 4, 5, seed=1), randn(3, 4, 5, seed=2)
    t = 20
    beta, beta_tilde = float(SCHEDULE.betas[t]), float(SCHEDULE.posterior_variance[t])

    def variance(kind: str, v: torch.Tensor) -> torch.Tensor:
        output = torch.cat([m, v], dim=1) if kind.startswith("learned") else m
        mean, variance, _ = reference.p_mean_variance(x_t, output, t, SCHEDULE, variance_type=kind)
        assert torch.equal(mean, reference.p_mean_variance(x_t, m, t, SCHEDULE)[0])
        return variance

    def full(value: float) -> torch.Tensor:
        return torch.full_like(v, value)

    assert torch.equal(variance("fixed_small", v).expand_as(v), full(beta_tilde))
    assert torch.equal(variance("fixed_large", v).expand_as(v), full(beta))
    torch.testing.assert_close(variance("learned", full(math.log(0.3))), full(0.3), rtol=1e-14, atol=0)
    torch.testing.assert_close(variance("learned_range", full(1.0)), full(beta), rtol=1e-12, atol=0)
    torch.testing.assert_close(variance("learned_range", full(-1.0)), full(beta_tilde), rtol=1e-12, atol=0)
    middle = math.sqrt(beta * beta_tilde)
    torch.testing.assert_close(variance("learned_range", full(0.0)), full(middle), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "message"), [("prediction_type", "'noise'"), ("variance_type", "'noise'")])
def test_p_mean_variance_refuses_unknown_types(kind, message):
    with pytest.raises(ValueError, match=f"unknown {kind} {message}; choose one of"):
        reference.p_mean_variance(randn(2, 2), randn(2, 2), 3, SCHEDULE, **{kind: "noise"})


def test_p_sample_adds_z_scaled_by_sigma():
    x_t, m, t = randn(7, 4), randn(7, 4, seed=1), per_sample_t()
    mean, variance, _ = reference.p_mean_variance(x_t, m, t, SCHEDULE)
    z = randn(7, 4, seed=2)
    assert torch.equal(reference.p_sample(x_t, m, t, SCHEDULE, z)[1:], (mean + variance.sqrt() * z)[1:])


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_p_sample_adds_no_noise_at_t0(variance_type):
    x_t, m = randn(2, 4), randn(2, 4, seed=1)
    z = torch.full_like(x_t, math.inf)
    mean, _, _ = reference.p_mean_variance(x_t, m, 0, SCHEDULE, variance_type=variance_type)
    assert torch.equal(reference.p_sample(x_t, m, 0, SCHEDULE, z, variance_type=variance_type), mean)


def test_p_sample_takes_one_timestep_per_sample():
    x_t, m, z, t = randn(7, 2, 3), randn(7, 2, 3, seed=1), randn(7, 2, 3, seed=2), per_sample_t()
    together = reference.p_sample(x_t, m, t, SCHEDULE, z)
    for i in range(7):
        alone = reference.p_sample(x_t[i : i + 1], m[i : i + 1], int(t[i]), SCHEDULE, z[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


def test_p_sample_keeps_a_unit_gaussian_with_the_large_variance():
    # For x_0 ~ N(0, I) the best x_0 is sqrt(alpha_bar) x_t, and beta_t is the exact variance (section 3.2): the mean
    # is then sqrt(alpha_t) x_t, and x_{t-1} has variance alpha_t + beta_t = 1.
    x_t = randn(7, 3)
    for t in range(T):
        m = SCHEDULE.alphas_cumprod[t].sqrt() * x_t
        mean, variance, _ = reference.p_mean_variance(
            x_t, m, t, SCHEDULE, prediction_type="x_0", variance_type="fixed_large", clip_range=None
        )
        torch.testing.assert_close(mean, SCHEDULE.alphas[t].sqrt() * x_t, rtol=1e-10, atol=0)
        assert float(variance.reshape(-1)[0]) + float(SCHEDULE.alphas[t]) == pytest.approx(1.0, rel=1e-14)


def test_p_sample_loop_recovers_a_point_mass():
    # When all data is one point the exact eps_theta is known, and the last step lands on that point.
    point = randn(1, 3).clamp(-1, 1)

    def eps_theta(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = SCHEDULE.alphas_cumprod[t].unsqueeze(1)
        return (x - alpha_bar.sqrt() * point) / (1 - alpha_bar).sqrt()

    x_0 = reference.p_sample_loop(eps_theta, randn(5, 3, seed=4), SCHEDULE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x_0, point.expand(5, 3), rtol=0, atol=1e-10)


def test_p_sample_loop_draws_the_variance_of_the_data():
    # Unit Gaussian data, exact model: x_0 ~ N(0, I) again. The variance estimate has standard error sqrt(2 / n).
    n = 20_000

    def x_0_theta(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return SCHEDULE.alphas_cumprod[t].sqrt().unsqueeze(1) * x

    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(n, 1, dtype=torch.float64, generator=generator)
    options = {"prediction_type": "x_0", "variance_type": "fixed_large", "clip_range": None}
    x_1 = reference.p_sample_loop(x_0_theta, x_T, SCHEDULE, generator=generator, **options)
    # The last step takes the mean, which shrinks the sample by sqrt(alpha_0).
    expected = float(SCHEDULE.alphas[0])
    assert float(x_1.var()) == pytest.approx(expected, abs=5 * math.sqrt(2 / n))
    assert float(x_1.mean()) == pytest.approx(0.0, abs=5 / math.sqrt(n))


def test_p_sample_loop_hands_the_model_the_visited_timesteps():
    seen = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.shape == (2,)
        assert t.dtype == torch.int64
        seen.append(int(t[0]))
        return torch.zeros_like(x)

    reference.p_sample_loop(model, randn(2, 3), SCHEDULE, timesteps=[49, 20, 3])
    reference.p_sample_loop(model, randn(2, 3), SCHEDULE)
    assert seen == [49, 20, 3, *range(49, -1, -1)]


def test_p_sample_loop_steps_between_the_visited_noise_levels():
    # For x_0 = sqrt(alpha_bar_t) x_t and z = 0 every step multiplies by sqrt(alpha_bar_t / alpha_bar_prev), so the
    # run as a whole by sqrt(alpha_bar) of its first timestep, whichever timesteps lie between.
    x_T = randn(2, 3)

    def x_0_theta(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return SCHEDULE.alphas_cumprod[t].sqrt().unsqueeze(1) * x

    for timesteps in ([40, 20, 3], [40], None):
        visited = list(range(T - 1, -1, -1)) if timesteps is None else timesteps
        z = torch.zeros(len(visited), 2, 3, dtype=torch.float64)
        x = reference.p_sample_loop(
            x_0_theta, x_T, SCHEDULE, timesteps=timesteps, z=z, prediction_type="x_0", clip_range=None
        )
        torch.testing.assert_close(x, SCHEDULE.sqrt_alphas_cumprod[visited[0]] * x_T, rtol=1e-11, atol=0)


def test_simple_loss_is_the_mean_squared_error_of_eps():
    x_0, eps, t = randn(7, 3), randn(7, 3, seed=1), per_sample_t()
    assert float(reference.simple_loss(lambda x, t: eps, x_0, t, SCHEDULE, eps)) == 0.0
    zero = reference.simple_loss(lambda x, t: torch.zeros_like(x), x_0, t, SCHEDULE, eps)
    assert float(zero) == pytest.approx(float((eps**2).sum()) / eps.numel(), rel=1e-14)


def test_simple_loss_shows_the_model_x_t():
    x_0, eps, t = randn(7, 3), randn(7, 3, seed=1), per_sample_t()
    x_t = reference.q_sample(x_0, t, SCHEDULE, eps)
    seen = []
    reference.simple_loss(lambda x, t: seen.append((x, t)) or x, x_0, t, SCHEDULE, eps)
    assert torch.equal(seen[0][0], x_t)
    assert torch.equal(seen[0][1], t)


def test_simple_loss_has_the_gradient_of_the_error():
    x_0, eps, t = randn(7, 3), randn(7, 3, seed=1), per_sample_t()
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    reference.simple_loss(lambda x, t: weight * x, x_0, t, SCHEDULE, eps).backward()
    x_t = reference.q_sample(x_0, t, SCHEDULE, eps)
    torch.testing.assert_close(weight.grad, (2 * (0.3 * x_t - eps) * x_t).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_keeps_the_dtype_of_the_state(dtype):
    x, m, t = randn(7, 3).to(dtype), randn(7, 3, seed=1).to(dtype), per_sample_t()
    results = [
        reference.q_step(x, t, SCHEDULE),
        reference.q_sample(x, t, SCHEDULE),
        *reference.q_posterior(x, x, t, SCHEDULE),
        reference.predict_x0(x, m, t, SCHEDULE),
        *reference.p_mean_variance(x, m, t, SCHEDULE),
        reference.p_sample(x, m, t, SCHEDULE),
        reference.p_sample_loop(lambda x, t: x, x, SCHEDULE, timesteps=[3, 1]),
        reference.simple_loss(lambda x, t: x, x, t, SCHEDULE),
    ]
    assert {result.dtype for result in results} == {dtype}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_noise_comes_from_the_generator_when_none_is_given(shape):
    x, t = randn(*shape), per_sample_t()
    noise = randn(*shape, seed=9)
    for draw in (
        lambda **noise: reference.q_step(x, t, SCHEDULE, **noise),
        lambda **noise: reference.q_sample(x, t, SCHEDULE, **noise),
        lambda **noise: reference.simple_loss(lambda x, t: x, x, t, SCHEDULE, **noise),
    ):
        assert torch.equal(draw(generator=torch.Generator().manual_seed(9)), draw(eps=noise))
    drawn = reference.p_sample(x, x, t, SCHEDULE, generator=torch.Generator().manual_seed(9))
    assert torch.equal(drawn, reference.p_sample(x, x, t, SCHEDULE, noise))


def test_p_sample_loop_draws_from_the_generator_as_from_z():
    x_T, generator = randn(2, 3), torch.Generator().manual_seed(9)
    z = [torch.randn(2, 3, dtype=torch.float64, generator=generator) for _ in range(4)]
    options = {"timesteps": [40, 30, 9, 0]}
    drawn = reference.p_sample_loop(
        lambda x, t: x.sin(), x_T, SCHEDULE, generator=torch.Generator().manual_seed(9), **options
    )
    assert torch.equal(drawn, reference.p_sample_loop(lambda x, t: x.sin(), x_T, SCHEDULE, z=z, **options))
