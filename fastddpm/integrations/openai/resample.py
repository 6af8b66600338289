"""OpenAI's importance samplers of training timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from fastddpm.checks import one_of


class UniformSampler:
    """Draws every timestep of a diffusion equally often.

    Args:
        diffusion: anything with `num_timesteps`, T.
    """

    def __init__(self, diffusion: Any) -> None:
        self.diffusion = diffusion

    def weights(self) -> np.ndarray[Any, Any]:
        """Return how often to draw each timestep, float64 [T], not normalised."""
        return np.ones(self.diffusion.num_timesteps)

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Draw t, int64 [B], from NumPy's global generator; return it and the factors 1 / (T p_t) of the losses."""
        p = self.weights() / self.weights().sum()
        t = np.random.choice(len(p), size=(batch_size,), p=p)
        return torch.from_numpy(t).long().to(device), torch.from_numpy(1 / (len(p) * p[t])).float().to(device)


class LossSecondMomentResampler(UniformSampler):
    """Draws timesteps in proportion to sqrt(E[L_t^2])   (Nichol & Dhariwal 2021, eq. 18).

    Args:
        diffusion: anything with `num_timesteps`, T.
        history_per_term: how many losses of each timestep count; until there are so many, all are drawn equally often.
        uniform_prob: share of the draws that stays uniform.
    """

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        super().__init__(diffusion)
        self.history_per_term, self.uniform_prob = history_per_term, uniform_prob
        self._history: list[list[float]] = [[] for _ in range(diffusion.num_timesteps)]

    def weights(self) -> np.ndarray[Any, Any]:
        """Return how often to draw each timestep, float64 [T]; normalised once the history is full."""
        if any(len(losses) < self.history_per_term for losses in self._history):
            return super().weights()
        weights = np.sqrt(np.mean(np.array(self._history) ** 2, axis=-1))
        return weights / weights.sum() * (1 - self.uniform_prob) + self.uniform_prob / len(weights)

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Take the losses [B] of a batch at local_ts int64 [B], and those of all ranks where there are several."""
        parts: list[Any] = [(local_ts.tolist(), local_losses.tolist())]
        if distributed.is_available() and distributed.is_initialized():
            mine, parts = parts[0], [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, mine)
        for ts, losses in parts:
            self.update_with_all_losses(ts, losses)

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Take losses without asking other ranks."""
        for t, loss in zip(ts, losses, strict=True):
            self._history[t] = [*self._history[t], loss][-self.history_per_term :]


# Training loops ask for this class before they report losses.
LossAwareSampler = LossSecondMomentResampler
_SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}


def create_named_schedule_sampler(name: str, diffusion: Any) -> UniformSampler:
    """Return the sampler "uniform" or "loss-second-moment" for a diffusion.

    Raises:
        NotImplementedError: there is none of that name.
    """
    return _SAMPLERS[one_of("schedule sampler", name, _SAMPLERS, error=NotImplementedError)](diffusion)
