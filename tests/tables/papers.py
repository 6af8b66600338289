"""The solvers in their papers' own forms: two states where the paper has two, integrals by quadrature, Python floats.

Each takes model(x, t), which returns x_0, the state at the first level, alpha_bar at every level and the timesteps, and
yields the state at which the network is asked next, up to the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]
_U, _WEIGHTS = np.polynomial.legendre.leggauss(60)


def scales(alpha_bars: Sequence[float]) -> tuple[list[float], list[float], list[float]]:
    """alpha, sigma and lambda of every level."""
    alpha = [math.sqrt(a) for a in alpha_bars]
    sigma = [math.sqrt(1 - a) for a in alpha_bars]
    lam = [math.inf if s == 0 else -math.inf if a == 0 else math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    return alpha, sigma, lam


def integral(f: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """The integral of f over [low, high], 60 points."""
    x = low + (high - low) * (_U + 1) / 2
    return float((_WEIGHTS * f(x)).sum() * (high - low) / 2)


def lagrange(nodes: Sequence[float], j: int, x: np.ndarray) -> np.ndarray:
    """The polynomial that is 1 at node j and 0 at the others."""
    value = np.ones_like(x)
    for k, node in enumerate(nodes):
        if k != j:
            value = value * (x - node) / (nodes[j] - node)
    return value


def unipc(
    model: Model, x: Tensor, alpha_bars: Sequence[float], ts: Sequence[float], order: int, variant: str
) -> Iterator[Tensor]:
    """Zhao et al. 2023, Algorithms 7 and 8 (data prediction), with B_1(h) = h and B_2(h) = e^h - 1, h = -h_i."""
    alpha, sigma, lam = scales(alpha_bars)
    M = len(ts)
    x0s: list[Tensor] = []
    corrected = predicted = before = x
    for i in range(1, M + 1):
        x0s.append(model(predicted, torch.tensor([ts[i - 1]])))
        if i > 1:
            # UniC: the same step from the state before it, with the estimate at its end as one more difference.
            p = min(order, i - 1, M + 2 - i)
            corrected = _uni(i - 1, p, True, before, x0s, alpha, sigma, lam, variant)
        before = corrected
        predicted = _uni(i, min(order, i, M + 1 - i), False, corrected, x0s, alpha, sigma, lam, variant)
        yield predicted


def _uni(
    i: int,
    p: int,
    correct: bool,
    x: Tensor,
    x0s: Sequence[Tensor],
    alpha: Sequence[float],
    sigma: Sequence[float],
    lam: Sequence[float],
    variant: str,
) -> Tensor:
    h = lam[i] - lam[i - 1]
    m0 = x0s[i - 1]
    x = sigma[i] / sigma[i - 1] * x - alpha[i] * math.expm1(-h) * m0
    r = [(lam[i - 1 - k] - lam[i - 1]) / h for k in range(1, p)] + [1.0] * correct
    D = [x0s[i - 1 - k] - m0 for k in range(1, p)] + [x0s[i] - m0 for _ in range(correct)]
    if not r:
        return x
    B = -h if variant == "bh1" else math.expm1(-h)
    if len(r) == 1:
        rho = np.array([0.5])  # "when p = 2 we can directly set a_1 = 1/2" (section 3.4)
    else:
        rhs = [-integral(lambda u, k=k: h * np.exp(-h * (1 - u)) * u**k, 0, 1) / B for k in range(1, len(r) + 1)]
        rho = np.linalg.solve(np.array([[rm ** (k - 1) for rm in r] for k in range(1, len(r) + 1)]), np.array(rhs))
    return x - alpha[i] * B * sum(float(a) / rm * d for a, rm, d in zip(rho, r, D, strict=True))


def sa_solver(
    model: Model,
    x: Tensor,
    alpha_bars: Sequence[float],
    ts: Sequence[float],
    order: int,
    corrector_order: int,
    tau: float,
    z: Sequence[Tensor],
) -> Iterator[Tensor]:
    """Xue et al. 2023, Algorithm 1 with eqs. 14 and 17; steps of two nodes with the term that their code adds."""
    _, sigma, lam = scales(alpha_bars)
    M = len(ts)
    x0s: list[Tensor] = []
    corrected = predicted = before = x

    def step(i: int, nodes: list[int], x: Tensor) -> Tensor:
        h = lam[i] - lam[i - 1]
        if math.isinf(h):
            return x0s[i - 1]
        x = sigma[i] / sigma[i - 1] * math.exp(-(tau**2) * h) * x
        x = x + sigma[i] * math.sqrt(-math.expm1(-2 * tau**2 * h)) * z[i - 1]
        for j, node in enumerate(nodes):
            b = integral(
                lambda v, j=j: (
                    np.exp(-(tau**2) * (lam[i] - v) + v) * lagrange([lam[k] for k in nodes], j, v) * (1 + tau**2)
                ),
                lam[i - 1],
                lam[i],
            )
            if len(nodes) == 2:
                exact = integral(lambda u: h * np.exp(-(1 + tau**2) * h * (1 - u)) * u * h, 0, 1)
                other = lam[nodes[1 - j]]
                b += (1 + tau**2) * math.exp(lam[i]) * (h**2 / 2 - exact) / (lam[node] - other)
            x = x + sigma[i] * b * x0s[node]
        return x

    for i in range(1, M + 1):
        x0s.append(model(predicted, torch.tensor([ts[i - 1]])))
        if i > 1 and corrector_order:
            count = min(corrector_order, i, M + 3 - i)
            corrected = step(i - 1, [i - 1 - k for k in range(count)], before)
        elif i > 1:
            corrected = predicted
        before = corrected
        predicted = step(i, [i - 1 - k for k in range(min(order, i, M + 1 - i))], corrected)
        yield predicted


def dpm_solver_3m_sde(
    model: Model, x: Tensor, alpha_bars: Sequence[float], ts: Sequence[float], eta: float, z: Sequence[Tensor]
) -> Iterator[Tensor]:
    """DPM-Solver++(3M) SDE as k-diffusion writes it, for x / alpha in s = sigma / alpha."""
    alpha, sigma, _ = scales(alpha_bars)
    s = [b / a for a, b in zip(alpha, sigma, strict=True)]
    y, old, widths = x / alpha[0], [], []
    for i, t in enumerate(ts):
        x_0 = model(y * alpha[i], torch.tensor([t]))
        if s[i + 1] == 0:
            yield x_0
            return
        h = math.log(s[i] / s[i + 1])
        he = h * (eta + 1)
        y = math.exp(-h * eta) * s[i + 1] / s[i] * y - math.expm1(-he) * x_0
        phi_2 = math.expm1(-he) / he + 1
        phi_3 = phi_2 / he - 0.5
        if len(old) == 1:
            y = y - 0.5 * math.expm1(-he) * (x_0 - old[0]) / (widths[0] / h)
        elif len(old) > 1:
            r0, r1 = widths[0] / h, widths[1] / h
            d1_0, d1_1 = (x_0 - old[0]) / r0, (old[0] - old[1]) / r1
            y = y + phi_2 * (d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)) - phi_3 * (d1_0 - d1_1) / (r0 + r1)
        y = y + z[i] * s[i + 1] * math.sqrt(-math.expm1(-2 * h * eta))
        old, widths = [x_0, *old][:2], [h, *widths][:2]
        yield y * alpha[i + 1]


def deis(model: Model, x: Tensor, alpha_bars: Sequence[float], ts: Sequence[float], order: int) -> Iterator[Tensor]:
    """Zhang & Chen 2022, eq. 14 with polynomials in log rho, rho = sigma / alpha, and x / alpha as the state."""
    alpha, sigma, _ = scales(alpha_bars)
    rho = [b / a for a, b in zip(alpha, sigma, strict=True)]
    y, eps = x / alpha[0], []
    for i, t in enumerate(ts):
        x_0 = model(y * alpha[i], torch.tensor([t]))
        eps.append((y - x_0) / rho[i])
        count = 1 if rho[i + 1] == 0 else min(order, i + 1, len(ts) - i)
        nodes = [math.log(rho[i - j]) for j in range(count)]
        if count == 1:
            y = y + (rho[i + 1] - rho[i]) * eps[-1]
        else:
            for j in range(count):
                C = integral(lambda v, j=j, n=nodes: np.exp(v) * lagrange(n, j, v), nodes[0], math.log(rho[i + 1]))
                y = y + C * eps[-1 - j]
        yield y * alpha[i + 1]


def ipndm(model: Model, x: Tensor, alpha_bars: Sequence[float], ts: Sequence[float]) -> Iterator[Tensor]:
    """Zhang & Chen 2022, section 4: Euler's step in rho with Adams-Bashforth's mean of up to four eps."""
    table = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    alpha, sigma, _ = scales(alpha_bars)
    rho = [b / a for a, b in zip(alpha, sigma, strict=True)]
    y, eps = x / alpha[0], []
    for i, t in enumerate(ts):
        eps.append((y - model(y * alpha[i], torch.tensor([t]))) / rho[i])
        count = 1 if rho[i + 1] == 0 else min(4, i + 1)
        mean = sum(c * eps[-1 - j] for j, c in enumerate(table[count]))
        y = y + (rho[i + 1] - rho[i]) * mean
        yield y * alpha[i + 1]


def heun(model: Model, x: Tensor, alpha_bars: Sequence[float], ts: Sequence[float]) -> Iterator[Tensor]:
    """Karras et al. 2022, Algorithm 1, for x / alpha in s = sigma / alpha: after Euler's step and the whole."""
    alpha, sigma, _ = scales(alpha_bars)
    s = [b / a for a, b in zip(alpha, sigma, strict=True)]
    y = x / alpha[0]
    for i, t in enumerate(ts):
        d = (y - model(y * alpha[i], torch.tensor([t]))) / s[i]
        euler = y + (s[i + 1] - s[i]) * d
        yield euler * alpha[i + 1]
        if s[i + 1] == 0:
            return
        slope = (euler - model(euler * alpha[i + 1], torch.tensor([ts[i + 1]]))) / s[i + 1]
        y = y + (s[i + 1] - s[i]) * (d + slope) / 2
        yield y * alpha[i + 1]


def euler_ancestral(
    model: Model, x: Tensor, alpha_bars: Sequence[float], ts: Sequence[float], z: Sequence[Tensor]
) -> Iterator[Tensor]:
    """k-diffusion's sample_euler_ancestral, for x / alpha in s = sigma / alpha."""
    alpha, sigma, _ = scales(alpha_bars)
    s = [b / a for a, b in zip(alpha, sigma, strict=True)]
    y = x / alpha[0]
    for i, t in enumerate(ts):
        up = math.sqrt(s[i + 1] ** 2 * (s[i] ** 2 - s[i + 1] ** 2) / s[i] ** 2)
        down = math.sqrt(s[i + 1] ** 2 - up**2)
        d = (y - model(y * alpha[i], torch.tensor([t]))) / s[i]
        y = y + d * (down - s[i]) + z[i] * up
        yield y * alpha[i + 1]
