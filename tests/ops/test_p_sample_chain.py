"""The analytic oracle: fused chains on data whose exact network output is known, against exact distributions.

For data x_0 ~ N(mu, s^2) the marginal of x_t is N(sqrt(ab) mu, ab s^2 + 1 - ab), and E[x_0 | x_t] is affine in x_t.
Every step without clipping is then affine, x_prev = A x_t + B + sigma z, so that mean and variance of the chain follow
a recursion that float64 computes exactly. A DDPM with a fixed variance does not reproduce the data's variance; with the
exact posterior variance fed through LEARNED it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddpm import Schedule, ddpm_table, ops
from fastddpm.noise import v1 as noise_v1
from fastddpm.noise.seeds import resolve_seeds
from fastddpm.ops.draw import randn
from fastddpm.tables.table import Table

MU, S = 0.7, 0.5
K = 5
SCHEDULE = Schedule.linear()

Model = Callable[[Tensor, int], Tensor]


def alpha_bars(table: Table) -> Tensor:
    """alpha_bar at each visited timestep and, after it, 1: float64 [R + 1]."""
    return torch.cat([SCHEDULE.alphas_cumprod[table.timesteps], torch.ones(1, dtype=torch.float64)])


def posterior_x0(ab: float, mu: float = MU, s: float = S) -> tuple[float, float]:
    """(slope, intercept) of E[x_0 | x_t] for x_0 ~ N(mu, s^2): Gaussian conditioning."""
    slope = math.sqrt(ab) * s**2 / (ab * s**2 + 1 - ab)
    return slope, mu - slope * math.sqrt(ab) * mu


def exact_output(table: Table, prediction: str, r: int) -> tuple[float, float]:
    """(slope, intercept) of the exact network output of row r, in x_t."""
    ab = float(alpha_bars(table)[r])
    p, q = posterior_x0(ab)
    a, b = math.sqrt(ab), math.sqrt(1 - ab)
    if prediction == "x_0":
        return p, q
    if prediction == "epsilon":
        return (1 - a * p) / b, -a * q / b
    # v = sqrt(ab) eps - sqrt(1 - ab) x_0 (Salimans & Ho 2022, appendix D).
    return a * (1 - a * p) / b - b * p, -a * a * q / b - b * q


def exact_log_std(table: Table, r: int) -> float:
    """Log of the standard deviation of x_{t-1} given x_t alone, for this data: x_0 given x_t is integrated out."""
    ab, ab_prev = (float(x) for x in alpha_bars(table)[r : r + 2])
    beta = 1 - ab / ab_prev
    posterior = beta * (1 - ab_prev) / (1 - ab)
    var_x0 = S**2 * (1 - ab) / (ab * S**2 + 1 - ab)
    c_x0 = math.sqrt(ab_prev) * beta / (1 - ab)
    return 0.5 * math.log(posterior + c_x0**2 * var_x0)


def run(table: Table, output: Model, n: int, x_T: Tensor | None = None) -> list[Tensor]:
    """States of the fused chain, x_T first: n samples of one element each share a row of noise."""
    key = resolve_seeds(seeds=[11])
    x = randn((1, 1, n), seeds=[11], stream=noise_v1.STREAM_X_T) if x_T is None else x_T
    states = [x]
    for r in range(len(table)):
        noise = noise_v1.counter(key, r)
        row = torch.tensor([r])
        x = ops.p_sample(x, output(x, r), table.rows, row, noise, clip=table.clip, learned=table.learned)
        states.append(x)
    return states


def assert_moments(x: Tensor, mean: float, var: float, what: str) -> None:
    """Mean and variance of n independent normals, within K standard errors."""
    z, n = x.double(), x.numel()
    assert abs(z.mean().item() - mean) <= K * math.sqrt(var / n), what
    assert abs(z.var().item() - var) <= K * var * math.sqrt(2 / n), what


def recursion(table: Table, prediction: str) -> list[tuple[float, float]]:
    """Mean and variance of the chain after each row, in float64."""
    mean, var, moments = 0.0, 1.0, []
    for r in range(len(table)):
        slope, intercept = exact_output(table, prediction, r)
        a, b, _, _, c_x0, c_xt, _, _, sigma, *_ = table.rows64[r].tolist()
        gain = c_x0 * (a + b * slope) + c_xt
        mean, var = gain * mean + c_x0 * b * intercept, gain**2 * var + sigma**2
        moments.append((mean, var))
    return moments


def affine(table: Table, prediction: str) -> Model:
    """The exact network."""

    def output(x: Tensor, r: int) -> Tensor:
        slope, intercept = exact_output(table, prediction, r)
        return slope * x + intercept

    return output


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "x_0", "v"])
@pytest.mark.parametrize(("steps", "spacing"), [(50, "leading"), (50, "trailing"), (7, "linspace")])
def test_p_sample_chain_follows_its_affine_recursion(prediction: str, variance: str, steps: int, spacing: str) -> None:
    table = ddpm_table(
        SCHEDULE, steps=steps, spacing=spacing, prediction_type=prediction, variance_type=variance, clip_range=None
    )
    states = run(table, affine(table, prediction), 1 << 14)
    for r, (mean, var) in enumerate(recursion(table, prediction)):
        assert_moments(states[r + 1], mean, var, f"row {r}")


def test_p_sample_chain_of_1000_steps_follows_its_affine_recursion() -> None:
    table = ddpm_table(SCHEDULE, clip_range=None)
    states = run(table, affine(table, "epsilon"), 1 << 12)
    moments = recursion(table, "epsilon")
    for r in range(99, 1000, 100):
        assert_moments(states[r + 1], *moments[r], f"row {r}")


@pytest.mark.parametrize(("steps", "ratio"), [(1000, 0.985), (50, 0.786)])
def test_ddpm_with_fixed_variance_shrinks_the_data(steps: int, ratio: float) -> None:
    """Known numbers for s = 0.5: sampling error of the method, which no implementation may hide."""
    mean, var = recursion(ddpm_table(SCHEDULE, steps=steps, clip_range=None), "epsilon")[-1]
    assert mean == pytest.approx(MU, abs=1e-4)
    assert var / S**2 == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("steps", [10, 100])
def test_p_sample_chain_with_the_exact_learned_variance_reproduces_the_data(variance: str, steps: int) -> None:
    """Ancestral sampling from the exact p(x_{t-1} | x_t) is exact for any spacing (x_T is drawn from its marginal).

    The last row is the exception: it returns E[x_0 | x_1] without noise, whose variance the test accounts for.
    """
    table = ddpm_table(SCHEDULE, steps=steps, spacing="trailing", variance_type=variance, clip_range=None)

    def output(x: Tensor, r: int) -> Tensor:
        slope, intercept = exact_output(table, "epsilon", r)
        sigma, h0, h1 = table.rows64[r, 8:11].tolist()
        v = (exact_log_std(table, r) - math.log(sigma) - h0) / h1 if sigma else 0.0
        return torch.cat([slope * x + intercept, torch.full_like(x, v)], dim=1)

    n, ab = 1 << 16, float(alpha_bars(table)[0])
    x_T = randn((1, 1, n), seeds=[11], stream=noise_v1.STREAM_X_T)
    x_T = math.sqrt(ab) * MU + math.sqrt(ab * S**2 + 1 - ab) * x_T
    states = run(table, output, n, x_T)
    for r, ab in enumerate(alpha_bars(table)[:-1].tolist()):
        assert_moments(states[r], math.sqrt(ab) * MU, ab * S**2 + 1 - ab, f"before row {r}")
    slope, _ = posterior_x0(float(alpha_bars(table)[-2]))
    ab = float(alpha_bars(table)[-2])
    assert_moments(states[-1], MU, slope**2 * (ab * S**2 + 1 - ab), "x_0")


def test_p_sample_chain_draws_a_mixture_of_gaussians() -> None:
    """1000 steps, exact epsilon of a two-component mixture, per sample: Kolmogorov-Smirnov distance of x_0.

    2**12 exact draws stay below 1.95 / sqrt(n) = 0.0305 with probability 0.999; discretisation shrinks variances by
    less than 4 %, which moves the distribution function by less than 0.005: bound 0.036.
    """
    weights, means, stds = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 0.8]), torch.tensor([0.3, 0.2])
    weights, means, stds = (t.double()[:, None] for t in (weights, means, stds))
    table = ddpm_table(SCHEDULE, clip_range=None)
    bars = alpha_bars(table)

    def output(x: Tensor, r: int) -> Tensor:
        a, b = bars[r].sqrt(), (1 - bars[r]).sqrt()
        z = x.double().flatten()[None]
        var = (a * stds) ** 2 + b**2
        log_p = weights.log() - 0.5 * (z - a * means) ** 2 / var - 0.5 * var.log()
        responsibility = torch.softmax(log_p, dim=0)
        # eps = -b * score of the marginal.
        return (b * (responsibility * (z - a * means) / var).sum(0)).float().reshape(x.shape)

    x_0 = np.sort(run(table, output, 1 << 12)[-1].double().flatten().numpy())
    cdf = (weights * torch.special.ndtr((torch.from_numpy(x_0) - means) / stds)).sum(0).numpy()
    grid = np.arange(len(x_0) + 1) / len(x_0)
    assert max((grid[1:] - cdf).max(), (cdf - grid[:-1]).max()) <= 0.036
