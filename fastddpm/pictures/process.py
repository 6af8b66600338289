"""The picture's content: data dissolving into a Gaussian along the forward process, and coming back along the reverse.

States are numbered as in the paper: x_0 is the data and x_T the last latent, so state i > 0 belongs to the schedule's
0-based index i - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.noise import v1 as noise
from fastddpm.ops.draw import randn
from fastddpm.sampling.sampler import Sampler
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.table import q_step_rows

# Below this alpha_bar_T the last latent keeps less than 3.2 % of the data's scale (sqrt(0.001)): it "ends Gaussian".
GAUSSIAN_END = 1e-3

# Pairs of (x_t, data point) whose weights the exact denoiser holds at once, 32 MB in float64.
_MAX_PAIRS = 1 << 22


@dataclass(frozen=True)
class Process:
    """A forward process, and what its states are called.

    Attributes:
        t: [R + 1] the states' names, 0 first; 0..R, unless the process visits R of a model's T timesteps.
    """

    schedule: Schedule
    t: tuple[int, ...]

    @classmethod
    def of(cls, schedule: Schedule, timesteps: Tensor) -> Process:
        """Visit `timesteps` (0-based, as a table names them); the states keep the names of the whole process, 0..T."""
        return cls(schedule.respaced(timesteps), (0, *(t + 1 for t in sorted(timesteps.tolist()))))

    @property
    def steps(self) -> int:
        """R, the number of steps."""
        return self.schedule.num_timesteps

    def alpha_bar(self, i: int) -> float:
        """alpha_bar of state i; 1 for the data."""
        return 1.0 if i == 0 else float(self.schedule.alphas_cumprod[i - 1])

    def snr(self, i: int) -> float:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of state i (Kingma et al. 2021); infinite for the data."""
        alpha_bar = self.alpha_bar(i)
        return math.inf if alpha_bar == 1.0 else alpha_bar / (1.0 - alpha_bar)

    def ends_gaussian(self) -> bool:
        """Tell whether alpha_bar_T is below `GAUSSIAN_END`."""
        return self.alpha_bar(self.steps) < GAUSSIAN_END

    def prior_term(self, x_0: Tensor) -> float:
        """L_T = E_{x_0} KL(q(x_T | x_0) || N(0, I)) in nats (Ho et al. 2020, eq. 5), in float64.

        The KL of two Gaussians: 1/2 (alpha_bar |x_0|^2 - D alpha_bar - D log(1 - alpha_bar)).
        """
        x = x_0.double().flatten(1)
        alpha_bar, D = self.alpha_bar(self.steps), x.shape[1]
        return 0.5 * (alpha_bar * (float(x.square().sum(1).mean()) - D) - D * math.log1p(-alpha_bar))


def marginal(x_0: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D, D] of q(x_t), float64, for the distribution that draws one of x_0's points.

    E x_t = sqrt(alpha_bar_t) E x_0 and Cov x_t = alpha_bar_t Cov x_0 + (1 - alpha_bar_t) I (Ho et al. 2020, eq. 4).

    Args:
        x_0: [N, D].
        alpha_bar: in [0, 1].
    """
    x = x_0.cpu().double()
    identity = torch.eye(x.shape[1], dtype=torch.float64, device="cpu")
    covariance = alpha_bar * x.T.cov(correction=0) + (1.0 - alpha_bar) * identity
    return math.sqrt(alpha_bar) * x.mean(dim=0), covariance


def forward_walk(
    x_0: Tensor, schedule: Schedule, indices: Sequence[int], *, seed: int = 0, backend: str = "auto"
) -> Tensor:
    """Walk the chain q(x_t | x_{t-1}) (Ho et al. 2020, eq. 2) from x_0, and record the states `indices`.

    The noise of point k in step t is that of sample id k and step t - 1, stream 4.

    Args:
        x_0: [N, ...] float32.
        indices: K ascending states of 0..R.
        backend: "auto", "triton" or "torch".

    Returns:
        [K, N, ...] float32 on the CPU.
    """
    rows = q_step_rows(schedule).to(x_0.device)
    key = noise.resolve_seeds(seed=seed, batch=len(x_0))
    x, wanted = x_0, set(indices)
    states = [x.cpu()] if 0 in wanted else []
    for i in range(1, max(indices) + 1):
        row = torch.tensor([i - 1], device=x.device)
        eps = noise.counter(key, i - 1, noise.STREAM_FORWARD, x.device)
        x = ops.q_sample(x, rows, row, eps, backend=backend)  # type: ignore[assignment]
        if i in wanted:
            states.append(x.cpu())
    return torch.stack(states)


def reverse_walk(
    sampler: Sampler, n: int, indices: Sequence[int], *, seed: int = 0, class_labels: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Sample from x_T ~ N(0, I) (Ho et al. 2020, Algorithm 2), and record the states `indices`.

    Args:
        n: samples, with ids 0..n-1.
        indices: K ascending states of 0..R, 0 among them.
        class_labels: one per sample, for a conditional model.

    Returns:
        (x, x_0), float32 [K, n, ...] each on the CPU: the states, and the network's estimate of x_0 from each; at
        state 0, where nothing is left to estimate, x_0 itself.
    """
    steps = len(sampler.table)
    x = randn((n, *sampler.shape), seed=seed, stream=noise.STREAM_X_T, device=sampler.device)
    wanted = set(indices)
    states: list[Tensor] = []
    estimates: list[Tensor] = []
    for result in sampler.steps(seed=seed, sample_ids=range(n), x_T=x, class_labels=class_labels):
        if steps - result.index in wanted:
            assert result.x0 is not None
            states.append(x.cpu())
            estimates.append(result.x0.cpu())
        x = result.x_t
    states.append(x.cpu())
    estimates.append(x.cpu())
    return torch.stack(states[::-1]), torch.stack(estimates[::-1])


class ExactDenoiser:
    """The noise prediction that no network can better when the data are N given points, each as likely as the others.

    eps*(x_t, t) = (x_t - sqrt(alpha_bar_t) E[x_0 | x_t]) / sqrt(1 - alpha_bar_t), the minimiser of L_simple, where
    E[x_0 | x_t] is the mean of the points, weighted by N(x_t; sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I).
    Its reverse process, in small steps, ends at the points themselves: it samples, and never generalises.

    Args:
        x_0: [N, ...] the points or images.
        device: where it will be called.
    """

    def __init__(self, x_0: Tensor, schedule: Schedule, device: torch.device | str = "cpu") -> None:
        self._x_0 = x_0.to(device, torch.float64).flatten(1)
        self._half_norms = self._x_0.square().sum(dim=1) / 2
        self._alphas_cumprod = schedule.alphas_cumprod.to(device)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in x [B, ...] at timesteps t [B]; computed in float64, returned in the dtype of x."""
        x_t = x.double().flatten(1)
        alpha_bar = self._alphas_cumprod[t.long()][:, None]
        rows = max(1, _MAX_PAIRS // len(self._x_0))
        parts = zip(x_t.split(rows), alpha_bar.split(rows), strict=True)
        mean = torch.cat([self.posterior_mean(part, a) for part, a in parts])
        return ((x_t - alpha_bar.sqrt() * mean) / (1.0 - alpha_bar).sqrt()).to(x.dtype).reshape(x.shape)

    def posterior_mean(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """E[x_0 | x_t], float64 [B, D], from x_t [B, D] and alpha_bar [B, 1]."""
        # |x_t - s x_0|^2 without |x_t|^2, which all weights of a row share.
        logits = (alpha_bar.sqrt() * (x_t @ self._x_0.T) - alpha_bar * self._half_norms) / (1.0 - alpha_bar)
        return logits.softmax(dim=1) @ self._x_0
