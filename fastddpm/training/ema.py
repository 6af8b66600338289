"""An exponential moving average of a model's weights, the ones that are sampled from."""

from __future__ import annotations

import torch
from torch import nn


class EMA:
    """theta_ema <- d * theta_ema + (1 - d) * theta, with d = min(decay, (1 + n) / (10 + n)) at update n.

    The warm-up makes the average follow the fast early changes instead of remembering the initial weights.

    Args:
        model: the model to average; its parameters are copied, its buffers are not.
        decay: d after the warm-up, in [0, 1).

    Raises:
        ValueError: decay is outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"the EMA decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self._theta = dict(model.named_parameters())
        self.weights = {name: p.detach().clone() for name, p in self._theta.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average the model's weights in after optimiser step ``step`` (from 0)."""
        d = min(self.decay, (1 + step) / (10 + step))
        averages = list(self.weights.values())
        torch._foreach_lerp_(averages, [p.detach() for p in self._theta.values()], 1.0 - d)
