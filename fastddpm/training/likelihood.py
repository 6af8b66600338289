"""Bits per dimension of images under a model: the variational bound, estimated with its standard error."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.noise import v1 as noise
from fastddpm.noise.seeds import resolve_seeds
from fastddpm.sampling.network import Model, unwrap
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.tables.table import q_rows
from fastddpm.training.bound import BITS, Bound, prior_term


class BitsPerDim(NamedTuple):
    """The bound over a set of images, in bits per dimension.

    Attributes:
        mean: of the images' estimates.
        standard_error: of the mean, over the images; it contains the estimate's own noise. NaN for one image.
        per_image: float64 [N], each an unbiased estimate of its image's bound.
        prior: the part of the mean that no training changes, KL(q(x_T | x_0) || N(0, I)).
        evaluations: of the network per image.
    """

    mean: float
    standard_error: float
    per_image: Tensor
    prior: float
    evaluations: int


@torch.no_grad()
def bits_per_dim(
    model: Model,
    x_0: Tensor,
    diffusion: DiffusionConfig,
    *,
    strata: int = 16,
    seed: int = 0,
    batch_size: int = 64,
    class_labels: Tensor | None = None,
    backend: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> BitsPerDim:
    """Estimate L = L_T + sum_t L_{t-1} + L_0 in bits per dimension   (Ho et al. 2020, eq. 5).

    The T timesteps are divided into strata that widen with t, as the terms fall; the first are single timesteps. An
    image's sum over a stratum is its size times the term at one timestep of it, drawn uniformly, which is unbiased.
    With strata = T every term is evaluated, in `calc_bpd_loop`'s manner. t and noise are functions of (seed, image).

    Args:
        model: called as model(x_t, t[, class_labels]); returns a tensor, or an object with ``.sample``.
        x_0: [N, C, ...] float32 in [-1, 1]: 8-bit images, x / 127.5 - 1.
        diffusion: the process; its variance and clipping belong to p_theta.
        strata: evaluations of the network per image, at most T.
        seed: of timesteps and noise.
        batch_size: images per evaluation.
        class_labels: int64 [N], where the model takes them.
        backend: of the noising.
        progress: called with the number of images that are done.

    Raises:
        ValueError: strata is not in 1..T, or there is no image.
        TypeError: x_0 is not float32.
    """
    T = diffusion.num_timesteps
    if not 1 <= strata <= T:
        raise ValueError(f"strata must be in 1..{T}, got {strata}")
    if len(x_0) == 0:
        raise ValueError("there is no image to evaluate")
    if x_0.dtype != torch.float32:
        raise TypeError(f"x_0 must be float32, got {x_0.dtype}")
    schedule = diffusion.schedule()
    rows = q_rows(schedule).to(x_0.device)
    bound = Bound.of(schedule, diffusion.prediction_type, diffusion.variance_type, diffusion.clip_range)
    bound = bound.to(x_0.device, torch.float64)
    edges = _edges(T, strata)
    priors, sums = [], []
    for start in range(0, len(x_0), batch_size):
        x = x_0[start : start + batch_size]
        key, ids = resolve_seeds(seed=seed, sample_ids=range(start, start + len(x)))
        kwargs = {} if class_labels is None else {"class_labels": class_labels[start : start + batch_size]}
        priors.append(prior_term(x, schedule))
        total = priors[-1].clone()
        for s, (low, high) in enumerate(pairwise(edges)):
            t = (low + noise.timesteps(len(x), high - low, seed, s, ids)).to(x.device)
            counter = noise.counter((key, ids), s, noise.STREAM_TRAIN, x.device)
            x_t = ops.q_sample(x, rows, t, counter, backend=backend)
            assert isinstance(x_t, Tensor)
            total += (high - low) * bound.terms(unwrap(model(x_t, t, **kwargs)), x, x_t, t)
        sums.append(total)
        if progress is not None:
            progress(start + len(x))
    per_image, prior = BITS * torch.cat(sums).cpu(), BITS * torch.cat(priors).mean().item()
    error = per_image.std() / len(per_image) ** 0.5
    return BitsPerDim(per_image.mean().item(), error.item(), per_image, prior, strata)


def _edges(T: int, strata: int) -> list[int]:
    """Divide 0..T-1 into strata whose sizes grow geometrically, from one timestep on."""
    edges = [0]
    for remaining in range(strata, 0, -1):
        # What is left is as wide as if each of the remaining strata were so much wider than the one before.
        ratio = ((T + 1) / (edges[-1] + 1)) ** (1 / remaining)
        edges.append(max(edges[-1] + 1, round((edges[-1] + 1) * ratio) - 1))
    return edges
