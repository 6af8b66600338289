"""The variational bound: every term against scipy's normal distribution in float64, and bits per dimension."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import fastddpm
from fastddpm import DiffusionConfig, Schedule, reference
from fastddpm.noise import v1 as noise
from fastddpm.schedules.diffusion import PREDICTION_TYPES, VARIANCE_TYPES
from fastddpm.training.bound import Bound, prior_term
from fastddpm.training.likelihood import _edges

T = 20
BETAS = np.linspace(0.01, 0.4, T)
SCHEDULE = Schedule.from_betas(BETAS.tolist())


def oracle_term(
    output: np.ndarray, x_0: np.ndarray, x_t: np.ndarray, t: int, prediction: str, variance: str, clip: float | None
) -> float:
    """A term in nats per element from the paper's equations, in NumPy and scipy; no code of the library."""
    alphas = 1 - BETAS
    alpha_bar = np.cumprod(alphas)
    previous = np.concatenate([[1.0], alpha_bar[:-1]])
    beta_tilde = BETAS * (1 - previous) / (1 - alpha_bar)
    m, v = output[: len(x_0)], output[len(x_0) :]
    a, s = math.sqrt(alpha_bar[t]), math.sqrt(1 - alpha_bar[t])
    guess = {"epsilon": (x_t - s * m) / a, "x_0": m, "v": a * x_t - s * m}[prediction]
    if clip is not None:
        guess = np.clip(guess, -clip, clip)

    def posterior_mean(x: np.ndarray) -> np.ndarray:
        from_x = math.sqrt(previous[t]) * BETAS[t] / (1 - alpha_bar[t])
        return from_x * x + math.sqrt(alphas[t]) * (1 - previous[t]) / (1 - alpha_bar[t]) * x_t

    floor = max(t, 1)
    logs = np.log(BETAS[t]), np.log(beta_tilde[floor])
    sigma2 = {
        "fixed_small": beta_tilde[floor],
        "fixed_large": BETAS[t] if t else beta_tilde[1],
        "learned": np.exp(v) if len(v) else None,
        "learned_range": np.exp((v + 1) / 2 * logs[0] + (1 - v) / 2 * logs[1]) if len(v) else None,
    }[variance]
    sigma = np.sqrt(np.broadcast_to(np.asarray(sigma2, np.float64), x_0.shape))
    mean = posterior_mean(guess)
    if t == 0:
        upper = np.where(x_0 > 0.999, np.inf, x_0 + 1 / 255)
        lower = np.where(x_0 < -0.999, -np.inf, x_0 - 1 / 255)
        mass = stats.norm.cdf(upper, mean, sigma) - stats.norm.cdf(lower, mean, sigma)
        return float(-np.log(np.maximum(mass, 1e-12)).mean())
    q_sigma2 = beta_tilde[t]
    return float(
        (
            np.log(sigma)
            - 0.5 * math.log(q_sigma2)
            + (q_sigma2 + (posterior_mean(x_0) - mean) ** 2) / (2 * sigma**2)
            - 0.5
        ).mean()
    )


def operands(learned: bool, prediction: str = "epsilon") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8-bit images with both ends of the range, a state, an output, and timesteps 0, 1 and T - 1 among others."""
    g = torch.Generator().manual_seed(4)
    t = torch.tensor([0, 1, 2, 11, T - 1, 0])
    x_0 = torch.randint(0, 256, (6, 2, 3, 3), generator=g).double() / 127.5 - 1
    x_0[:, 0, 0] = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64)
    x_t = reference.q_sample(x_0, t, SCHEDULE, torch.randn(x_0.shape, generator=g).double())
    m = 0.3 * torch.randn(x_0.shape, generator=g).double()
    if prediction == "x_0":
        m = x_0 + 0.1 * m  # in float32 the mass of a bin far from the mean is lost
    v = torch.rand(x_0.shape, generator=g).double() * 2 - 1
    return torch.cat([m, v], dim=1) if learned else m, x_0, x_t, t


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_terms_match_scipy(prediction: str, variance: str, clip: float | None) -> None:
    output, x_0, x_t, t = operands("learned" in variance, prediction)
    expected = [
        oracle_term(
            *(x[i].flatten(1).reshape(-1).numpy() for x in (output, x_0, x_t)), int(t[i]), prediction, variance, clip
        )
        for i in range(len(t))
    ]
    options = {"prediction_type": prediction, "variance_type": variance, "clip_range": clip}
    paper = reference.vlb_term(output, x_0, x_t, t, SCHEDULE, **options)
    assert paper.tolist() == pytest.approx(expected, rel=1e-7)
    bound = Bound.of(SCHEDULE, prediction, variance, clip)
    assert bound.terms(output, x_0, x_t, t).tolist() == pytest.approx(expected, rel=1e-7)
    single = bound.to(torch.device("cpu"), torch.float32).terms(*(x.float() for x in (output, x_0, x_t)), t)
    assert single.tolist() == pytest.approx(expected, rel=2e-4, abs=1e-7)


def test_a_fixed_mean_gets_no_gradient() -> None:
    output, x_0, x_t, t = operands(learned=True)
    output.requires_grad_()
    Bound.of(SCHEDULE, "epsilon", "learned_range", None).terms(output, x_0, x_t, t, fixed_mean=True).sum().backward()
    assert output.grad is not None
    assert (output.grad[:, :2] == 0).all()
    assert (output.grad[:, 2:] != 0).all()


def test_prior_term_is_torchs_divergence() -> None:
    x_0 = operands(False)[1]
    alpha_bar = SCHEDULE.alphas_cumprod[-1]
    q = torch.distributions.Normal(alpha_bar.sqrt() * x_0, (1 - alpha_bar).sqrt())
    standard = torch.distributions.Normal(torch.zeros_like(x_0), torch.ones_like(x_0))
    expected = torch.distributions.kl_divergence(q, standard).flatten(1).mean(dim=1)
    assert prior_term(x_0, SCHEDULE).tolist() == pytest.approx(expected.tolist(), rel=1e-9)


def test_the_bound_of_the_exact_model_is_the_entropy() -> None:
    """A pixel that is -1 or 1 with equal odds has 1 bit; the bound closes as the steps become finer."""
    diffusion = DiffusionConfig(
        num_timesteps=400, beta_schedule="cosine", prediction_type="x_0", variance_type="learned"
    )
    schedule = diffusion.schedule()
    log_variance = schedule.posterior_log_variance_clipped.clone()
    # The last step is sure of its bin.
    log_variance[0] = -20.0
    x_0 = torch.where(torch.arange(2000).reshape(-1, 1) % 2 == 0, -1.0, 1.0)

    def exact(x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t] of two points, and the posterior's variance."""
        alpha_bar = schedule.alphas_cumprod[t].reshape(-1, 1)
        return torch.cat([torch.tanh(alpha_bar.sqrt() * x_t / (1 - alpha_bar)), log_variance[t].reshape(-1, 1)], dim=1)

    found = fastddpm.bits_per_dim(exact, x_0, diffusion, strata=60, batch_size=1000)
    assert 1.0 - 5 * found.standard_error < found.mean < 1.05 + 5 * found.standard_error
    assert found.standard_error < 0.03


def constant(x_t: Tensor, t: Tensor) -> Tensor:
    """A poor network, so that every term counts."""
    return 0.1 * x_t


def images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 1, 4, 4), generator=torch.Generator().manual_seed(1)) / 127.5 - 1


DIFFUSION = DiffusionConfig(num_timesteps=T, trained_betas=tuple(BETAS.tolist()))


def test_bits_per_dim_with_every_timestep_is_the_sum_of_the_terms() -> None:
    x_0 = images(3)
    found = fastddpm.bits_per_dim(constant, x_0, DIFFUSION, strata=T, seed=5, batch_size=2)
    total = prior_term(x_0, SCHEDULE)
    for t in range(T):
        counter = noise.counter(noise.resolve_seeds(seed=5, batch=3), t, noise.STREAM_TRAIN)
        eps = noise.normals(*counter, 16).reshape(x_0.shape).double()
        x_t = reference.q_sample(x_0.double(), torch.tensor([t]), SCHEDULE, eps)
        total = total + reference.vlb_term(
            constant(x_t, torch.tensor([t])), x_0.double(), x_t, torch.full((3,), t), SCHEDULE
        )
    expected = total / math.log(2.0)
    assert found.per_image.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert found.mean == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found.standard_error == pytest.approx(expected.std().item() / math.sqrt(3), rel=1e-4)


def test_bits_per_dim_is_unbiased_and_knows_its_error() -> None:
    """Few strata against every timestep, within 5 of its standard errors."""
    x_0 = images(1).expand(400, 1, 4, 4)
    exact = fastddpm.bits_per_dim(constant, x_0, DIFFUSION, strata=T, seed=1)
    few = fastddpm.bits_per_dim(constant, x_0, DIFFUSION, strata=4, seed=2)
    assert abs(few.mean - exact.mean) < 5 * math.hypot(few.standard_error, exact.standard_error)
    assert exact.standard_error < few.standard_error < 0.1 * few.mean


def test_bits_per_dim_of_an_image_does_not_depend_on_the_batch() -> None:
    x_0 = images(7)
    together = fastddpm.bits_per_dim(constant, x_0, DIFFUSION, strata=5)
    apart = fastddpm.bits_per_dim(constant, x_0, DIFFUSION, strata=5, batch_size=3)
    assert torch.equal(together.per_image, apart.per_image)


@pytest.mark.parametrize(("steps", "strata"), [(1000, 16), (1000, 1000), (1000, 1), (8, 8), (8, 3), (10, 7), (2, 2)])
def test_strata_cover_every_timestep_once_and_widen(steps: int, strata: int) -> None:
    edges = _edges(steps, strata)
    assert (edges[0], edges[-1], len(edges)) == (0, steps, strata + 1)
    sizes = np.diff(edges)
    assert (sizes >= 1).all()
    assert (np.diff(sizes) >= -1).all()


def test_bits_per_dim_refuses() -> None:
    with pytest.raises(ValueError, match=r"strata must be in 1\.\.20"):
        fastddpm.bits_per_dim(constant, images(2), DIFFUSION, strata=21)
    with pytest.raises(ValueError, match="no image"):
        fastddpm.bits_per_dim(constant, images(0), DIFFUSION)
    with pytest.raises(TypeError, match="float32"):
        fastddpm.bits_per_dim(constant, images(2).double(), DIFFUSION)
