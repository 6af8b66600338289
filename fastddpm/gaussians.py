"""Divergence and likelihood of Gaussians, elementwise: what the terms of the variational bound are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Half the width of a bin of 8-bit images scaled to [-1, 1] (Ho et al. 2020, section 3.3).
HALF_BIN = 1.0 / 255.0
# Beyond these, the outermost bins reach to infinity.
_EDGE = 0.999
_TINY = 1e-12


def mean_flat(x: Tensor) -> Tensor:
    """Average over all but the batch dimension: [B, ...] -> [B]."""
    return x.mean(dim=tuple(range(1, x.dim())))


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, elementwise."""
    ratio = (log_variance1 - log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 + ratio + (mean1 - mean2) ** 2 * (-log_variance2).exp() - 1.0)


def discretized_log_likelihood(
    x: Tensor, mean: Tensor, log_sigma: Tensor, cdf: Callable[[Tensor], Tensor] = torch.special.ndtr
) -> Tensor:
    """Return the log of a Gaussian's mass in the 8-bit bin around x in [-1, 1]   (Ho et al. 2020, eq. 13).

    A mass counts as 1e-12 at least, as in the authors' code; float32 loses digits from about 4 sigma on.
    """
    inverse_sigma = (-log_sigma).exp()
    below_upper = cdf((x - mean + HALF_BIN) * inverse_sigma)
    below_lower = cdf((x - mean - HALF_BIN) * inverse_sigma)
    mass = torch.where(x > _EDGE, 1.0 - below_lower, below_upper - below_lower)
    return torch.where(x < -_EDGE, below_upper, mass).clamp(min=_TINY).log()
