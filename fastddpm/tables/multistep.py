"""Adams' methods for diffusions: every multistep sampler as rows, by one formula.

With alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = log(alpha / sigma), h = lambda_{i+1} - lambda_i and
H = (1 + tau^2) h, the reverse process from level i to i + 1 is

    x_{i+1} = sigma_{i+1} / sigma_i exp(-tau^2 h) x_i
            + alpha_{i+1} H int_0^1 exp(-H (1 - u)) x_0(lambda_i + u h) du + sigma_{i+1} sqrt(1 - exp(-2 tau^2 h)) z

(Lu et al. 2022, arXiv:2211.01095, eq. 8, for tau = 0; Xue et al. 2023, arXiv:2309.05019, proposition 4.2). A method
replaces x_0 along the step by the polynomial through its last estimates, at nodes u_j <= 0, so that the integral is a
sum of b_j x0_j with sum_j b_j u_j^k = w_k = H int_0^1 exp(-H (1 - u)) u^k du. The published methods differ in how many
nodes they take, and in whether they take some w_k only approximately.

A corrector repeats the step once x_0 at its end is known, with u = 1 as a node more. The corrected state differs from
the predicted one by estimates of x_0 alone, and the next step is linear in it: the correction moves into the next row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastddpm.schedules.levels import Levels
from fastddpm.tables.table import HISTORY

# From the exact moments w and H to those that a method takes.
Rule = Callable[[list[float], float], list[float]]


def exact(w: list[float], H: float) -> list[float]:
    """Take every moment exactly: the full order."""
    return w


def bh1(w: list[float], H: float) -> list[float]:
    """Take H / 2 for the moment of a step with two nodes (Zhao et al. 2023, B1(h) = h; Xue et al.'s code)."""
    return [w[0], 0.5 * H] if len(w) == 2 else w


def bh2(w: list[float], H: float) -> list[float]:
    """Take w_0 / 2 for the moment of a step with two nodes (Lu et al. 2022, Algorithm 2; Zhao et al. 2023, B2(h))."""
    return [w[0], 0.5 * w[0]] if len(w) == 2 else w


RULES: dict[str, Rule] = {"exact": exact, "bh1": bh1, "bh2": bh2}


def moments(H: float, count: int) -> list[float]:
    """Return w_k = H int_0^1 exp(-H (1 - u)) u^k du for k < count; H may be infinite."""
    if H < 1.0:
        # The recursion below loses digits as H nears 0; this is the power series of the same function.
        terms = [[math.factorial(k) / math.factorial(j + k) * -((-H) ** j) for j in range(1, 20)] for k in range(count)]
        return [math.fsum(series) for series in terms]
    w = [-math.expm1(-H)]
    for k in range(1, count):
        w.append(1.0 - k / H * w[-1])
    return w


def weights(nodes: Sequence[float], w: Sequence[float]) -> Tensor:
    """Return b with sum_j b_j nodes_j^k = w_k, float64."""
    u = torch.tensor(nodes, dtype=torch.float64, device="cpu")
    powers = torch.arange(len(nodes), dtype=torch.float64, device="cpu")
    return torch.linalg.solve(u[None, :] ** powers[:, None], torch.tensor(w, dtype=torch.float64, device="cpu"))


def node_counts(levels: Levels, order: int, falling: bool) -> list[int]:
    """Return how many estimates each step reads: fewer in the beginning and, if falling, towards the end.

    A step that ends without noise reads the newest alone, which is its limit; a level without signal is no node of
    another step, since it is infinitely far away.
    """
    lam, n = levels.lambda_.tolist(), len(levels.timesteps)
    counts = []
    for i in range(n):
        reach = min(order, i + 1, n - i if falling else order)
        if i and math.isinf(lam[0]):
            reach = min(reach, i)
        counts.append(1 if math.isinf(lam[i + 1]) else reach)
    return counts


def multistep_columns(
    levels: Levels,
    order: int,
    *,
    corrector: int | None = None,
    tau: float | Sequence[float] = 0.0,
    rule: Rule = exact,
    falling: bool = True,
) -> dict[str, Tensor]:
    """Tabulate c_xt, c_x0, c_1 ... and sigma of a method of that order.

    Args:
        levels: what the solver passes.
        order: how many estimates of x_0 a prediction reads, the newest included.
        corrector: how many older ones a correction reads beside the newest; None for no correction.
        tau: how stochastic the process is, for all steps or each: 0 is the ODE, 1 the reverse SDE.
        rule: which moments are approximated, and how.
        falling: read fewer towards the last step.
    """
    alpha, sigma, lam = (values.tolist() for values in (levels.alpha, levels.sigma, levels.lambda_))
    n = len(levels.timesteps)
    taus = [float(tau)] * n if isinstance(tau, (int, float)) else [float(value) for value in tau]
    counts = node_counts(levels, order, falling)
    predicted = torch.zeros(n, len(HISTORY) + 1, dtype=torch.float64, device="cpu")
    rows = torch.zeros_like(predicted)
    c_xt, std = torch.zeros(2, n, dtype=torch.float64, device="cpu")

    def step(i: int, nodes: list[int]) -> Tensor:
        h = lam[i + 1] - lam[i]
        H = (1.0 + taus[i] ** 2) * h
        u = [0.0 if j == i else (lam[j] - lam[i]) / h for j in nodes]
        return weights(u, rule(moments(H, len(nodes)), H))

    for i in range(n):
        h = lam[i + 1] - lam[i]
        lost = taus[i] ** 2 * h if taus[i] else 0.0
        c_xt[i] = sigma[i + 1] / sigma[i] * math.exp(-lost)
        std[i] = sigma[i + 1] * math.sqrt(-math.expm1(-2.0 * lost))
        predicted[i, : counts[i]] = step(i, [i - j for j in range(counts[i])])
        rows[i] = alpha[i + 1] * predicted[i]
        if corrector is not None and i and not math.isinf(lam[i - 1]):
            oldest = int(math.isinf(lam[0]))
            older = min(corrector, i - oldest, n - i + 1 if falling else corrector)
            corrected = torch.zeros_like(predicted[i])
            corrected[: older + 1] = step(i - 1, [i - j for j in range(older + 1)])
            corrected[1:] -= predicted[i - 1, :-1]
            rows[i] += c_xt[i] * alpha[i] * corrected
    return {"c_xt": c_xt, "c_x0": rows[:, 0], "sigma": std, **{c: rows[:, k + 1] for k, c in enumerate(HISTORY)}}
