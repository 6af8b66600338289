"""The training loss of Ho et al. 2020, with noise drawn where it is needed and never stored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.checks import one_of
from fastddpm.noise import v1 as noise
from fastddpm.noise.seeds import as_word, resolve_seeds
from fastddpm.sampling.network import Model, unwrap
from fastddpm.schedules.diffusion import LEARNED
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.table import loss_rows, q_rows
from fastddpm.training.bound import BITS, Bound
from fastddpm.training.config import VLB_WEIGHT


@lru_cache(maxsize=16)
def _tables(
    schedule: Schedule,
    prediction_type: str,
    variance_type: str | None,
    weighting: str,
    gamma: float | None,
    device: torch.device,
) -> tuple[Tensor, Tensor, Bound | None]:
    """Return the rows of x_t, those of the loss, and the bound where the variance is learned."""
    rows, bound = loss_rows(schedule, prediction_type, weighting, gamma), None
    if variance_type is not None:
        bound = Bound.of(schedule, prediction_type, variance_type, clip_range=None).to(device, torch.float32)
    return q_rows(schedule).to(device), rows.to(device), bound


def ddpm_loss(
    model: Model,
    x_0: Tensor,
    schedule: Schedule,
    *,
    seed: int,
    step: int,
    sample_ids: Sequence[int] | Tensor | None = None,
    t: Tensor | None = None,
    prediction_type: str = "epsilon",
    weighting: str = "uniform",
    gamma: float | None = None,
    variance_type: str | None = None,
    vlb_weight: float = VLB_WEIGHT,
    reduction: str = "mean",
    backend: str = "auto",
    **model_kwargs: Any,
) -> Tensor:
    """Return w_t ||target - m(x_t, t)||^2, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps   (eq. 14).

    With a learned variance, L_hybrid = L_simple + lambda L_vlb of Nichol & Dhariwal 2021, eq. 16: T L_t in bits per
    dimension estimates L_vlb, and trains the variance only. t and eps of a sample are functions of (seed, its id,
    step), in any batch; eps is drawn three times (for x_t, the loss and its gradient) and never stored.

    Args:
        model: called as model(x_t, t, **model_kwargs); returns a tensor, or an object with ``.sample``.
        x_0: [B, ...] float32, float16 or bfloat16, in [-1, 1].
        schedule: of the forward process; its tables are kept for the next call.
        seed: of timesteps and noise, in [0, 2^64).
        step: the training step, in [0, 2^32).
        sample_ids: which samples these are, [B] in [0, 2^32); by default their places in the batch.
        t: int64 [B], 0-based; by default drawn uniformly.
        prediction_type: the target: "epsilon", "x_0" or "v".
        weighting: "uniform", "min-snr" or "p2", see ``table.loss_rows``.
        gamma: of the weighting; by default the paper's.
        variance_type: "learned" or "learned_range" where the model has twice the channels, the second half v.
        vlb_weight: lambda.
        reduction: "mean" over the batch, or "none".
        backend: "auto", "triton" or "torch", see ``fastddpm.ops``.

    Returns:
        float32 scalar, or [B]: the mean over elements, and the batch.

    Raises:
        ValueError: a name is unknown, a number out of range, or a shape does not fit.
        TypeError: x_0 or the model's output has another dtype.
        BackendUnavailable: "triton" was asked for and cannot run.
    """
    one_of("reduction", reduction, ("mean", "none"))
    one_of("trained variance_type", variance_type, (*LEARNED, None))
    device = x_0.device
    rows_x_t, rows_loss, bound = _tables(schedule, prediction_type, variance_type, weighting, gamma, device)
    key, ids = resolve_seeds(seed=seed, sample_ids=sample_ids, batch=len(x_0))
    if t is None:
        t = noise.timesteps(len(x_0), schedule.num_timesteps, seed, step, ids)
    t = t.to(device)
    counter = noise.counter((key, ids), as_word(step, "step"), noise.STREAM_TRAIN, device)
    x_t = ops.q_sample(x_0, rows_x_t, t, counter, backend=backend)
    assert isinstance(x_t, Tensor)
    output = unwrap(model(x_t, t, **model_kwargs))
    loss = ops.ddpm_loss(
        output,
        rows_loss,
        t,
        None if prediction_type == "x_0" else counter,
        None if prediction_type == "epsilon" else x_0,
        learned=variance_type is not None,
        backend=backend,
    )
    if bound is not None:
        term = bound.terms(output, x_0, x_t, t, fixed_mean=True)
        loss = loss + vlb_weight * schedule.num_timesteps * BITS * term
    return loss.mean() if reduction == "mean" else loss
