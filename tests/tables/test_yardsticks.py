"""The networks in closed form, and what docs/samplers.md says of the solvers by them."""

from __future__ import annotations

import pytest
import torch

from fastddpm.tables.by_name import make_table
from tests.tables.float64 import execute_table64
from tests.tables.yardsticks import (
    CONFIG,
    SCHEDULE,
    extrapolation_errors,
    ode_error,
    photographs,
    ring,
    start,
    with_calls,
)


@pytest.mark.parametrize("network", [ring, photographs])
@pytest.mark.parametrize("t", [0, 250, 999])
def test_a_mixtures_eps_is_the_score_of_its_density(network, t):
    # eps = -sqrt(1 - alpha_bar) grad log p(x_t), by automatic differentiation (Song et al. 2021, section 3.1).
    mixture = network()
    alpha_bar = SCHEDULE.alphas_cumprod[t]
    x = start(mixture, 5).requires_grad_()
    variance = alpha_bar * mixture.s**2 + 1 - alpha_bar
    distance = (x[:, None] - alpha_bar.sqrt() * mixture.means[None]).square().sum(dim=2)
    (score,) = torch.autograd.grad(torch.logsumexp(-0.5 * distance / variance, dim=1).sum(), x)
    eps = mixture(x.detach(), torch.full((5,), t))
    torch.testing.assert_close(eps, -(1 - alpha_bar).sqrt() * score, rtol=1e-6, atol=1e-6)


def test_higher_orders_are_nearer_where_the_steps_are_spaced_by_noise():
    error = {
        name: ode_error(with_calls(name, 10, spacing="logsnr"), photographs(), 64)
        for name in ("euler", "dpm++2m", "unipc2", "unipc3")
    }
    assert error["unipc2"] < error["dpm++2m"] < error["unipc3"] < error["euler"]
    at_20 = {name: ode_error(with_calls(name, 20, spacing="logsnr"), photographs(), 64) for name in error}
    assert max(at_20["unipc2"], at_20["unipc3"], at_20["dpm++2m"]) < at_20["euler"] / 5


def test_a_parabola_misses_the_next_x_0_by_more_than_a_line():
    constant, line, parabola = extrapolation_errors(8, photographs(), n=16, between=8)
    assert constant < line < parabola / 1.5


def test_the_last_jump_of_trailing_timesteps_is_the_same_for_every_solver():
    error = [ode_error(with_calls(name, 10, spacing="trailing"), photographs(), 64) for name in ("dpm++2m", "unipc3")]
    assert error[0] == pytest.approx(error[1], rel=0.05)


@pytest.mark.parametrize("name", ["ddpm", "dpm++2m_sde", "sa_solver", "euler_a"])
def test_a_stochastic_sampler_has_the_moments_of_the_data(name):
    # Each component of the ring has mean 0 and variance 1.01; 60 steps leave a bias below 2 %.
    table, n = make_table(name, CONFIG, steps=60, spacing="trailing"), 4000
    noise = torch.Generator().manual_seed(5)
    z = [torch.randn(n, 2, dtype=torch.float64, generator=noise) for _ in range(60)]
    x = execute_table64(table, ring(), start(ring(), n, seed=6), z)
    assert (x.mean(dim=0).abs() < 5 * (1.01 / n) ** 0.5).all()
    # The square of a coordinate on the circle has variance near 1/2.
    assert (x.square().mean(dim=0) - 1.01).abs().max() < 0.02 + 5 * (0.52 / n) ** 0.5
