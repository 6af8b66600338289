"""Guidance: its weight at each row, and where the step's own combination of two predictions is not all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from fastddpm.checks import number, one_of
from fastddpm.errors import ModelOutputError
from fastddpm.sampling.edits import refuse_without_levels
from fastddpm.tables.table import Table

Weight = float | Sequence[float] | Tensor
CondFn = Callable[..., Tensor]
CondForm = Literal["mean", "epsilon"]


class GuidanceArguments(TypedDict, total=False):
    """Keyword arguments of `Sampler.sample` that guide it, explained there."""

    guidance: Weight
    guidance_interval: Sequence[float] | None
    guidance_rescale: float
    cond_fn: CondFn | None
    cond_form: CondForm | None


class Guidance(NamedTuple):
    """What they come to: w (or float32 [R]) and phi of `rescaled`, the gradient and its form, `shift_of` for one."""

    w: float | Tensor
    phi: float
    cond_fn: CondFn | None = None
    cond_form: CondForm | None = None
    shift: Tensor | None = None


def resolve_guidance(
    table: Table,
    guidance: Weight = 1.0,
    guidance_interval: Sequence[float] | None = None,
    guidance_rescale: float = 0.0,
    cond_fn: CondFn | None = None,
    cond_form: CondForm | None = None,
) -> Guidance:
    """Check the arguments of `Sampler.sample` that guide it.

    Raises:
        ValueError: a number is out of range, or the table does not have what a form needs.
    """
    w, phi = _weight(guidance, guidance_interval, table), number("guidance_rescale", guidance_rescale, ge=0.0, le=1.0)
    if table.name == "tuned" and (guidance_interval is not None or phi or cond_fn is not None):
        raise ValueError(
            "a tuned table fits one weight of guidance, the same at every step: leave out guidance_interval, "
            "guidance_rescale and cond_fn, or take sampler='fast'"
        )
    if cond_fn is None:
        return Guidance(w, phi)
    noisy = table.column("sigma") != 0
    form = cond_form or ("mean" if noisy.any() and noisy[:-1].all() else "epsilon")
    if one_of("cond_form", form, ("mean", "epsilon")) == "mean" and not noisy.any():
        raise ValueError(f"cond_form='mean' moves x by sigma^2, and table {table.name!r} has none; use 'epsilon'")
    return Guidance(w, phi, cond_fn, form, shift_of(table) if form == "epsilon" else None)


def is_guided(guidance: Weight) -> bool:
    """Whether a weight, or one per row, asks for a second prediction."""
    return bool((torch.as_tensor(guidance, device="cpu") != 1.0).any())


def _weight(guidance: Weight, interval: Sequence[float] | None, table: Table) -> float | Tensor:
    """The weight, 1 outside of an interval of t (Kynkäänniemi et al. 2024, arXiv:2404.07724, eq. 6, of sigma there)."""
    if interval is None and not isinstance(guidance, Sequence | Tensor):
        return number("guidance", guidance)
    w = torch.as_tensor(guidance, dtype=torch.float32, device="cpu")
    if tuple(w.shape) not in ((), (len(table),)) or not w.isfinite().all():
        raise ValueError(
            f"guidance must be finite, one weight or one for each of the {len(table)} steps, got shape {list(w.shape)}"
        )
    w = w.expand(len(table))
    if interval is None:
        return w
    low, high = (number("guidance_interval", t) for t in interval)
    if low > high:
        raise ValueError(f"guidance_interval is (low, high) in timesteps, got ({low:g}, {high:g})")
    return torch.where((table.timesteps >= low) & (table.timesteps <= high), w, 1.0)


def rescaled(pair: Tensor, w: Tensor, phi: Tensor, channels: int) -> Tensor:
    """Guide, and keep the spread of the conditional prediction   (Lin et al. 2023, arXiv:2305.08891, eqs. 14 to 16).

    m_cfg = m_u + w (m_c - m_u);  m = phi m_cfg std(m_c) / std(m_cfg) + (1 - phi) m_cfg, std over a sample's elements.

    What follows the prediction's channels, a learned variance, comes from the conditional half, the first: [2B, ...] ->
    float32 [B, ...].
    """
    m_c, m_u = pair.float().chunk(2)
    v = m_c[:, channels:]
    m_c, m_u = m_c[:, :channels], m_u[:, :channels]
    m = m_u + w * (m_c - m_u)
    axes = tuple(range(1, m.dim()))
    std_c, std = (x.std(dim=axes, keepdim=True, correction=0) for x in (m_c, m))
    # A prediction without spread has none to restore.
    m = m * (1.0 + phi * (torch.where(std > 0, std_c / std, 1.0) - 1.0))
    return torch.cat([m, v], dim=1) if v.shape[1] else m


def shift_of(table: Table) -> Tensor:
    """Tabulate what m moves by for the gradient g of log p(y | x_t)   (Dhariwal & Nichol 2021, Algorithm 2).

    With x_t = c x_0 + s eps, eps' = eps - s g moves x_0 by s^2 / c g. A row reads x_0 = a x_t + b m (or eps), so that
    m' = m + s^2 / (b c) g (or - s / b g) moves it alike, whatever the network predicts. The clip comes after it.

    Raises:
        ValueError: the table does not say its levels, or has one without signal.
    """
    refuse_without_levels("cond_fn", table)
    assert table.levels is not None
    (c, s), b = table.levels[:-1].unbind(1), table.column("b")
    shift = torch.where(b == 0, 0.0, (s**2 / c if table.estimate == "x_0" else -s) / b).float()
    if not shift.isfinite().all():
        raise ValueError(f"cond_fn in the epsilon form: a row of table {table.name!r} has no signal (c = 0 in levels)")
    return shift


def shifted(m: Tensor, by: Tensor, channels: int) -> Tensor:
    """Add [B, ...] to the prediction's channels of m [B, ...], or of both halves [2B, ...]; float32."""
    m = m.to(torch.float32, copy=True)
    for half in m.split(max(1, len(by))):
        half[:, :channels] += by
    return m


def gradient(cond_fn: CondFn, x_t: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return cond_fn(x_t, t, **kwargs), [B, ...], of the first B rows of t and of the arguments that have as many.

    Raises:
        ModelOutputError: it is no gradient.
    """
    own = {k: v[: len(x_t)] if isinstance(v, Tensor) and v.shape[:1] == t.shape else v for k, v in kwargs.items()}
    found = cond_fn(x_t.detach(), t[: len(x_t)], **own)
    if not isinstance(found, Tensor) or found.shape != x_t.shape:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ModelOutputError(f"cond_fn must return the gradient for x, {list(x_t.shape)}, got {got}")
    return found.detach()
